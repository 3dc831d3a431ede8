"""Evaluate a model on queries and pictures.

    bagformer evaluate MODEL DATA --k-test 256
    bagformer evaluate MODEL DATA --split test --submission predictions.jsonl
    bagformer evaluate MODEL --queries q.jsonl --images i.tsv --directions t2i --json
    bagformer evaluate MODEL valid.parquet --column text=caption

DATA is a folder in MUGE's layout, a folder that datasets' save_to_disk made, .parquet files, or
.tar shards of WebDataset (docs/training.md).
recall ranks by the bags' scores; with --k-test K the matching head re-orders the K best of each:
rank by its logit, merge by logit + score. t2i is text to image, i2t image to text; per cent.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bagformer.cli._common import (
    CommandError,
    load_model,
    load_processor,
    note,
    positive,
    print_json,
    set_threads,
    threads,
    up_to,
)
from bagformer.cli._sources import add_source_arguments, columns_of

DIRECTIONS = {"both": "both", "t2i": "text_to_image", "i2t": "image_to_text"}
KINDS = ("recall", "rank", "merge")
FORMS = ("muge", "chinese-clip")


def _whole(text: str) -> int:
    return 0 if text == "0" else up_to(2**31 - 1)(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of a model")
    add("data", nargs="*", metavar="DATA", help="a folder, .parquet files or .tar shards")
    add_source_arguments(parser)
    add("--queries", type=Path, metavar="FILE", help="jsonl of queries, in place of DATA's")
    add("--images", type=Path, metavar="FILE", help="tsv of pictures, in place of DATA's")
    add(
        "--protocol",
        choices=("auto", "original", "corrected"),
        default="auto",
        help="default auto: the model's own",
    )
    add("--dictionary", type=Path, metavar="FILE", help="entities, needed to change the protocol")
    add(
        "--k-test",
        type=_whole,
        default=0,
        metavar="K",
        help="candidates that the matching head re-orders (default 0: none)",
    )
    add("--directions", choices=tuple(DIRECTIONS), default="both", help="default both")
    add("--submission", type=Path, metavar="FILE", help="write the best ten pictures of each query")
    add("--submission-format", choices=FORMS, default="muge", help="default muge")
    add(
        "--submission-kind",
        choices=KINDS,
        help="ranking that is written (default recall, with --k-test merge)",
    )
    add("--batch-size", type=positive, default=64, metavar="N", help="default 64")
    add("--workers", type=_whole, default=0, metavar="N", help="processes that read pictures")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--threads", type=threads, metavar="N", help="CPU threads (default: all)")
    add(
        "--store-dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the picture tokens kept for --k-test (default float16)",
    )
    add(
        "--spill", type=Path, metavar="DIR", help="keep those tokens in a file there, not in memory"
    )
    add("--skip-errors", action="store_true", help="leave broken lines out and count them")


def choose_device(name: str | None) -> Any:
    """The device ``name``, or the first GPU, or the CPU. Raises CommandError."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used here: {first}") from error
    return device


def _check(args: argparse.Namespace) -> None:
    for name, file in (("MODEL", "config.json"), ("MODEL", "processor_config.json")):
        if not (args.model / file).is_file():
            hint = "; bagformer convert makes a folder of a .pth" if args.model.is_file() else ""
            raise CommandError(f"{name}: {args.model} is no model folder: it has no {file}{hint}")
    if not args.data and (args.queries is None or args.images is None):
        raise CommandError("give DATA, or both --queries and --images")
    if args.submission is not None:
        kind = args.submission_kind or ("merge" if args.k_test else "recall")
        if kind != "recall" and not args.k_test:
            raise CommandError(f"--submission-kind {kind} needs --k-test")
        if args.directions == "i2t":
            raise CommandError("--submission needs --directions both or t2i")
        if not args.submission.resolve().parent.is_dir() or args.submission.is_dir():
            raise CommandError(f"--submission: {args.submission} is no place for a file")
        args.submission_kind = kind


