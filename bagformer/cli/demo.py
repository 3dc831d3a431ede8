"""Rank pictures for Chinese queries by bag-wise late interaction, and write a page about it.

    bagformer demo
    bagformer demo --images photos/ --queries queries.txt --out report/

Without arguments: the small model and the sample of drawings that ship with the package; nothing is
downloaded. Writes demo.html (one file, for any browser) and demo.json (every figure shown) into
--out. Your own pictures are files, folders, or a .tsv in MUGE's format; your queries a text file
with one a line, or a .jsonl in MUGE's format, whose item_ids name pictures and give the recall.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bagformer.cli._common import (
    TINY_MODEL,
    CommandError,
    add_model_argument,
    bar,
    barred,
    load_model,
    load_processor,
    note,
    note_left_out,
    note_shipped_model,
    positive,
    print_json,
    set_threads,
)

MOST_SHOWN = 12


def _shown(text: str) -> int:
    value = positive(text)
    if value > MOST_SHOWN:
        raise argparse.ArgumentTypeError(f"a page shows at most {MOST_SHOWN} queries, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="your pictures: files, folders, a .tsv",
    )
    parser.add_argument("--queries", type=Path, metavar="FILE", help="your queries: .txt or .jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)"
    )
    parser.add_argument(
        "--show", type=_shown, default=8, metavar="N", help="queries on the page (default 8)"
    )
    add_model_argument(parser)
    parser.add_argument(
        "--skip-errors", action="store_true", help="leave broken pictures and lines out, and count"
    )


def _encode(args: argparse.Namespace, inputs: Any, model: Any, processor: Any, stages: Any) -> Any:
    from bagformer.retrieval.encode import encode_images, encode_texts

    with bar(args, len(inputs.texts), "read queries", "query") as progress:
        texts = encode_texts(
            model,
            processor,
            inputs.texts,
            with_names=True,
            stages=stages,
            progress=progress.update,
        )
    with bar(args, len(inputs.gallery), "encode pictures", "picture") as progress:
        images = encode_images(
            model,
            processor,
            inputs.gallery.pictures(),
            batch_size=args.batch_size,
            stages=stages,
            progress=progress.update,
        )
    return texts, images


def _warm_up(inputs: Any, model: Any, processor: Any) -> None:
    """Run one query and one blank picture through, so that no stage is charged for a first call."""
    from PIL import Image

    from bagformer.retrieval.encode import Stages, encode_images, encode_texts

    texts = encode_texts(model, processor, inputs.texts[:1])
    images = encode_images(model, processor, [Image.new("RGB", (8, 8))])
    _score(model, texts, images, 1, Stages())


def _score(model: Any, texts: Any, images: Any, k: int, stages: Any) -> tuple[Any, Any]:
    """Scores of both directions, and the best ``k`` pictures of each text by the op made for it."""
    from bagformer.ops.maxsim import maxsim
    from bagformer.ops.maxsim_topk import maxsim_topk

    options = {"text_mask": texts.mask, **model.config.scoring}
    with stages.time("score"):
        scores = maxsim(texts.features, images.features, **options)
    with stages.time("topk"):
        best = maxsim_topk(texts.features, images.features, k, **options)
    return scores, best


def _unseen_recall(inputs: Any, model: Any, processor: Any, images: Any) -> dict[str, Any] | None:
    """Recall of the sample's harder queries, which are neither shown nor timed."""
    if inputs.unseen is None:
        return None
    from bagformer.ops.maxsim import maxsim
    from bagformer.retrieval.encode import encode_texts
    from bagformer.retrieval.metrics import first_relevant_ranks, recall_at

    texts = encode_texts(model, processor, inputs.unseen.texts)
    scores: Any = maxsim(
        texts.features,
        images.features,
        text_mask=texts.mask,
        **model.config.scoring,
        directions="text_to_image",
    )
    ranks = first_relevant_ranks(scores.text_to_image, inputs.unseen.relevant() or [])
    return {"queries": len(ranks), **recall_at(ranks)}


def _check_out(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out: {folder} is a file, a folder is needed")
    folder.mkdir(parents=True, exist_ok=True)


def _print_report(report: dict[str, Any], paths: list[Path]) -> None:
    print(report["about"]["title"])
    recall = report["recall"]
    if recall is None:
        print("recall: not measured, the queries do not say which pictures are right")
    else:
        for key, label in (
            ("text_to_image", "text -> picture"),
            ("image_to_text", "picture -> text"),
        ):
            figures = "  ".join(f"{k} {v:5.1f} %" for k, v in recall[key].items() if k != "mean")
            print(f"  {label:<16} {figures}")
        if recall["unseen"]:
            figures = "  ".join(f"{k} {v:5.1f} %" for k, v in recall["unseen"].items() if "@" in k)
            print(f"  {'unseen texts':<16} {figures}")
        print(f"  ({recall['note']})")
    print("time")
    for stage in report["stages"]:
        print(f"  {stage['name']:<16} {stage['ms']:>9.1f} ms   {stage['rate']}")
    print("queries")
    for query in report["queries"]:
        top = "  ".join(f"{entry['picture']} {entry['score']:.2f}" for entry in query["top"][:3])
        rank = query["first_relevant_rank"]
        told = "" if rank is None else f"   first right picture: rank {rank}"
        print(f"  {barred(query['bags'])}   {top}{told}")
    print("wrote " + " and ".join(map(str, paths)))


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    from bagformer.cli._demo_inputs import read_inputs

    inputs = read_inputs(args)
    _check_out(args.out)
    set_threads(args.threads)
    from bagformer.cli._demo_report import Run, build_report
    from bagformer.data.images import transparency_of
    from bagformer.data.records import write_whole
    from bagformer.retrieval.encode import Stages
    from bagformer.retrieval.page import render_page

    stages = Stages()
    folder = args.model or TINY_MODEL
    with stages.time("load"):
        model, processor = load_model(folder), load_processor(folder)
    if model.config.interaction != "bagwise":
        raise CommandError(
            f"--model: the page explains bags, and {folder} has "
            f"interaction={model.config.interaction!r}; `bagformer score` ranks with it"
        )
    inputs.gallery.transparency = transparency_of(model.config.protocol)
    _warm_up(inputs, model, processor)
    texts, images = _encode(args, inputs, model, processor, stages)
    scores, best = _score(model, texts, images, min(8, len(inputs.gallery)), stages)
    unseen = _unseen_recall(inputs, model, processor, images)
    outcome = Run(inputs, model, processor, texts, images, scores, best, stages, unseen)
    report, pictures = build_report(outcome, args.show)
    shipped = args.model is None
    report["facts"]["Model folder"] = "shipped with bagformer" if shipped else str(folder)
    report["wall_s"] = round(time.perf_counter() - started, 3)
    page = render_page(report, pictures)
    figures = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    paths = [args.out / "demo.html", args.out / "demo.json"]
    for path, text in zip(paths, (page, figures), strict=True):
        write_whole(path, text)
    if args.json:
        print_json(report)
    else:
        _print_report(report, paths)
    truncated = int(texts.truncated.sum())
    if truncated:
        limit = processor.max_text_length
        note(args, f"bagformer demo: {truncated} queries were cut off at {limit} tokens")
    note_left_out(args, report)
    if args.images is not None:
        note_shipped_model(args)
    return 0
