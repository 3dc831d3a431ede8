"""Score texts against pictures, both ways.

    bagformer score 高领毛衣 女士靴子 --images photos/
    bagformer score 单肩包 --images a.jpg b.jpg --json

For each text the pictures are ranked by text_to_image, the best patch of each of its bags,
and for each picture the texts by image_to_text, the best bag of each of its patches: summed or
averaged, as the model's config says.
"""

from __future__ import annotations

import argparse
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
    note_left_out,
    note_shipped_model,
    positive,
    print_json,
    set_threads,
    texts_from,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts (default: standard input)")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="picture files, folders (searched through), or one .tsv in MUGE's format",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--top", type=positive, default=10, metavar="K", help="entries of a ranking (default 10)"
    )
    parser.add_argument(
        "--skip-errors", action="store_true", help="leave broken pictures out and count them"
    )


def _ranking(scores: Any, indices: Any, names: list[Any], kind: str) -> list[dict[str, Any]]:
    pairs = zip(scores.tolist(), indices.tolist(), strict=True)
    return [
        {"rank": rank, kind: names[index], "score": score}
        for rank, (score, index) in enumerate(pairs, 1)
    ]


def score(args: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """What ``--json`` prints: rankings of both directions."""
    from bagformer.cli._pictures import Gallery
    from bagformer.data.images import transparency_of
    from bagformer.ops.maxsim import maxsim
    from bagformer.retrieval.encode import encode_images, encode_texts
    from bagformer.retrieval.ranking import best_of

    gallery = Gallery(args.images, args.skip_errors)
    folder = args.model or TINY_MODEL
    model, processor = load_model(folder), load_processor(folder)
    gallery.transparency = transparency_of(model.config.protocol)
    encoded = encode_texts(model, processor, texts, with_names=True)
    with bar(args, len(gallery), "encode pictures", "picture") as progress:
        images = encode_images(
            model,
            processor,
            gallery.pictures(),
            batch_size=args.batch_size,
            progress=progress.update,
        )
    scores: Any = maxsim(
        encoded.features,
        images.features,
        text_mask=encoded.mask,
        **model.config.scoring,
    )
    pictures = best_of(scores.text_to_image, args.top)
    sentences = best_of(scores.image_to_text, args.top)
    return {
        "model": str(folder),
        "texts": [
            {
                "text": text,
                "bags": bags,
                "truncated": cut,
                "ranking": _ranking(
                    pictures.scores[row], pictures.indices[row], gallery.keys, "image"
                ),
            }
            for row, (text, bags, cut) in enumerate(
                zip(texts, encoded.bags, encoded.truncated.tolist(), strict=True)
            )
        ],
        "images": [
            {
                "image": key,
                "ranking": _ranking(sentences.scores[row], sentences.indices[row], texts, "text"),
            }
            for row, key in enumerate(gallery.keys)
        ],
        "skipped": dict(gallery.skipped),
        "left_out": gallery.left_out,
    }


def _print_table(result: dict[str, Any]) -> None:
    for row in result["texts"]:
        print(f"{row['text']}  [{barred(row['bags'])}]")
        for entry in row["ranking"]:
            print(f"{entry['rank']:>5}  {entry['score']:>9.4f}  {entry['image']}")
    if len(result["texts"]) > 1:
        print("\nbest text of each picture")
        for row in result["images"]:
            best = row["ranking"][0]
            print(f"       {best['score']:>9.4f}  {row['image']}  {best['text']}")


def run(args: argparse.Namespace) -> int:
    texts = list(texts_from(args.text))
    if not texts:
        raise CommandError("no texts: give TEXT or lines on standard input")
    set_threads(args.threads)
    result = score(args, texts)
    if args.json:
        print_json(result)
    else:
        _print_table(result)
    note_left_out(args, result)
    note_shipped_model(args)
    return 0
