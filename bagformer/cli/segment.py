"""Cut texts into bags.

    bagformer segment 高领毛衣 女士靴子
    bagformer segment --dictionary words.txt --matcher original < titles.txt

Each text is cut on its own and printed with a bar between bags; without TEXT the lines of standard
input are read. An empty bag, which the original's matchers make, is shown as ∅.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bagformer.cli._common import (
    TINY_MODEL,
    VOCABULARY,
    CommandError,
    barred,
    load_processor,
    note,
    print_json,
    texts_from,
    up_to,
    working,
)

MATCHERS = ("leftmost_longest", "original", "backward_max")
_LINES_AT_ONCE = 256
# Rows are padded to the length asked for, so it decides how much memory they take.
_MOST_TOKENS = 32768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts (default: standard input)")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="use the dictionary and vocabulary of this model"
    )
    parser.add_argument("--dictionary", type=Path, metavar="FILE", help="entities, one a line")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        help="vocab.txt of a BERT model (default: bert-base-chinese)",
    )
    parser.add_argument("--matcher", choices=MATCHERS, help="how entities are found")
    parser.add_argument(
        "--max-length",
        type=up_to(_MOST_TOKENS),
        metavar="N",
        help="tokens of a text, [CLS] and [SEP] included",
    )
    parser.add_argument(
        "--all", action="store_true", help="show the bags that do not count too ([CLS], [SEP], ...)"
    )


def _processor(args: argparse.Namespace) -> Any:
    if args.dictionary is None and args.vocabulary is None:
        if args.matcher is not None:
            raise CommandError("--matcher needs --dictionary: that of a model is already built")
        return load_processor(args.model or TINY_MODEL)
    if args.model is not None:
        raise CommandError("give either --model or --dictionary")
    if args.dictionary is None:
        raise CommandError("--dictionary is missing: a vocabulary alone has no entities")
    vocabulary = args.vocabulary or VOCABULARY
    for path in (args.dictionary, vocabulary):
        if not path.is_file():
            raise CommandError(f"there is no file {path}")
    from transformers import BertTokenizer

    from bagformer.models.configuration_bagformer import BagFormerConfig
    from bagformer.models.processing_bagformer import BagFormerProcessor

    matcher = args.matcher or MATCHERS[0]
    protocol = "corrected" if matcher == MATCHERS[0] else "original"
    config = BagFormerConfig(protocol=protocol, matcher=matcher)
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    working(args, f"reading {args.dictionary}")
    processor = BagFormerProcessor.from_config(config, tokenizer, args.dictionary)
    if not args.quiet and sys.stderr.isatty():
        print(processor.segmenter.report, file=sys.stderr)
    return processor


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    source = iter(texts)
    while batch := list(islice(source, size)):
        yield batch


def _cut(processor: Any, batch: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    inputs = processor(text=batch, max_length=args.max_length, return_truncated=True)
    named = processor.bag_texts(batch, counted_only=not args.all, max_length=args.max_length)
    for bags in named:
        while args.all and bags and bags[-1] == "[PAD]":
            bags.pop()
    return [
        {"text": text, "bags": bags, "truncated": cut}
        for text, bags, cut in zip(batch, named, inputs["truncated"].tolist(), strict=True)
    ]


def run(args: argparse.Namespace) -> int:
    if not args.text and not args.quiet and sys.stdin is not None and sys.stdin.isatty():
        print("reading texts from standard input, one a line", file=sys.stderr)
    texts = texts_from(args.text)
    processor = _processor(args)
    segmenter = processor.segmenter
    # The original's matchers let the texts of a batch cut each other's bags; alone, none does.
    invariant = segmenter.matcher == MATCHERS[0]
    size = _LINES_AT_ONCE if invariant and (args.text or not sys.stdin.isatty()) else 1
    rows: list[dict[str, Any]] = []
    truncated = 0
    for batch in _batches(texts, size):
        found = _cut(processor, batch, args)
        truncated += sum(row["truncated"] for row in found)
        if args.json:
            rows += found
        else:
            for row in found:
                print(barred(row["bags"]))
            sys.stdout.flush()
    if args.json:
        print_json({"matcher": segmenter.matcher, "entities": len(segmenter), "texts": rows})
    if truncated:
        limit = args.max_length or processor.max_text_length
        note(args, f"bagformer segment: {truncated} texts were cut off at {limit} tokens")
    return 0
