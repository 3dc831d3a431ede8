"""What the readers of MUGE files share: errors that name a place, lines, base64, and writers."""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from bagformer.data.images import ImageError

BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 256 * 2**20
ON_ERROR = ("raise", "skip")

_STANDARD = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_URLSAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


class RecordError(ValueError):
    """A record that does not hold what it should; ``reason``, a short word, is the key of the
    counts of skipped records."""

    reason: str


class MugeError(RecordError):
    """A line of a file that does not hold what it should.

    ``path``, ``line`` (from 1), ``field`` and ``reason`` are attributes.
    """

    def __init__(self, path: Any, line: int, field: str, reason: str, problem: str) -> None:
        super().__init__(path, line, field, reason, problem)
        self.path, self.line, self.field = str(path), line, field
        self.reason, self.problem = reason, problem

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.field}: {self.problem}"


class RowError(RecordError):
    """A row of a table or a sample of a shard that does not hold what it should.

    ``path``, ``place`` ("row 3", counted from 0, or "sample 000003"), ``field`` and ``reason`` are
    attributes.
    """

    def __init__(self, path: Any, place: str, field: str, reason: str, problem: str) -> None:
        super().__init__(path, place, field, reason, problem)
        self.path, self.place, self.field = str(path), place, field
        self.reason, self.problem = reason, problem

    def __str__(self) -> str:
        return f"{self.path}: {self.place}: {self.field}: {self.problem}"


OnError = str | Callable[[RecordError], None]


class ErrorSink:
    """Raises what it is given, or counts it by reason; a function is then told of each."""

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ON_ERROR and not callable(on_error):
            raise ValueError(f"on_error: expected one of {ON_ERROR}, got {on_error!r}")
        self.on_error = on_error
        self.skipped: Counter[str] = Counter()

    def report(self, error: RecordError) -> None:
        if self.on_error == "raise":
            raise error
        self.skipped[error.reason] += 1
        if callable(self.on_error):
            self.on_error(error)


def shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def lines(path: Path, handle: BinaryIO, sink: ErrorSink) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line without its end; bad lines go to ``sink``.

    A byte-order mark before the first line is dropped. Blank lines and lines beyond
    ``MAX_LINE_BYTES`` are errors, the latter without being held in memory.
    """
    number = offset = 0
    while chunk := handle.readline(MAX_LINE_BYTES + 1):
        number += 1
        start, size = offset, len(chunk)
        offset += size
        if size > MAX_LINE_BYTES and not chunk.endswith(b"\n"):
            offset += _finish_line(handle)
            problem = f"longer than {MAX_LINE_BYTES} bytes"
            sink.report(MugeError(path, number, "line", "long line", problem))
            continue
        if number == 1 and chunk.startswith(BOM):
            start, chunk = start + len(BOM), chunk[len(BOM) :]
        body = chunk[:-1] if chunk.endswith(b"\n") else chunk
        body = body[:-1] if body.endswith(b"\r") else body
        if body.strip():
            yield number, start, body
        else:
            sink.report(MugeError(path, number, "line", "blank line", "blank line"))


def _finish_line(handle: BinaryIO) -> int:
    size = 0
    while chunk := handle.readline(2**20):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def decode_base64(payload: bytes) -> bytes:
    """Bytes of standard or URL-safe base64, padded to a multiple of four.

    Raises ValueError on any other byte, on both alphabets in one payload, and on wrong padding;
    nothing is dropped silently.
    """
    if not payload:
        raise ValueError("empty")
    special = payload.translate(None, _STANDARD)
    body, padding = special.rstrip(b"="), len(special) - len(special.rstrip(b"="))
    strange = body.translate(None, b"+/-_")
    if strange:
        at = next(i for i, byte in enumerate(payload) if byte == strange[0])
        raise ValueError(f"byte {strange[:1]!r} at position {at} is not base64")
    if any(c in body for c in b"+/") and any(c in body for c in b"-_"):
        raise ValueError("mixes the standard and the URL-safe alphabet")
    if padding > 2 or len(payload.rstrip(b"=")) + padding != len(payload):
        raise ValueError("padding '=' in a wrong place")
    if len(payload) % 4:
        raise ValueError(f"length {len(payload)} is not a multiple of 4: truncated?")
    try:
        return base64.b64decode(payload.translate(_URLSAFE_TO_STANDARD), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def parse_id(raw: bytes) -> int | str:
    """An id as it stands in a tsv: int where it is written as a plain int64, else str."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8: {error}") from error
    if not text or text != text.strip():
        raise ValueError(f"expected an id, got {shorten(text)}")
    if any(character < " " for character in text):
        raise ValueError(f"control character in {shorten(text)}")
    if len(text) > 200:
        raise ValueError(f"longer than 200 characters: {shorten(text)}")
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and str(int(text)) == text:
        return int(text) if -(2**63) <= int(text) < 2**63 else text
    return text


def has_surrogate(text: str) -> bool:
    """Whether half a character is in it, which UTF-8 cannot hold."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def is_id(value: Any) -> bool:
    """Whether it is an int or a text that is not blank."""
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        return bool(value.strip()) and not has_surrogate(value)
    return isinstance(value, int)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        repeated = next(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"key {repeated!r} occurs twice")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8. Raises ValueError, and UnicodeDecodeError, which is one.

    NaN, and a key that occurs twice, are refused.
    """
    try:
        row = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(row, dict):
        raise ValueError(f"got {shorten(row)}")
    return row


def write_tsv(
    path: str | os.PathLike[str], pictures: Iterable[tuple[int | str, bytes]], urlsafe: bool = True
) -> int:
    """Write ``id<TAB>base64`` lines from pairs of an id and an encoded picture; gives their count.

    Raises ValueError for an id that is empty or holds a tab, a line end or outer spaces.
    """
    encode: Callable[[bytes], bytes] = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    count = 0
    with open(path, "wb") as handle:
        for key, data in pictures:
            name = str(key)
            if not name.strip() or name != name.strip() or any(c in name for c in "\t\r\n"):
                raise ValueError(f"id: expected text without tabs and line ends, got {name!r}")
            handle.write(name.encode("utf-8") + b"\t" + encode(data) + b"\n")
            count += 1
    return count


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, in UTF-8 and without escapes; gives their count."""
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``: what stood there stays until all of it is on the disk.

    Raises OSError, and then leaves ``path`` as it was.
    """
    place = Path(path).resolve()
    partial = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(partial, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


__all__ = [
    "ErrorSink",
    "ImageError",
    "MugeError",
    "RecordError",
    "RowError",
    "decode_base64",
    "has_surrogate",
    "is_id",
    "lines",
    "parse_id",
    "read_json",
    "shorten",
    "write_jsonl",
    "write_tsv",
    "write_whole",
]
