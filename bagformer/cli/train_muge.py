"""The original's train_muge.py: the same flags, files and formats.

    bagformer train-muge --config config_muge.yaml --checkpoint checkpoint_best.pth \\
        --output_dir OUT --evaluate --testing

Without --evaluate it trains from the checkpoint by the original's recipe: OUT/train.log has a line
an epoch, OUT/best and OUT/last are model folders, --resume goes on after the last whole epoch.
With --evaluate the checkpoint is evaluated on the config's valid files (OUT/eval.log). With
--testing the best ten pictures of each query of the test files are written (OUT/recall_t2i.jsonl,
rank_t2i.jsonl, merge_t2i.jsonl). OUT/config.yaml is always written. The checkpoint is a .pth of the
original, from which only tensors are read, or a folder that bagformer convert wrote.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bagformer.cli._common import CommandError, note, print_json, working

INTERACTIONS = ("bagwise", "tokenwise", "cls_token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/config_muge.yaml"), metavar="FILE")
    add("--output_dir", type=Path, default=Path("output/retrieval_muge"), metavar="DIR")
    add(
        "--checkpoint",
        default="pretrained_model/pretrained_checkpoint.pth",
        metavar="PATH",
        help=".pth of the original or a model folder (default: %(default)s)",
    )
    add(
        "--text_encoder",
        default="bert-base-chinese",
        metavar="NAME",
        help="folder with its vocab.txt, or bert-base-chinese, whose vocabulary ships",
    )
    add("--interaction", choices=INTERACTIONS, help="default: the folder's own; of a .pth bagwise")
    add("--evaluate", action="store_true", help="evaluate, and do not train")
    add("--testing", action="store_true", help="write predictions for the test files")
    add("--resume", action="store_true", help="go on with an interrupted training")
    add("--device", metavar="NAME", help="cpu, cuda (default: cuda where there is one)")
    add("--seed", type=int, default=42, metavar="N", help="default 42")
    add(
        "--protocol",
        choices=("auto", "original", "corrected"),
        default="auto",
        help="default auto: the checkpoint's own, which of a .pth is original",
    )


def _check(args: argparse.Namespace) -> None:
    if args.evaluate and args.resume:
        raise CommandError("--resume goes on with a training, and --evaluate does not train")
    if not args.checkpoint:
        raise CommandError(
            "train-muge needs a --checkpoint; bagformer train can start from nothing"
        )
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise CommandError(f"--output_dir: {args.output_dir} is a file, a folder is needed")


def _load(args: argparse.Namespace, config: dict[str, Any], *splits: str) -> Any:
    """The checkpoint, once the files of the splits are known to be there."""
    from bagformer.evaluation.muge import load_checkpoint
    from bagformer.evaluation.muge_config import files_of

    for split in (*splits, "test") if args.testing else splits:
        files_of(config, split)
    working(args, f"reading {args.checkpoint}")
    loaded = load_checkpoint(
        args.checkpoint, config, args.text_encoder, args.interaction, args.protocol
    )
    for remark in loaded.notes:
        note(args, f"bagformer train-muge: {remark}")
    return loaded


def train(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Train by the original's recipe; gives what ``--json`` prints."""
    from bagformer.cli.evaluate import choose_device
    from bagformer.training.checkpoint import Checkpoints
    from bagformer.training.muge import MugeRun

    device = choose_device(args.device)
    if not args.resume and Checkpoints(args.output_dir, keep=1).newest() is not None:
        raise CommandError(
            f"--output_dir: {args.output_dir} holds a training already: go on with it by --resume, "
            "or give another folder"
        )
    loaded = _load(args, config, "train", "valid")
    progress = not args.quiet and sys.stderr.isatty()
    run = MugeRun(
        loaded, config, args.checkpoint, args.output_dir, args.seed, device, progress=progress
    )
    if args.resume:
        note(args, f"bagformer train-muge: going on with epoch {run.resume()}")
    result = run.fit()
    files = ["config.yaml", "train.log", "last", "best"]
    counts: dict[str, int] = {}
    if args.testing:
        report, written = run.predict()
        files, counts = files + written, report.counts
    return {
        "output_dir": str(args.output_dir),
        "files": [name for name in files if (args.output_dir / name).exists()],
        "protocol": loaded.model.config.protocol,
        "interaction": loaded.model.config.interaction,
        "counts": counts,
        **result,
    }


def evaluate(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Evaluate and write the original's files; gives what ``--json`` prints."""
    import torch

    from bagformer.cli.evaluate import choose_device
    from bagformer.evaluation.muge import evaluate_split, log_evaluation, write_predictions
    from bagformer.evaluation.muge_config import write_config

    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    loaded = _load(args, config, "valid")
    loaded.model.to(device)
    progress = not args.quiet and sys.stderr.isatty()
    report = evaluate_split(loaded, config, "valid", progress)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, args.output_dir / "config.yaml")
    values = log_evaluation(report, args.output_dir)
    files = ["config.yaml", "eval.log"]
    if args.testing:
        tested = evaluate_split(loaded, config, "test", progress)
        files += write_predictions(tested, args.output_dir)
    return {
        "output_dir": str(args.output_dir),
        "files": files,
        "protocol": report.protocol,
        "interaction": loaded.model.config.interaction,
        "counts": report.counts,
        "metrics": values,
    }


def run(args: argparse.Namespace) -> int:
    _check(args)
    from transformers.utils import logging

    from bagformer.evaluation.muge_config import read_config, unknown_keys

    logging.disable_progress_bar()
    config = read_config(args.config)
    if unused := unknown_keys(args.config, config):
        note(args, f"bagformer train-muge: {args.config}: nothing reads {', '.join(unused)}")
    result = evaluate(args, config) if args.evaluate else train(args, config)
    if args.json:
        print_json(result)
        return 0
    for name, value in result["metrics"].items():
        print(f"{name}: {value}")
    print(f"wrote {', '.join(result['files'])} into {result['output_dir']}")
    return 0
