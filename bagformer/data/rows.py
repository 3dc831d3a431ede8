"""Pairs out of rows that hold texts and picture together: what tables and tar shards share."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from bagformer.data.images import MAX_PIXELS, ImageError, Transparency, decode_image
from bagformer.data.muge import Query
from bagformer.data.records import (
    ErrorSink,
    OnError,
    RecordError,
    RowError,
    has_surrogate,
    is_id,
    shorten,
)

Id = int | str


class Pairs(Protocol):
    """What training and evaluation read: :class:`bagformer.data.muge.MugeDataset` and
    :class:`RowPairs`.

    ``pairs[i]`` is ``{"query_id", "item_id", "text", "image"}`` and ``query_of(i)`` the place of
    its query in ``queries``, each with ``query_id``, ``text`` and ``item_ids``. ``images`` maps
    every item id to its picture, in the order that numbers them. ``encoded(i)`` is the file of a
    pair's picture; ``sizes()`` int64 ``[len(pairs)]``, what each takes in the set, without reading
    any: bytes, for MUGE characters of base64.
    """

    @property
    def queries(self) -> Sequence[Query]: ...
    @property
    def images(self) -> Mapping[Any, Image.Image]: ...
    @property
    def skipped(self) -> Counter[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def query_of(self, index: int) -> int: ...
    def encoded(self, index: int) -> bytes: ...
    def sizes(self) -> np.ndarray: ...


class SourceError(ValueError):
    """A data set that cannot be read as it was described."""


@dataclass(frozen=True)
class Columns:
    """Where a row keeps what: names of columns, or for webdataset of members and JSON fields.

    ``text``: one text or a list of them. ``image``: a picture; for webdataset extensions such as
    ``jpg;png``, where ``image`` stands for any. ``query_id`` and ``item_id``: null takes columns of
    these names where they are there.
    """

    text: str = "text"
    image: str = "image"
    query_id: str | None = None
    item_id: str | None = None


class Record(NamedTuple):
    """What a row says apart from its picture; ids are None where there are none."""

    row: int
    texts: tuple[str, ...]
    query_ids: tuple[Id, ...] | None
    item_id: Id | None
    has_picture: bool


class Rows(Protocol):
    """Rows in order, and their encoded pictures in any order and from any process."""

    def records(self) -> Iterator[Record | RecordError]:
        """Each row once: what it says, or what is wrong with it."""
        ...

    def place(self, row: int) -> tuple[str, str]:
        """File and name of a row, for messages."""
        ...

    def encoded(self, row: int) -> bytes:
        """The picture's file. Raises RecordError."""
        ...

    def sizes(self) -> np.ndarray:
        """Bytes of each row's picture (or of its path), int64, -1 where there is none. After
        :meth:`records`."""
        ...


def row_error(rows: Rows, row: int, field: str, reason: str, problem: str) -> RowError:
    return RowError(*rows.place(row), field, reason, problem)


def _text(value: Any) -> str:
    """Raises ValueError saying what is wrong."""
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text, got {shorten(value)}")
    if has_surrogate(value):
        raise ValueError(f"lone surrogate in {shorten(value)}")
    return value


def make_record(
    rows: Rows, row: int, columns: Columns, values: Mapping[str, Any], has_picture: bool
) -> Record:
    """A row's ``text``, ``query_id`` and ``item_id``, checked. Raises RowError.

    ``values`` lacks the ids that the set does not have. A value that is an exception is one that
    could not be read.
    """

    def fail(field: str, reason: str, problem: Any) -> RowError:
        return row_error(rows, row, getattr(columns, field) or field, reason, str(problem))

    for field, value in values.items():
        if isinstance(value, Exception):
            raise fail(field, "bad encoding", f"invalid UTF-8: {value}") from value
    text = values["text"]
    several = isinstance(text, (list, tuple))
    try:
        texts = tuple(_text(one) for one in (text if several else [text]))
    except UnicodeDecodeError as error:
        raise fail("text", "bad encoding", f"invalid UTF-8: {error}") from error
    except ValueError as error:
        raise fail("text", "bad text", error) from error
    query_ids = item_id = None
    if "query_id" in values:
        found = values["query_id"]
        query_ids = tuple(found if several and isinstance(found, (list, tuple)) else [found])
        if not all(map(is_id, query_ids)):
            raise fail("query_id", "bad id", f"expected ints or strings, got {shorten(found)}")
        if len(query_ids) != len(texts):
            problem = f"{len(texts)} texts need as many ids, got {shorten(found)}"
            raise fail("query_id", "bad id", problem)
    if "item_id" in values:
        item_id = values["item_id"]
        if not is_id(item_id):
            raise fail("item_id", "bad id", f"expected an int or a string, got {shorten(item_id)}")
    if not has_picture and item_id is None:
        raise fail("image", "missing picture", "there is none")
    return Record(row, texts, query_ids, item_id, has_picture)


