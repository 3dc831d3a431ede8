"""Build a data set, or check one.

    bagformer data iconpark OUT
    bagformer data check queries.jsonl images.tsv
    bagformer data check "pairs/*.parquet" --column text=caption
    bagformer data check FOLDER --split valid
    bagformer data check "shards/train-{00..12}.tar"

iconpark: real drawings with Chinese titles (Apache-2.0), fetched with npm, drawn by resvg.
check: reads every line, row or sample and decodes every picture, through the readers that training
uses; names each one that is wrong by its file and line, row or sample; exit code 1 if there is any.
DATA is two files in MUGE's format, or what bagformer evaluate takes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bagformer.cli._common import CommandError, bar, print_json
from bagformer.cli._sources import add_source_arguments, columns_of

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("iconpark", help="build the IconPark set in folder OUT")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument(
        "--tarball", type=Path, metavar="FILE", help="the npm package, where it is already here"
    )
    build.add_argument("--force", action="store_true", help="replace what is in OUT")
    check = actions.add_parser("check", help="read a whole set and name what is wrong with it")
    check.add_argument("data", nargs="+", metavar="DATA")
    add_source_arguments(check)
    check.add_argument(
        "--all",
        action="store_true",
        help=f"name everything that is wrong, not only the first {_SHOWN} of a kind",
    )
    for action in (build, check):
        # so that the options may stand behind the action too
        for flag in ("--json", "--quiet", "--debug"):
            action.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


class _Findings:
    """What is wrong, counted by kind; of each kind the first few by name."""

    def __init__(self, shown: int | None) -> None:
        self.shown = shown
        self.problems: Counter[str] = Counter()
        self.named: list[str] = []

    def of(self, part: str) -> Callable[[Any], None]:
        """A function for ``on_error`` that files errors under ``part``."""

        def add(error: Any) -> None:
            kind = f"{part}: {error.reason}"
            self.problems[kind] += 1
            if self.shown is None or self.problems[kind] <= self.shown:
                self.named.append(str(error))

        return add


class _Watched:
    """Rows that move a bar when they are read."""

    def __init__(self, rows: Any, progress: Any) -> None:
        self._rows, self._progress = rows, progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def records(self) -> Iterator[Any]:
        for record in self._rows.records():
            self._progress.update()
            yield record


def _source(args: argparse.Namespace) -> Any:
    from bagformer.data.sources import Source
    from bagformer.evaluation.sets import find_set

    first = Path(args.data[0])
    if len(args.data) == 2 and first.suffix == ".jsonl" and args.source in (None, "muge"):
        if args.columns or args.split:
            raise CommandError("--column and --split are not for two files in MUGE's format")
        return Source("muge", (first,), Path(args.data[1]))
    if first.suffix == ".jsonl":
        raise CommandError(f"DATA: {first} needs its file of pictures: QUERIES.jsonl IMAGES.tsv")
    return find_set(args.data, args.split, args.source, columns_of(args.columns))


def _check_muge(args: argparse.Namespace, source: Any, findings: _Findings) -> Any:
    from bagformer.data.muge import MugeDataset, MugeError, MugeImages, read_queries

    broken = findings.of("picture")
    queries = read_queries(source.files[0], on_error=findings.of("query"))
    images = MugeImages(source.images, on_error=broken)
    pairs = MugeDataset(queries, images, on_error=findings.of("pair"))
    lost = "query without pictures"
    findings.problems.update({f"pair: {lost}": n for n in [pairs.skipped[lost]] if n})
    with bar(args, len(images), "decode pictures", "picture") as progress:
        for key in images:
            try:
                images[key]
            except MugeError as error:
                broken(error)
            progress.update()
    return pairs


def _check_rows(args: argparse.Namespace, source: Any, findings: _Findings) -> Any:
    from bagformer.data.rows import RowPairs
    from bagformer.data.sources import open_rows

    rows = open_rows(source)
    with bar(args, None, "read rows", "row") as progress:
        watched: Any = _Watched(rows, progress)
        return RowPairs(watched, on_error=findings.of("row"), decode=True)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Counts of what a set holds and of what is wrong with it, and the names of what is wrong."""
    source = _source(args)
    findings = _Findings(None if args.all else _SHOWN)
    read = _check_muge if source.kind == "muge" else _check_rows
    pairs = read(args, source, findings)
    wanted = {item for query in pairs.queries for item in query.item_ids}
    return {
        "source": source.kind,
        "pictures": len(pairs.images),
        "queries": len(pairs.queries),
        "pairs": len(pairs),
        "pictures_without_query": len(pairs.images) - len(wanted),
        "repeated_query_texts": len(pairs.queries) - len({query.text for query in pairs.queries}),
        "problems": dict(sorted(findings.problems.items())),
        "examples": findings.named,
    }


def _print(result: dict[str, Any]) -> None:
    for name, value in result.items():
        if name == "examples":
            continue
        if isinstance(value, dict):
            print(f"{name}: {sum(value.values())}")
            for kind, count in value.items():
                print(f"  {kind}: {count}")
        else:
            print(f"{name}: {len(value) if isinstance(value, list) else value}")
    named = result.get("examples", ())
    for example in named:
        print(example)
    # a query that lost its pictures is a consequence, and has no line of its own
    left = sum(result.get("problems", {}).values()) - len(named)
    left -= result.get("problems", {}).get("pair: query without pictures", 0)
    if left:
        print(f"and {left} more: --all names them")


def run(args: argparse.Namespace) -> int:
    if args.action == "iconpark":
        from bagformer.data.iconpark import build

        result = build(
            args.out,
            tarball=args.tarball,
            overwrite=args.force,
            progress=not args.quiet and sys.stderr.isatty(),
        )
    else:
        result = check(args)
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 1 if result.get("problems") else 0
