"""Arguments that say what a data set is, for the verbs that read one."""

from __future__ import annotations

import argparse
from typing import Any

from bagformer.cli._common import CommandError

# those of bagformer.data.sources, which --help does not wait for
SOURCES = ("muge", "parquet", "huggingface", "webdataset")
FIELDS = ("text", "image", "query_id", "item_id")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """--split, --source and --column."""
    add = parser.add_argument
    add("--split", metavar="NAME", help="which part of DATA (default: valid, or the only one)")
    add("--source", choices=SOURCES, help="what DATA is (default: by its name and contents)")
    add(
        "--column",
        dest="columns",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="where rows keep text, image, query_id or item_id",
    )


def columns_of(changes: list[str]) -> Any:
    """The columns that ``FIELD=NAME`` arguments name. Raises CommandError."""
    from bagformer.data.rows import Columns

    found = {}
    for change in changes:
        name, sign, value = change.partition("=")
        if name not in FIELDS or not sign or not value:
            raise CommandError(f"--column {change}: expected one of {', '.join(FIELDS)}=NAME")
        found[name] = value
    return Columns(**found)