class RowImages(Mapping[Any, Image.Image]):
    """The picture of each item id, decoded when asked for, in the order of their first rows.

    Where several rows share an id their pictures must be the same file, byte for byte, for only one
    can be ranked: else RowError. So is a picture that cannot be decoded.
    """

    def __init__(
        self,
        rows: Rows,
        places: Mapping[Any, Sequence[int]],
        max_pixels: int,
        transparency: Transparency = "white",
    ) -> None:
        self._rows, self._max_pixels, self.transparency = rows, max_pixels, transparency
        self._first = {key: found[0] for key, found in places.items()}
        self._others = {key: tuple(found[1:]) for key, found in places.items() if len(found) > 1}
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._first)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._first)

    def __contains__(self, key: object) -> bool:
        return key in self._first

    def encoded(self, key: Any) -> bytes:
        """The picture's file. Raises KeyError, RecordError."""
        row = self._first[key]
        data = self._rows.encoded(row)
        for other in self._others.get(key, ()):
            check_same(self._rows, key, (row, data), (other, self._rows.encoded(other)))
        return data

    def __getitem__(self, key: Any) -> Image.Image:
        return self.picture(key, self.transparency)

    def picture(self, key: Any, transparency: Transparency) -> Image.Image:
        """The picture by another ``transparency``. Raises KeyError, RecordError."""
        # a broken picture is told as one, not as one that differs from the others
        picture = decode_row(self._rows, self._first[key], self._max_pixels, transparency)
        if key in self._others:
            self.encoded(key)
        return picture


def check_same(rows: Rows, key: Any, first: tuple[int, bytes], other: tuple[int, bytes]) -> None:
    """Raises RowError where two rows of an item id have different pictures."""
    if first[1] != other[1]:
        path, place = rows.place(first[0])
        problem = (
            f"not the picture that {path}: {place} has for item_id {key!r}; an evaluation ranks "
            "one picture an item_id, so give each picture its own"
        )
        raise row_error(rows, other[0], "image", "different pictures", problem)


def decode_row(
    rows: Rows, row: int, max_pixels: int, transparency: Transparency = "white"
) -> Image.Image:
    """The picture of a row. Raises RecordError."""
    try:
        return decode_image(rows.encoded(row), max_pixels, transparency)
    except ImageError as error:
        raise row_error(rows, row, "image", error.reason, str(error)) from error


