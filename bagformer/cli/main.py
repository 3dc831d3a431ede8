"""The command ``bagformer``: one verb per module, one way of failing."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from bagformer import __version__
from bagformer.cli._common import CommandError

VERBS = {
    "demo": "rank the shipped pictures (or yours) for Chinese queries and write a page about it",
    "segment": "cut texts into bags",
    "score": "score texts against pictures, both ways",
    "evaluate": "measure recall, re-rank, and write predictions for a leaderboard",
    "train-muge": "evaluate a checkpoint with the flags and files of the original's train_muge.py",
    "convert": "turn a checkpoint of the original code into a model folder",
    "train": "train a model on your own texts and pictures",
    "plot-log": "draw the curves of training logs",
    "data": "build or check a data set in MUGE's format",
    "doctor": "say what is installed and what each operator would run on",
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141

# What a caller can put right; anything else is a failed run.
_BAD_INPUT = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bagformer",
        description="Bag-wise late interaction between Chinese texts and pictures.",
    )
    parser.add_argument("--version", action="version", version=f"bagformer {__version__}")
    common = _Parser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    common.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, summary in VERBS.items():
        module = importlib.import_module(f"bagformer.cli.{verb.replace('-', '_')}")
        described = argparse.RawDescriptionHelpFormatter
        sub = verbs.add_parser(
            verb,
            help=summary,
            description=module.__doc__,
            parents=[common],
            formatter_class=described,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _open_streams() -> None:
    """Python has None in place of a standard stream that was closed (``>&-``)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _speak_utf8() -> None:
    """Chinese goes in and out whatever LANG says; what cannot be written is escaped, not fatal."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="backslashreplace")


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def _fail(args: Any, code: int, message: str) -> int:
    if getattr(args, "debug", False):
        traceback.print_exc()
    print(f"bagformer {args.verb}: error: {message}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    0 success, 1 a run that failed, 2 wrong usage or bad input, 130 interrupted, 141 the reader of
    the output went away. Errors are one line on standard error; ``--debug`` adds the traceback.
    """
    _open_streams()
    _speak_utf8()
    try:
        args = _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return int(code or 0)
    except CommandError as error:
        return _fail(args, error.code, _one_line(error))
    except KeyboardInterrupt:
        return _fail(args, EXIT_INTERRUPTED, "interrupted")
    except BrokenPipeError:
        # the interpreter flushes stdout once more on its way out; let that go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except _BAD_INPUT as error:
        return _fail(args, EXIT_USAGE, _one_line(error))
    except Exception as error:
        kind = "" if isinstance(error, (RuntimeError, OSError)) else f"{type(error).__name__}: "
        return _fail(args, EXIT_FAILED, f"{kind}{_one_line(error)}")


if __name__ == "__main__":
    sys.exit(main())
