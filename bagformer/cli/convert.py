"""Turn a checkpoint of the original code into a model folder.

    bagformer convert checkpoint_best.pth OUT --vocabulary vocab.txt --dictionary entities.txt

Only tensors are read (weights_only); nothing in the file is executed. The folder loads with
BagFormerForRetrieval.from_pretrained and, given vocabulary and dictionary, holds a processor too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bagformer.cli._common import positive, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pth of the original")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="vocab.txt of its BERT")
    parser.add_argument("--dictionary", type=Path, metavar="FILE", help="its entities, one a line")
    parser.add_argument("--bert-config", type=Path, metavar="FILE", help="its BERT's config.json")
    parser.add_argument(
        "--vision-heads", type=positive, metavar="N", help="attention heads (default: width / 64)"
    )
    parser.add_argument(
        "--image-size", type=positive, metavar="PX", help="picture size (default: the checkpoint's)"
    )
    parser.add_argument(
        "--force", action="store_true", help="accept unexpected tensors, and replace what is in OUT"
    )


def run(args: argparse.Namespace) -> int:
    from bagformer.models.conversion import convert

    print_json(convert)
    return 0
