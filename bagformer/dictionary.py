"""Reads a dictionary of entities: one a line, UTF-8, tokenised as the texts are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MAX_LINE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 16
_LINES_AT_ONCE = 1 << 13  # 8,192 lines of a few characters fill a few megabytes while tokenised
_LONG = 25  # tokens; the original's texts have no more


_SINGLE = {
    "leftmost_longest": "one token, no effect on bags",
    "original": "one token, matters at token 0 alone",
    "backward_max": "one token, a span of its own",
}


@dataclass(frozen=True)
class DictionaryReport:
    """What a dictionary held, and what became of it. All numbers count lines.

    ``lines`` = ``blank`` + ``malformed`` + ``unknown_dropped`` + ``duplicates`` + ``kept``.
    """

    path: str
    matcher: str
    lines: int
    blank: int  # nothing, or nothing that the tokenizer keeps
    malformed: int  # only with on_error="skip"
    unknown: int  # hold a token outside the vocabulary
    unknown_dropped: int
    duplicates: int  # same token ids as an earlier line
    kept: int
    single: int  # one token; under leftmost_longest a bag of one with or without the entry
    long: int  # more than 25 tokens, kept
    longest: int  # tokens of the longest entry
    unreachable: int  # matcher `original` only: it can never find these

    def __str__(self) -> str:
        rows = [
            ("lines", self.lines, ""),
            ("kept", self.kept, f"distinct entries, longest {self.longest} tokens"),
            ("duplicates", self.duplicates, "same token ids as another line"),
            ("blank", self.blank, ""),
            ("malformed", self.malformed, "skipped"),
            ("unknown", self.unknown, f"hold an unknown token, {self.unknown_dropped} dropped"),
            ("single", self.single, _SINGLE[self.matcher]),
            ("long", self.long, f"more than {_LONG} tokens"),
        ]
        if self.matcher == "original":
            rows.append(("unreachable", self.unreachable, "no chain of entries leads there"))
        table = "\n".join(
            f"  {name:<12}{number:>9,}  {note}".rstrip() for name, number, note in rows
        )
        return f"{self.path} for {self.matcher}\n{table}"


def token_ids_of(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of ``tokens``. Raises ValueError for one that the vocabulary lacks, TypeError for a
    tokenizer that is none."""
    if not hasattr(tokenizer, "convert_tokens_to_ids") and (tokens or not callable(tokenizer)):
        raise TypeError(
            "tokenizer must have tokenize and convert_tokens_to_ids, "
            f"got {type(tokenizer).__name__}"
        )
    if not tokens:
        return []
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    unknown_token = getattr(tokenizer, "unk_token", None)
    for token, number in zip(tokens, ids, strict=True):
        if number is None or (number == unknown_id and token != unknown_token):
            raise ValueError(f"masked_tokens: {token!r} is not in the tokenizer's vocabulary")
    return ids


def encode_dictionary(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    drop_unknown: bool,
    on_error: str,
    counts: dict[str, int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``(ids, lengths)``, both int64, for some thousand lines at a time.

    ``counts`` is filled with the fields of :class:`DictionaryReport` that reading decides.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    names = ("lines", "blank", "malformed", "unknown", "unknown_dropped", "single", "long")
    counts.update(dict.fromkeys(names, 0))
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    for lines in _batches(_read_lines(path, on_error, counts)):
        rows = _encode(tokenizer, lines)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        try:
            tokens = (token for row in rows for token in row)
            ids = np.fromiter(tokens, np.int64, int(lengths.sum()))
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: the tokenizer gives a token of lines up to {counts['lines']} no int id"
            ) from None
        keep = lengths > 0
        counts["blank"] += int((~keep).sum())
        if unknown_id is not None:
            owner = np.repeat(np.arange(len(rows)), lengths)
            has_unknown = np.zeros(len(rows), bool)
            has_unknown[owner[ids == unknown_id]] = True
            counts["unknown"] += int(has_unknown.sum())
            if drop_unknown:
                counts["unknown_dropped"] += int(has_unknown.sum())
                keep &= ~has_unknown
        ids, lengths = ids[np.repeat(keep, lengths)], lengths[keep]
        counts["single"] += int((lengths == 1).sum())
        counts["long"] += int((lengths > _LONG).sum())
        yield ids, lengths


def _encode(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    if not callable(tokenizer):
        return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(line)) for line in lines]
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return tokenizer(lines)["input_ids"]
    encoded = tokenizer(
        lines,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return encoded["input_ids"]


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for line in lines:
        batch.append(line)
        if len(batch) == _LINES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_lines(
    path: str | os.PathLike[str], on_error: str, counts: dict[str, int]
) -> Iterator[str]:
    for number, raw in enumerate(_raw_lines(path), start=1):
        counts["lines"] = number
        text, fault = _decode(raw)
        if fault:
            if on_error == "raise":
                raise ValueError(f"{path}, line {number}: {fault}")
            counts["malformed"] += 1
        elif not text or text.isspace():
            counts["blank"] += 1
        else:
            yield text


def _raw_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Lines without their ends, of any system; an absurd one is cut but still too long."""
    with open(path, "rb") as file:
        rest = held = b""
        block = file.read(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
        while block:
            block = held + block
            held = b"\r" if block.endswith(b"\r") else b""  # perhaps half of "\r\n"
            text = rest + block.removesuffix(held)
            *lines, rest = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            yield from lines
            rest = rest[: _MAX_LINE_BYTES + 1]
            block = file.read(_BLOCK_BYTES)
        if rest or held:
            yield rest


def _decode(raw: bytes) -> tuple[str, str | None]:
    if len(raw) > _MAX_LINE_BYTES:
        return "", f"more than {_MAX_LINE_BYTES} bytes"
    if b"\0" in raw:
        return "", "holds a NUL byte"
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 ({error.reason} at byte {error.start})"
