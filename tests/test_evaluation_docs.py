"""docs/evaluation.md: its figures are those of the committed file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bagformer.evaluation import submission
from bagformer.evaluation.report import KINDS, metric_names

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_table_is_the_committed_one():
    held = json.loads((ROOT / "benchmarks/results/evaluation_protocols.json").read_text("utf-8"))
    block = re.search(r"<!-- figures:begin protocols -->(.*?)<!-- figures:end -->", PAGE, re.S)
    assert block and not held["dirty"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].split("\n")]
    rows = [row for row in rows if len(row) == 5][2:]
    expected = [
        [
            name,
            *(f"{row['metrics'][key]:.1f}" for key in KEYS),
            f"{row['same_first_picture']:.1f}",
        ]
        for name, row in held["results"].items()
    ]
    assert rows == expected


KEYS = ("recall_t2i_r1", "recall_t2i_r10", "recall_i2t_r1")


def test_names_on_the_page_are_those_of_the_code():
    names = {n for kind in KINDS for n in metric_names(kind, ["text_to_image", "image_to_text"])}
    assert set(re.findall(r"`(recall_\w+)`", PAGE)) <= names
    assert all(f"`{form}`" in PAGE for form in submission.FORMATS)
