"""Turn a checkpoint of the original code into a model folder.

    bagformer convert checkpoint_best.pth OUT --vocabulary vocab.txt --dictionary entities.txt

Only tensors are read (weights_only); nothing in the file is executed. The folder loads with
BagFormerForRetrieval.from_pretrained and, given vocabulary and dictionary, holds a processor too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bagformer.cli._common import CommandError, positive, print_json, working

_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help=".pth of the original, or .safetensors"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write: new, or empty")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="PATH",
        help="vocab.txt of its BERT, or a tokenizer's folder",
    )
    parser.add_argument("--dictionary", type=Path, metavar="FILE", help="its entities, one a line")
    parser.add_argument("--bert-config", type=Path, metavar="FILE", help="its BERT's config.json")
    for side, otherwise in (("vision", "width / 64"), ("text", "as --bert-config, or width / 64")):
        parser.add_argument(
            f"--{side}-heads",
            type=positive,
            metavar="N",
            help=f"attention heads of the {side} encoder (default: {otherwise})",
        )
    parser.add_argument(
        "--image-size", type=positive, metavar="PX", help="picture size (default: the checkpoint's)"
    )
    parser.add_argument(
        "--force", action="store_true", help="leave out tensors that the model does not know"
    )


def _check(args: argparse.Namespace) -> None:
    named = {
        "CHECKPOINT": args.checkpoint,
        "--vocabulary": args.vocabulary,
        "--dictionary": args.dictionary,
        "--bert-config": args.bert_config,
    }
    for name, path in named.items():
        if path is not None and not path.exists():
            raise CommandError(f"{name}: there is no {path}")
    if args.dictionary is not None and args.vocabulary is None:
        raise CommandError("--vocabulary is missing: a dictionary is read with a vocabulary")


def _print(result: dict[str, Any]) -> None:
    for name in ("dropped", "unexpected"):
        names = result[name]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = f": {', '.join(names[:_LISTED])}{more}" if names else ""
        print(f"{name} {len(names)} tensors{listed}")
    if result["pos_embed"]:
        before, after = result["pos_embed"]
        print(f"resized the position embedding from {before} x {before} to {after} x {after}")
    print(f"wrote {', '.join(result['files'])} into {result['out']}")
    if not result["processor"]:
        print("no processor was written: give --vocabulary and --dictionary for one")


def run(args: argparse.Namespace) -> int:
    _check(args)
    from bagformer.models.conversion import convert_checkpoint

    working(args, f"converting {args.checkpoint}")
    report = convert_checkpoint(
        args.checkpoint,
        args.out,
        tokenizer=args.vocabulary,
        dictionary=args.dictionary,
        bert_config=args.bert_config,
        vision_heads=args.vision_heads,
        text_heads=args.text_heads,
        image_size=args.image_size,
        force=args.force,
    )
    result = {
        "out": str(args.out),
        "files": report.files,
        "dropped": report.dropped,
        "unexpected": report.unexpected,
        "pos_embed": report.pos_embed,
        "processor": args.vocabulary is not None,
    }
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 0
