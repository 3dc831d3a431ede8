"""Samples of WebDataset's .tar shards, at random.

The ``webdataset`` library streams, and what a shuffle buffer holds is lost when a run is stopped.
So shards are indexed once when they are opened, by :mod:`tarfile` for the members and the library's
own rule for what belongs to one sample; then any picture is one read at a known place.
"""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bagformer.data.records import MAX_LINE_BYTES, RecordError, RowError, read_json
from bagformer.data.rows import Columns, Record, make_record, row_error

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_BLOCK = tarfile.BLOCKSIZE
_META = re.compile(r"__[^/]*__($|/)")


def library() -> Any:
    """The package. Raises ImportError that says how to install it."""
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            f"WebDataset shards need the package webdataset ({error}): "
            "pip install 'bagformer[sources]'"
        ) from error
    return webdataset


class _Member(NamedTuple):
    name: str
    start: int
    size: int


def _broken(path: Path, problem: str) -> RowError:
    return RowError(path, "archive", "tar", "broken tar", problem)


def _members(path: Path, file: BinaryIO) -> Iterator[_Member | RowError]:
    """Regular members in order, then an error where the archive does not end as it should.

    ``tarfile`` takes the first thing that is no header for the end, so the end is looked at.
    """
    total = os.fstat(file.fileno()).st_size
    if file.read(2) == b"\x1f\x8b":
        yield _broken(path, "compressed with gzip, so nothing in it can be found: gunzip it first")
        return
    file.seek(0)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        while (member := archive.next()) is not None:
            # it keeps every member otherwise
            archive.members = []  # type: ignore[attr-defined]
            if member.offset_data + member.size > total:
                yield _broken(path, f"{member.name} is cut off: {total} bytes are too few")
                return
            if member.isreg() and not member.issparse():
                yield _Member(member.name, member.offset_data, member.size)
            elif not member.isdir():
                yield RowError(path, member.name, "tar", "no plain file", "not a plain file")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        yield _broken(path, f"cannot be read: {error}")
        return
    problem = _end(file, archive.offset)
    if problem:
        yield _broken(path, problem)


def _end(file: BinaryIO, offset: int) -> str | None:
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return f"ends at byte {offset} without the mark of an end: cut off?"
    if any(block):
        return f"no header of a member at byte {offset}"
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            return f"goes on after its end at byte {offset}: were archives joined? Name each"
    return None


class TarRows:
    """Samples of shards. The index, which :meth:`records` builds, has 24 bytes and the key for
    each; it may be pickled and forked."""

    def __init__(self, paths: Sequence[Path], columns: Columns) -> None:
        library()
        self.columns, self._paths = columns, list(paths)
        self._pictures = PICTURES if columns.image == "image" else tuple(columns.image.split(";"))
        self._sizes = [path.stat().st_size for path in paths]
        self._index: Any = None
        self._keys: Any = []

    def place(self, row: int) -> tuple[str, str]:
        key = self._keys[row]
        text = key if isinstance(key, str) else key.decode("utf-8", "replace")
        return str(self._paths[int(self._index[0][row])]), f"sample {text}"

    def records(self) -> Iterator[Record | RecordError]:
        split = library().tariterators.base_plus_ext
        self._index, self._keys = (array("q"), array("q"), array("q")), []
        for shard, path in enumerate(self._paths):
            with open(path, "rb") as file, open(path, "rb") as texts:
                key = ""
                members: dict[str, _Member] = {}
                for found in _members(path, file):
                    if isinstance(found, RowError):
                        yield found
                        # the sample that it broke off may lack a member
                        if found.reason == "broken tar":
                            members = {}
                        continue
                    base, extension = split(found.name)
                    # as the library has it, neither belongs to a sample
                    if base is None or _META.match(found.name):
                        continue
                    if base != key and members:
                        yield self._record(shard, key, members, texts)
                        members = {}
                    key = base
                    if extension.lower() in members:
                        problem = f"a second member {found.name}"
                        yield RowError(path, f"sample {key}", "tar", "duplicate member", problem)
                        continue
                    members[extension.lower()] = found
                if members:
                    yield self._record(shard, key, members, texts)
        self._index = tuple(np.asarray(column, np.int64) for column in self._index)
        self._keys = np.asarray([key.encode("utf-8", "replace") for key in self._keys] or [b""])

    def _record(
        self, shard: int, key: str, members: dict[str, _Member], file: BinaryIO
    ) -> Record | RecordError:
        row = len(self._keys)
        self._keys.append(key)
        found = [extension for extension in self._pictures if extension in members]
        place = members[found[0]] if found else _Member("", 0, -1)
        for column, value in zip(self._index, (shard, place.start, place.size), strict=True):
            column.append(value)
        if len(found) > 1 and self.columns.image == "image":
            problem = f"pictures {', '.join(found)}: say which in columns.image"
            return row_error(self, row, "image", "several pictures", problem)
        try:
            values = self._values(row, members, file)
            if not found and "item_id" not in values:
                problem = f"no member {', '.join(self._pictures)}; there are {', '.join(members)}"
                raise row_error(self, row, "image", "missing member", problem)
            return make_record(self, row, self.columns, values, bool(found))
        except RecordError as error:
            return error

    def _values(self, row: int, members: dict[str, _Member], file: BinaryIO) -> dict[str, Any]:
        values: dict[str, Any] = {}
        described: dict[str, Any] = {}
        if "json" in members:
            try:
                described = read_json(self._read(row, members["json"], file))
            except UnicodeDecodeError as error:
                problem = f"invalid UTF-8: {error}"
                raise row_error(self, row, "json", "bad encoding", problem) from error
            except ValueError as error:
                problem = f"not a JSON object: {error}"
                raise row_error(self, row, "json", "bad json", problem) from error
        if self.columns.text in described:
            values["text"] = described[self.columns.text]
        elif "txt" in members:
            try:
                text = self._read(row, members["txt"], file).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                problem = f"invalid UTF-8: {error}"
                raise row_error(self, row, "txt", "bad encoding", problem) from error
            values["text"] = text.rstrip("\r\n")
        else:
            problem = f"no member txt, and no json with {self.columns.text!r}"
            problem += f"; there are {', '.join(members)}"
            raise row_error(self, row, "text", "missing member", problem)
        for field in ("query_id", "item_id"):
            name = getattr(self.columns, field)
            if (name or field) in described:
                values[field] = described[name or field]
            elif name is not None:
                problem = f"no json with {name!r}; there are {', '.join(members)}"
                raise row_error(self, row, name, "missing field", problem)
        return values

    def _read(self, row: int, member: _Member, file: BinaryIO) -> bytes:
        if member.size > MAX_LINE_BYTES:
            problem = f"{member.name} has {member.size} bytes, more than {MAX_LINE_BYTES}"
            raise row_error(self, row, "text", "long text", problem)
        file.seek(member.start)
        return file.read(member.size)

    def sizes(self) -> np.ndarray:
        """Bytes of each sample's picture, int64, -1 where there is none."""
        return self._index[2]

    def encoded(self, row: int) -> bytes:
        """The picture's file. Raises RecordError, ValueError if the shard has changed."""
        shard, start, size = (int(column[row]) for column in self._index)
        path = self._paths[shard]
        if size < 0:
            raise row_error(self, row, "image", "missing member", "no picture")
        # opened each time: there may be more shards than a process may have open
        with open(path, "rb", buffering=0) as file:
            total = os.fstat(file.fileno()).st_size
            if total != self._sizes[shard]:
                raise ValueError(
                    f"{path}: had {self._sizes[shard]} bytes when indexed and has {total} now"
                )
            file.seek(start)
            return file.read(size)
