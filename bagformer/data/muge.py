"""Read data in MUGE's format without holding it in memory.

Pictures are lines ``id<TAB>base64`` of a tsv, queries lines
``{"query_id", "query_text", "item_ids"}`` of a jsonl. What a line does not say rightly is an error
that names the file, the line and the field, or, with ``on_error="skip"``, a counted omission;
never a silent one.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagformer.data.images import MAX_PIXELS, ImageError, Transparency, decode_image
from bagformer.data.records import (
    ErrorSink,
    MugeError,
    OnError,
    decode_base64,
    has_surrogate,
    is_id,
    lines,
    parse_id,
    read_json,
    shorten,
    write_jsonl,
    write_tsv,
)

__all__ = [
    "MugeDataset",
    "MugeError",
    "MugeImages",
    "Queries",
    "Query",
    "read_queries",
    "write_jsonl",
    "write_tsv",
]

_CLOSED = (-1, None)  # no process holds the file


class MugeImages(Mapping[Any, Image.Image]):
    """Pictures of a tsv by id, decoded when asked for.

    Only an index is held: id, offset, length and line of each row, as numpy arrays. Ids are ints
    where the first row's is written as one, and then all must be; else they are strings. Iteration
    gives ids in file order. The object may be pickled, forked and shared between threads: each
    process opens the file for itself.

    Building the index checks lines, tabs, ids and duplicates (with ``on_error="skip"`` the first of
    a kind stays). Base64 and picture are checked when read: ``images[id]`` raises
    :class:`MugeError`, :meth:`pictures` and :meth:`check` obey ``on_error``. ``skipped`` counts
    what was left out, by reason. See :func:`bagformer.data.images.decode_image` for what a picture
    may be and how it becomes RGB by ``transparency``.

    Raises FileNotFoundError, MugeError, and ValueError if ``on_error`` is neither "raise" nor
    "skip".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        on_error: OnError = "raise",
        max_pixels: int = MAX_PIXELS,
        transparency: Transparency = "white",
    ) -> None:
        if max_pixels <= 0:
            raise ValueError(f"max_pixels: expected a positive int, got {max_pixels!r}")
        self.path = Path(path)
        self.max_pixels, self.transparency = max_pixels, transparency
        self._sink = ErrorSink(on_error)
        self._opened: tuple[int, Any] = _CLOSED
        self._build()

    @property
    def skipped(self) -> Counter[str]:
        return self._sink.skipped

    def _build(self) -> None:
        keys: Any = None
        starts, sizes, numbers = array("q"), array("q"), array("q")
        with open(self.path, "rb") as handle:
            self._file_size = os.fstat(handle.fileno()).st_size
            for number, offset, body in lines(self.path, handle, self._sink):
                tab = body.find(b"\t")
                try:
                    key = self._key(number, body, tab, keys)
                except MugeError as error:
                    self._sink.report(error)
                    continue
                if keys is None:
                    keys = array("q") if isinstance(key, int) else []
                keys.append(key)
                starts.append(offset + tab + 1)
                sizes.append(len(body) - tab - 1)
                numbers.append(number)
        ids = np.asarray(
            keys if keys is not None else [], dtype=np.str_ if isinstance(keys, list) else np.int64
        )
        self._index(ids, *(np.asarray(column, np.int64) for column in (starts, sizes, numbers)))

    def _key(self, number: int, body: bytes, tab: int, keys: Any) -> int | str:
        if tab < 0:
            problem = f"no tab between id and picture in {shorten(body)}"
            raise MugeError(self.path, number, "line", "no tab", problem)
        if body.find(b"\t", tab + 1) >= 0:
            raise MugeError(self.path, number, "line", "extra tab", "more than one tab")
        try:
            key = parse_id(body[:tab])
        except ValueError as error:
            raise MugeError(self.path, number, "id", "bad id", str(error)) from error
        if keys is None or isinstance(key, int) == isinstance(keys, array):
            return key
        if isinstance(keys, list):
            return str(key)
        problem = f"expected an int as in the lines before, got {shorten(key)}"
        raise MugeError(self.path, number, "id", "bad id", problem)

    def _index(self, ids: Any, starts: Any, sizes: Any, numbers: Any) -> None:
        order = np.argsort(ids, kind="stable")
        ranked = ids[order]
        repeats = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
        keep = np.ones(len(ids), dtype=bool)
        for place in order[repeats].tolist() if len(repeats) else ():
            first = numbers[order[np.searchsorted(ranked, ids[place])]]
            problem = f"{ids[place].item()!r} was already on line {first}"
            self._sink.report(
                MugeError(self.path, int(numbers[place]), "id", "duplicate id", problem)
            )
            keep[place] = False
        self._ids, self._starts = ids[keep], starts[keep]
        self._sizes, self._numbers = sizes[keep], numbers[keep]
        self._order = np.argsort(self._ids, kind="stable")
        self._ranked = self._ids[self._order]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": _CLOSED}

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ids.tolist())

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def _find(self, key: object) -> int | None:
        kinds = (int, np.integer) if self._ids.dtype == np.int64 else (str,)
        if isinstance(key, bool) or not isinstance(key, kinds):
            return None
        wanted: Any = key
        try:
            place = int(np.searchsorted(self._ranked, wanted))
        except OverflowError:
            return None
        if place == len(self._ranked) or self._ranked[place] != wanted:
            return None
        return int(self._order[place])

    def line_of(self, key: int | str) -> int:
        """Line, from 1, on which the picture stands. Raises KeyError."""
        return int(self._numbers[self._row(key)])

    def _row(self, key: object) -> int:
        row = self._find(key)
        if row is None:
            raise KeyError(f"{self.path} has no picture with id {key!r}")
        return row

    def _file(self) -> Any:
        """This process's handle; one that was shared after a fork would share its position too."""
        pid, handle = self._opened
        if pid != os.getpid():
            handle = open(self.path, "rb")  # noqa: SIM115
            found = os.fstat(handle.fileno()).st_size
            if found != self._file_size:
                handle.close()
                raise ValueError(
                    f"{self.path}: had {self._file_size} bytes when indexed and has {found} now"
                )
            self._opened = os.getpid(), handle
        return handle

    def _read(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            # held by name: another thread's first read may put a handle of its own in its place
            handle = self._file()
            return os.pread(handle.fileno(), size, start)
        with open(self.path, "rb") as handle:
            handle.seek(start)
            return handle.read(size)

    def encoded(self, key: int | str) -> bytes:
        """The picture's file as it was before base64. Raises KeyError, MugeError."""
        row = self._row(key)
        payload = self._read(int(self._starts[row]), int(self._sizes[row]))
        try:
            return decode_base64(payload)
        except ValueError as error:
            line = int(self._numbers[row])
            raise MugeError(self.path, line, "image", "bad base64", f"base64: {error}") from error

    def sizes(self, keys: Sequence[int | str]) -> np.ndarray:
        """Characters of base64 of each picture, int64 ``[len(keys)]``; ``keys`` must be known."""
        wanted = np.asarray(keys, np.int64 if self._ids.dtype == np.int64 else np.str_)
        return self._sizes[self._order[np.searchsorted(self._ranked, wanted)]]

    def __getitem__(self, key: int | str) -> Image.Image:
        return self.picture(key, self.transparency)

    def picture(self, key: int | str, transparency: Transparency) -> Image.Image:
        """The picture by another ``transparency``. Raises KeyError, MugeError."""
        data = self.encoded(key)
        try:
            return decode_image(data, self.max_pixels, transparency)
        except ImageError as error:
            raise MugeError(
                self.path, self.line_of(key), "image", error.reason, str(error)
            ) from error

    def pictures(self) -> Iterator[tuple[Any, Image.Image]]:
        """Ids and pictures in file order; broken ones raise, or are left out and counted."""
        for key in self:
            try:
                picture = self[key]
            except MugeError as error:
                self._sink.report(error)
                continue
            yield key, picture

    def check(self) -> Counter[str]:
        """Decode every picture once; broken ones raise, or leave the index and are counted."""
        good = {key for key, _ in self.pictures()}
        keep = np.fromiter((key in good for key in self), dtype=bool, count=len(self))
        self._index(self._ids[keep], self._starts[keep], self._sizes[keep], self._numbers[keep])
        return self.skipped


@dataclass(frozen=True, slots=True)
class Query:
    """One row of a query file; ``item_ids`` is empty where the file gives none (a test split)."""

    query_id: int | str
    text: str
    item_ids: tuple[int | str, ...]
    line: int


class Queries(Sequence[Query]):
    """Queries in file order, with ``path`` and ``skipped``, the counts of lines left out."""

    def __init__(self, path: Path, rows: Sequence[Query], skipped: Counter[str]) -> None:
        self.path, self.skipped = path, skipped
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


def _parse_query(path: Path, number: int, body: bytes) -> Query:
    def fail(field: str, reason: str, problem: str) -> MugeError:
        return MugeError(path, number, field, reason, problem)

    try:
        row = read_json(body)
    except UnicodeDecodeError as error:
        raise fail("line", "bad encoding", f"invalid UTF-8: {error}") from error
    except ValueError as error:
        raise fail("line", "bad json", f"not a JSON object: {error}") from error
    for field in ("query_id", "query_text"):
        if field not in row:
            raise fail(field, "missing field", f"missing; the line has {shorten(sorted(row))}")
    key, text, items = row["query_id"], row["query_text"], row.get("item_ids", [])
    if not is_id(key):
        raise fail("query_id", "bad id", f"expected an int or a string, got {shorten(key)}")
    if not isinstance(text, str) or not text.strip():
        raise fail("query_text", "bad text", f"expected a text, got {shorten(text)}")
    if has_surrogate(text):
        raise fail("query_text", "bad text", f"lone surrogate in {shorten(text)}")
    if not isinstance(items, list) or not all(map(is_id, items)):
        problem = f"expected a list of ints or strings, got {shorten(items)}"
        raise fail("item_ids", "bad item ids", problem)
    if len(set(items)) != len(items):
        raise fail("item_ids", "bad item ids", f"an id occurs twice in {shorten(items)}")
    return Query(key, text, tuple(items), number)


def read_queries(path: str | os.PathLike[str], *, on_error: OnError = "raise") -> Queries:
    """Queries of a jsonl file.

    Raises FileNotFoundError, :class:`MugeError` (with ``on_error="raise"``; with "skip" bad lines
    are left out and counted in ``.skipped``), ValueError for another ``on_error``.
    """
    place, sink = Path(path), ErrorSink(on_error)
    rows: dict[int | str, Query] = {}
    with open(place, "rb") as handle:
        for number, _, body in lines(place, handle, sink):
            try:
                query = _parse_query(place, number, body)
                if query.query_id in rows:
                    first = rows[query.query_id].line
                    problem = f"{query.query_id!r} was already on line {first}"
                    raise MugeError(place, number, "query_id", "duplicate id", problem)
            except MugeError as error:
                sink.report(error)
                continue
            rows[query.query_id] = query
    return Queries(place, list(rows.values()), sink.skipped)


class MugeDataset(Sequence[dict[str, Any]]):
    """Every pair of a query and one of its pictures, for training; relevance for evaluation.

    ``dataset[i]`` is ``{"query_id", "item_id", "text", "image"}`` with an RGB picture.
    ``queries`` are the queries kept, ``images`` the pictures. A query's item without a picture
    raises MugeError, or with ``on_error="skip"`` is left out and counted as "dangling item", and a
    query that thereby loses all its items as "query without pictures", in ``skipped``.
    """

    def __init__(
        self, queries: Queries, images: MugeImages, *, on_error: OnError = "raise"
    ) -> None:
        self.images = images
        self._sink = ErrorSink(on_error)
        self.queries: list[Query] = []
        for query in queries:
            kept = self._known(queries.path, query)
            if kept is not None:
                self.queries.append(kept)
        counts = [len(query.item_ids) for query in self.queries]
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))

    @property
    def skipped(self) -> Counter[str]:
        return self._sink.skipped

    def _known(self, path: Path, query: Query) -> Query | None:
        lost = [item for item in query.item_ids if item not in self.images]
        if not lost:
            return query
        for item in lost:
            problem = f"no picture in {self.images.path} for {shorten(item)}"
            self._sink.report(MugeError(path, query.line, "item_ids", "dangling item", problem))
        left = tuple(item for item in query.item_ids if item in self.images)
        if not left:
            self.skipped["query without pictures"] += 1
            return None
        return Query(query.query_id, query.text, left, query.line)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def query_of(self, index: int) -> int:
        """Place in ``queries`` of the query of pair ``index``, which is at least 0."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def _item(self, index: int) -> int | str:
        row = self.query_of(index)
        return self.queries[row].item_ids[index - int(self._ends[row])]

    def encoded(self, index: int) -> bytes:
        """The file of the picture of pair ``index``. Raises MugeError."""
        return self.images.encoded(self._item(index))

    def sizes(self) -> np.ndarray:
        """Characters of base64 of each pair's picture, int64 ``[len(self)]``."""
        return self.images.sizes([item for query in self.queries for item in query.item_ids])

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        query, item = self.queries[self.query_of(place)], self._item(place)
        image = self.images[item]
        return {"query_id": query.query_id, "item_id": item, "text": query.text, "image": image}

    def relevance(self) -> dict[int | str, frozenset[int | str]]:
        """The relevant picture ids of each query id."""
        return {query.query_id: frozenset(query.item_ids) for query in self.queries}