class RowPairs(Sequence[dict[str, Any]]):
    """Every text of every row with that row's picture: :class:`Pairs` of rows.

    Rows of one ``query_id`` are one query and must say the same text. Rows of one ``item_id`` are
    one item; a row without a picture has the picture of its item's first row that has one. Without
    ids every text is a query of its own, numbered through, and every row an item, by its number.

    ``decode``: decode each picture once now. What is wrong raises RecordError, or with
    ``on_error="skip"`` is left out and counted in ``skipped``. Only texts and ids are held.
    ``transparency``: how pictures become RGB, see :func:`bagformer.data.images.to_rgb`.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        on_error: OnError = "raise",
        decode: bool = False,
        max_pixels: int = MAX_PIXELS,
        transparency: Transparency = "white",
    ) -> None:
        self._rows, self._max_pixels, self._transparency = rows, max_pixels, transparency
        self._sink = ErrorSink(on_error)
        records = list(self._good(decode))
        places: dict[Any, list[int]] = {}
        for record in records:
            if record.has_picture:
                places.setdefault(_item(record), []).append(record.row)
        self.images = RowImages(rows, places, max_pixels, transparency)
        # emptied as it is read: with a great many rows it is as large as what is kept
        records.reverse()
        self._pair((records.pop() for _ in range(len(records))), places)

    @property
    def skipped(self) -> Counter[str]:
        return self._sink.skipped

    def _good(self, decode: bool) -> Iterator[Record]:
        kind: tuple[bool, bool] | None = None
        seen: dict[Any, int] = {}
        for record in self._rows.records():
            try:
                if isinstance(record, RecordError):
                    raise record
                found = record.query_ids is None, record.item_id is None
                kind = kind or found
                for name, here, before in zip(("query_id", "item_id"), found, kind, strict=True):
                    if here != before:
                        problem = f"{'none' if here else 'one'} here, unlike in the rows before"
                        raise row_error(self._rows, record.row, name, "bad id", problem)
                if decode and record.has_picture:
                    self._decode(record, seen)
            except RecordError as error:
                self._sink.report(error)
                continue
            yield record

    def _decode(self, record: Record, seen: dict[Any, int]) -> None:
        rows, row, key = self._rows, record.row, _item(record)
        decode_row(rows, row, self._max_pixels)
        first = seen.setdefault(key, row)
        if first != row:
            check_same(rows, key, (first, rows.encoded(first)), (row, rows.encoded(row)))

    def _pair(self, records: Iterator[Record], places: Mapping[Any, Sequence[int]]) -> None:
        names: list[tuple[Any, str, int]] = []
        number: dict[Any, int] = {}
        pairs = array("q"), array("q"), array("q")
        item_number = {key: n for n, key in enumerate(places)}
        running = 0
        for record in records:
            key = _item(record)
            if key not in places:
                problem = f"no picture here, and no other row has one for item_id {key!r}"
                self._sink.report(
                    row_error(self._rows, record.row, "item_id", "dangling item", problem)
                )
                continue
            for n, text in enumerate(record.texts):
                query_id: Any = running if record.query_ids is None else record.query_ids[n]
                running += 1
                place = number.setdefault(query_id, len(names))
                if place == len(names):
                    names.append((query_id, text, record.row))
                elif names[place][1] != text:
                    self._sink.report(self._two_texts(record.row, text, names[place]))
                    continue
                row = record.row if record.has_picture else places[key][0]
                for column, value in zip(pairs, (place, row, item_number[key]), strict=True):
                    column.append(value)
        self._query, self._row, self._number = (np.asarray(column, np.int64) for column in pairs)
        self._ids = list(places)
        self.queries = self._queries(names)

    def _queries(self, names: Sequence[tuple[Any, str, int]]) -> list[Query]:
        order = np.argsort(self._query, kind="stable")
        items = self._number[order]
        ends = np.searchsorted(self._query[order], np.arange(len(names) + 1)).tolist()
        found = []
        for n, (query_id, text, row) in enumerate(names):
            numbers = dict.fromkeys(items[ends[n] : ends[n + 1]].tolist())
            found.append(Query(query_id, text, tuple(self._ids[i] for i in numbers), row))
        return found

    def _two_texts(self, row: int, text: str, known: tuple[Any, str, int]) -> RowError:
        path, place = self._rows.place(known[2])
        problem = (
            f"{known[0]!r} has the text {shorten(text)} here and {shorten(known[1])} in "
            f"{path}: {place}"
        )
        return row_error(self._rows, row, "query_id", "duplicate id", problem)

    def __len__(self) -> int:
        return len(self._query)

    def query_of(self, index: int) -> int:
        """Place in ``queries`` of the query of pair ``index``, which is at least 0."""
        return int(self._query[index])

    def encoded(self, index: int) -> bytes:
        """The file of the picture of pair ``index``. Raises RecordError."""
        return self._rows.encoded(int(self._row[index]))

    def sizes(self) -> np.ndarray:
        """Bytes of each pair's picture, int64 ``[len(self)]``."""
        return self._rows.sizes()[self._row]

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[index]
        query = self.queries[self.query_of(place)]
        item = self._ids[int(self._number[place])]
        row = int(self._row[place])
        image = decode_row(self._rows, row, self._max_pixels, self._transparency)
        return {"query_id": query.query_id, "item_id": item, "text": query.text, "image": image}


def _item(record: Record) -> Any:
    return record.row if record.item_id is None else record.item_id
