"""What the verbs share: reading texts and models, printing, progress."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bagformer.assets import sample_path, tiny_model_path, vocabulary_path

TINY_MODEL, SAMPLE, VOCABULARY = tiny_model_path(), sample_path(), vocabulary_path()
ASSETS = SAMPLE.parent

# A bar that would be over before it could be read is not drawn.
_BAR_DELAY_S = 1.0


class CommandError(Exception):
    """A failure with a message for the user. ``code`` is the exit code: 2 bad input, 1 failed."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def up_to(most: int) -> Callable[[str], int]:
    """argparse type: an int from 1 to ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = 0
        if not 1 <= value <= most:
            shown = text if len(text) <= 40 else text[:40] + "..."
            raise argparse.ArgumentTypeError(
                f"expected a whole number from 1 to {most}, got {shown!r}"
            )
        return value

    return read


positive = up_to(2**31 - 1)
# OpenMP ends the process where it cannot start as many as it was told to.
threads = up_to(1024)


def barred(bags: Sequence[str]) -> str:
    """Bags with a bar between them; an empty one, which the original's matchers make, is ∅."""
    return "|".join(bag or "∅" for bag in bags)


def print_json(data: Any) -> None:
    """One JSON object on standard output, in UTF-8, without NaN."""
    print(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False))


def note(args: Any, message: str) -> None:
    """A remark on standard error, unless --quiet."""
    if not args.quiet:
        print(message, file=sys.stderr)


def note_left_out(args: Any, report: dict[str, Any]) -> None:
    """What --skip-errors left out: how many of each kind, and which."""
    if report["skipped"]:
        names = " ".join(report["left_out"])
        note(args, f"bagformer {args.verb}: left out {report['skipped']} {names}")


def note_shipped_model(args: Any) -> None:
    """Pictures of one's own without --model: what the ranking is worth."""
    if args.model is None:
        note(
            args, f"bagformer {args.verb}: the shipped model knows drawings of icons only (--model)"
        )


def working(args: Any, message: str) -> None:
    """Tell someone who sits at a terminal what takes its time."""
    if not args.quiet and sys.stderr.isatty():
        print(f"bagformer {args.verb}: {message} ...", file=sys.stderr)


def bar(args: Any, total: int | None, what: str, unit: str) -> tqdm:
    """A progress bar on standard error: for terminals only, and not with --quiet."""
    hidden = args.quiet or not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, disable=hidden, delay=_BAR_DELAY_S, leave=False)


def decode_argument(text: str, name: str = "TEXT") -> str:
    """The Unicode text of a command-line argument, whatever encoding the locale claimed.

    Python decodes arguments by the locale and keeps undecodable bytes as lone surrogates; the bytes
    are read as UTF-8 instead. Raises CommandError where they are none.
    """
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        return text
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name}: not UTF-8 at byte {error.start}: {raw[:40]!r}") from error


def _stdin_lines() -> Iterator[str]:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    for number, line in enumerate(stream, 1):
        try:
            yield line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(f"<stdin>:{number}: not UTF-8: {error}") from error


def texts_from(arguments: Sequence[str]) -> Iterable[str]:
    """The texts given as arguments or, where there are none, the lines of standard input."""
    if arguments:
        return [decode_argument(text) for text in arguments]
    return _stdin_lines()


def load_processor(folder: Path) -> Any:
    """The processor of a model folder. Raises CommandError naming the folder and what is wrong."""
    return _load(folder, "BagFormerProcessor", "processor_config.json")


def load_model(folder: Path) -> Any:
    """The model of a folder, for inference. Raises CommandError naming the folder and the fault."""
    return _load(folder, "BagFormerForRetrieval", "config.json").eval()


def _load(folder: Path, class_name: str, file: str) -> Any:
    # a folder that is missing must never be taken for the name of a model on a hub
    if not (folder / file).is_file():
        raise CommandError(f"--model: {folder} is no BagFormer model folder: it has no {file}")
    from transformers.utils import logging

    import bagformer

    logging.disable_progress_bar()
    try:
        return getattr(bagformer, class_name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise CommandError(f"--model: {folder} cannot be loaded: {error}") from error


def set_threads(n_threads: int | None) -> None:
    """Limit the threads of PyTorch and of the operators, where a number is given."""
    if n_threads is not None:
        import torch

        torch.set_num_threads(n_threads)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of a model (default: the small one that ships with bagformer)",
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="pictures a batch (default 32)"
    )
