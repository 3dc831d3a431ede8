"""Prediction files: what is in them, what is refused, and that they are whole or not there."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from bagformer.evaluation import Report, submission
from bagformer.evaluation.submission import check_rows, write_submission, write_whole

QUERIES = [SimpleNamespace(query_id=n, text=f"文{n}", item_ids=()) for n in (7, 3, 5)]
IDS = [100 + n for n in range(12)]


def report(**changes):
    places = torch.stack([torch.arange(10) + n for n in (0, 1, 2)])
    fields = {
        "protocol": "corrected",
        "metrics": {},
        "counts": {},
        "k_test": 0,
        "rankings": {"recall": places},
        "queries": QUERIES,
        "image_ids": IDS,
    }
    return Report(**{**fields, **changes})


def test_both_formats(tmp_path):
    assert write_submission(tmp_path / "m.jsonl", report()) == 3
    lines = (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == json.dumps(
        {"query_id": 7, "query_text": "文7", "item_ids": IDS[:10]}, ensure_ascii=False
    )
    write_submission(tmp_path / "c.jsonl", report(), form="chinese-clip")
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert rows[1] == {"text_id": 3, "image_ids": IDS[1:11]}
    assert [row["text_id"] for row in rows] == [7, 3, 5]
    with pytest.raises(ValueError, match="form: expected one of muge, chinese-clip"):
        write_submission(tmp_path / "x.jsonl", report(), form="csv")
    with pytest.raises(ValueError, match="kind: expected one of recall, got 'merge'"):
        write_submission(tmp_path / "x.jsonl", report(), "merge")
    assert not (tmp_path / "x.jsonl").exists()


def rows():
    return [{"query_id": q.query_id, "item_ids": IDS[:10]} for q in QUERIES]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: r.pop(), "1 queries have no row, the first is 5"),
        (lambda r: r.append(dict(r[0])), "row 4: query_id 7 occurs twice"),
        (lambda r: r[1].update(query_id=9), "row 2: query_id 9 is not a query of the set"),
        (lambda r: r[1].update(item_ids=IDS[:9]), "row 2: item_ids must hold 10 distinct ids"),
        (lambda r: r[2].update(item_ids=[*IDS[:9], IDS[0]]), "got 10, 9 of them distinct"),
        (lambda r: r[0].update(item_ids=[*IDS[:9], 99]), "row 1: item_ids: 99 is not an image"),
    ],
)
def test_a_submission_that_would_score_0_is_refused(spoil, message):
    good = rows()
    check_rows(good, QUERIES, IDS)
    spoil(good)
    with pytest.raises(ValueError, match=message):
        check_rows(good, QUERIES, IDS)


def test_too_small_a_set_is_refused(tmp_path):
    small = report(image_ids=IDS[:9], rankings={"recall": torch.arange(9).expand(3, 9)})
    with pytest.raises(ValueError, match="10 images of each query are asked for, the set has 9"):
        write_submission(tmp_path / "m.jsonl", small)
    assert write_submission(tmp_path / "m.jsonl", small, length=9) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_submission(path, report())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["m.jsonl"]
    monkeypatch.undo()
    write_whole(path, "新")
    assert path.read_bytes() == "新".encode()
