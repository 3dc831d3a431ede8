"""Train a model on pairs of texts and pictures in MUGE's format.

    bagformer train CONFIG.yaml
    bagformer train CONFIG.yaml --set optim.lr=2e-5 --set output=runs/second
    bagformer train CONFIG.yaml --resume
    torchrun --nproc-per-node 2 -m bagformer.cli train CONFIG.yaml

CONFIG is a YAML file (docs/training.md), or the original code's config_muge.yaml as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bagformer.cli._common import CommandError, note, print_json, working


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change one key of the configuration; C is read as YAML",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in the output folder, if there is one",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the whole configuration and stop"
    )


def _print(result: dict[str, Any]) -> None:
    ended = "stopped by a signal" if result["stopped"] else "done"
    print(f"{ended} at step {result['step']}; the model is {result['model']}")
    if result["best"]["value"] is not None:
        best = result["best"]
        print(f"best: {result['metric']} {best['value']:.2f}, step {best['step']}")


def run(args: argparse.Namespace) -> int:
    from bagformer.training.config_file import dump, load, to_dict

    if not args.config.is_file():
        raise CommandError(f"CONFIG: there is no file {args.config}")
    config, remarks = load(args.config, args.changes)
    first = int(os.environ.get("RANK", 0)) == 0
    for remark in remarks if first else ():
        note(args, f"bagformer train: {remark}")
    if args.dry_run:
        if args.json:
            print_json(to_dict(config))
        else:
            print(dump(config), end="")
        return 0
    working(args, "getting ready")
    from transformers.utils import logging

    from bagformer.training.checkpoint import BEST, LAST, CheckpointError
    from bagformer.training.loop import NonFiniteError, train

    logging.disable_progress_bar()
    bar = not args.quiet and sys.stderr.isatty() and first
    try:
        result = train(config, resume=args.resume, progress=bar)
    except (NonFiniteError, CheckpointError) as error:
        raise CommandError(str(error), code=1) from error
    output = Path(str(config.output))
    result |= {"output": str(output), "metric": config.valid.metric}
    result["model"] = str(output / (BEST if (output / BEST).exists() else LAST))
    if first:
        if args.json:
            print_json(result)
        else:
            _print(result)
    return 0