def _source(args: argparse.Namespace) -> Any:
    from bagformer.data.sources import Source
    from bagformer.evaluation.sets import find_set

    if args.queries is not None and args.images is not None:
        found = Source("muge", (args.queries,), args.images)
    else:
        found = find_set(args.data, args.split, args.source, columns_of(args.columns))
        if found.kind == "muge":
            queries = args.queries or found.files[0]
            found = Source("muge", (queries,), args.images or found.images)
        elif args.queries is not None or args.images is not None:
            raise CommandError(f"--queries and --images are for muge, and DATA is {found.kind}")
    if found.kind == "muge":
        for name, path in (("--queries", found.files[0]), ("--images", found.images)):
            if path is None or not path.is_file():
                raise CommandError(f"{name}: there is no file {path}")
    return found


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints."""
    import sys

    from bagformer.evaluation import evaluate as run_evaluation
    from bagformer.evaluation import with_protocol
    from bagformer.evaluation.sets import read_set
    from bagformer.evaluation.submission import write_submission

    device = choose_device(args.device)
    source = _source(args)
    dataset = read_set(source, on_error="skip" if args.skip_errors else "raise")
    model, processor = load_model(args.model), load_processor(args.model)
    own = model.config.protocol
    if args.dictionary is not None and args.protocol in ("auto", own):
        note(args, f"bagformer evaluate: --dictionary is not read: the protocol stays {own}")
    model, processor = with_protocol(model, processor, args.protocol, args.dictionary)
    started = time.perf_counter()
    report = run_evaluation(
        model.to(device),
        processor,
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        k_test=args.k_test,
        progress=not args.quiet and sys.stderr.isatty(),
        directions=DIRECTIONS[args.directions],
        store_dtype=args.store_dtype,
        spill=args.spill,
    )
    result = {
        "model": str(args.model),
        "source": source.kind,
        "queries": ", ".join(map(str, source.files)),
        "images": None if source.images is None else str(source.images),
        **report.to_dict(),
        "model_protocol": own,
        "skipped": dict(dataset.skipped),
        "device": str(device),
        "wall_s": round(time.perf_counter() - started, 3),
        "submission": None,
    }
    if args.submission is not None:
        rows = write_submission(
            args.submission, report, args.submission_kind, args.submission_format
        )
        result["submission"] = {
            "file": str(args.submission),
            "format": args.submission_format,
            "kind": args.submission_kind,
            "rows": rows,
        }
    return result


def _print(result: dict[str, Any]) -> None:
    counts, metrics = result["counts"], result["metrics"]
    print(
        f"{counts['queries']} queries, {counts['images']} pictures, protocol {result['protocol']}"
    )
    if not metrics:
        print("recall: not measured, the queries do not say which pictures are right")
    ends = ("r1", "r5", "r10", "mean")
    for kind in KINDS:
        for direction in ("t2i", "i2t"):
            values = [metrics.get(f"{kind}_{direction}_{end}") for end in ends]
            if values[0] is not None:
                told = "  ".join(
                    f"{end} {value:6.2f}" for end, value in zip(ends, values, strict=True)
                )
                print(f"  {kind:<6} {direction}  {told}")
    for name, text in (
        ("queries_without_images", "queries without pictures"),
        ("images_without_queries", "pictures without queries"),
    ):
        if metrics and counts[name]:
            how = "count as misses" if result["protocol"] == "original" else "are left out"
            print(f"  {counts[name]} {text} {how}")
    if result["submission"]:
        print(f"wrote {result['submission']['rows']} rows into {result['submission']['file']}")


def run(args: argparse.Namespace) -> int:
    _check(args)
    set_threads(args.threads)
    result = evaluate(args)
    if args.json:
        print_json(result)
    else:
        _print(result)
    if result["skipped"]:
        note(args, f"bagformer evaluate: left out {result['skipped']}")
    return 0
