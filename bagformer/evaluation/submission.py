"""Prediction files for leaderboards: checked before a byte is written, and written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from bagformer.data.records import write_whole
from bagformer.evaluation.report import LISTED

Row = dict[str, Any]


def _muge(query: Any, ids: list[Any]) -> Row:
    return {"query_id": query.query_id, "query_text": query.text, "item_ids": ids}


def _chinese_clip(query: Any, ids: list[Any]) -> Row:
    return {"text_id": query.query_id, "image_ids": ids}


# What a format makes of a query and its images, and where it puts both kinds of ids.
FORMATS: dict[str, tuple[Callable[[Any, list[Any]], Row], str, str]] = {
    "muge": (_muge, "query_id", "item_ids"),
    "chinese-clip": (_chinese_clip, "text_id", "image_ids"),
}


def check_rows(
    rows: Sequence[Mapping[str, Any]],
    queries: Sequence[Any],
    image_ids: Iterable[Any],
    form: str = "muge",
    *,
    length: int = LISTED,
) -> None:
    """Raise ValueError unless ``rows`` are a whole submission.

    Every query of ``queries`` occurs exactly once and no other does, each with ``length`` distinct
    ids of ``image_ids``. A leaderboard gives 0 for less, without saying why.
    """
    _, key, field = _format(form)
    known: Collection[Any] = set(image_ids)
    if len(known) < length:
        raise ValueError(
            f"submission: {length} images of each query are asked for, the set has {len(known)}"
        )
    wanted = {query.query_id for query in queries}
    seen: set[Any] = set()
    for number, row in enumerate(rows, 1):
        if row[key] in seen or row[key] not in wanted:
            what = "occurs twice" if row[key] in seen else "is not a query of the set"
            raise ValueError(f"submission: row {number}: {key} {row[key]!r} {what}")
        seen.add(row[key])
        found = row[field]
        if len(found) != length or len(set(found)) != length:
            raise ValueError(
                f"submission: row {number}: {field} must hold {length} distinct ids, got "
                f"{len(found)}, {len(set(found))} of them distinct"
            )
        strange = [item for item in found if item not in known]
        if strange:
            raise ValueError(
                f"submission: row {number}: {field}: {strange[0]!r} is not an image of the set"
            )
    if len(seen) != len(wanted):
        lost = next(query.query_id for query in queries if query.query_id not in seen)
        raise ValueError(
            f"submission: {len(wanted) - len(seen)} queries have no row, the first is {lost!r}"
        )


def _format(form: str) -> tuple[Callable[[Any, list[Any]], Row], str, str]:
    if form not in FORMATS:
        raise ValueError(f"form: expected one of {', '.join(FORMATS)}, got {form!r}")
    return FORMATS[form]


def write_submission(
    path: str | os.PathLike[str],
    report: Any,
    kind: str = "recall",
    form: str = "muge",
    *,
    length: int = LISTED,
) -> int:
    """Write the predictions of a :class:`bagformer.evaluation.Report`; gives the number of rows.

    ``form``: ``muge``, lines ``{"query_id", "query_text", "item_ids"}``, or ``chinese-clip``, lines
    ``{"text_id", "image_ids"}``. Raises ValueError, and writes nothing, unless every query occurs
    once with ``length`` distinct ids of images that exist.
    """
    make, _, _ = _format(form)
    lists = report.predictions(kind)
    rows = [make(query, ids[:length]) for query, ids in zip(report.queries, lists, strict=True)]
    check_rows(rows, report.queries, report.image_ids, form, length=length)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)
