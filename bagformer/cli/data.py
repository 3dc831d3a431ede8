"""Build or check a data set in MUGE's format.

    bagformer data iconpark OUT
    bagformer data check queries.jsonl images.tsv

iconpark: real drawings with Chinese titles (Apache-2.0), fetched with npm, drawn by resvg.
check: reads every line and decodes every picture; exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bagformer.cli._common import bar, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("iconpark", help="build the IconPark set in folder OUT")
    build.add_argument("out", type=Path, metavar="OUT")
    build.add_argument(
        "--tarball", type=Path, metavar="FILE", help="the npm package, where it is already here"
    )
    build.add_argument("--force", action="store_true", help="replace what is in OUT")
    check = actions.add_parser("check", help="read a whole set and count what is wrong with it")
    check.add_argument("queries", type=Path, metavar="QUERIES.jsonl")
    check.add_argument("images", type=Path, metavar="IMAGES.tsv")
    for action in (build, check):
        # so that the options may stand behind the action too
        for flag in ("--json", "--quiet", "--debug"):
            action.add_argument(
                flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def _first_error(read: Any) -> str | None:
    from bagformer.data.muge import MugeError

    try:
        read("raise")
    except MugeError as error:
        return str(error)
    return None


def _check_pictures(args: argparse.Namespace, images: Any, problems: Counter[str]) -> list[str]:
    from bagformer.data.muge import MugeError

    examples: list[str] = []
    with bar(args, len(images), "decode pictures", "picture") as progress:
        for key in images:
            try:
                images[key]
            except MugeError as error:
                if not problems[f"picture: {error.reason}"]:
                    examples.append(str(error))
                problems[f"picture: {error.reason}"] += 1
            progress.update()
    return examples


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Counts of what a set holds and of what is wrong with it, with the first example of a kind."""
    from bagformer.data.muge import MugeDataset, MugeImages, read_queries

    problems: Counter[str] = Counter()
    images = MugeImages(args.images, on_error="skip")
    queries = read_queries(args.queries, on_error="skip")
    data = MugeDataset(queries, images, on_error="skip")
    for kind, counts in (("picture", images), ("query", queries), ("pair", data)):
        problems.update({f"{kind}: {reason}": n for reason, n in counts.skipped.items()})
    readers = (
        (images, lambda mode: MugeImages(args.images, on_error=mode)),
        (queries, lambda mode: read_queries(args.queries, on_error=mode)),
        (data, lambda mode: MugeDataset(queries, images, on_error=mode)),
    )
    found = [_first_error(read) for counts, read in readers if counts.skipped]
    examples = [text for text in found if text]
    examples += _check_pictures(args, images, problems)
    wanted = {item for query in data.queries for item in query.item_ids}
    return {
        "pictures": len(images),
        "queries": len(data.queries),
        "pairs": len(data),
        "pictures_without_query": len(images) - len(wanted),
        "repeated_query_texts": len(data.queries) - len({query.text for query in data.queries}),
        "problems": dict(sorted(problems.items())),
        "examples": examples,
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
    for example in result.get("examples", ()):
        print(example)


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
