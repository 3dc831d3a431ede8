"""Draw the curves of training logs: losses above, recall below.

    bagformer plot-log runs/first/log.jsonl runs/second -o curves.svg

LOG is a log.jsonl or the folder it lies in. Needs matplotlib: pip install 'bagformer[plot]'
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from bagformer.cli._common import CommandError, print_json

FORMATS = (".svg", ".png", ".pdf")
_LOG = "log.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.svg"), metavar="FILE")
    parser.add_argument(
        "--loss", default="loss", metavar="NAME", help="the loss that is drawn (default: loss)"
    )
    parser.add_argument(
        "--metrics",
        default="recall_t2i_r1,recall_t2i_r5,recall_t2i_r10",
        metavar="A,B",
        help="metrics of the validation lines (default: recall_t2i_r1, r5 and r10)",
    )


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of a log by kind. Raises CommandError, naming file and line, for what is not a log."""
    file = path / _LOG if path.is_dir() else path
    if not file.is_file():
        raise CommandError(f"LOG: no such file: {file}")
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            kind = row["kind"]
            if not isinstance(kind, str) or type(row["step"]) is not int:
                raise ValueError("kind must be text, step a whole number")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a run that is still writing, or was killed
            raise CommandError(f"{file}:{number}: not a line of a training log") from error
        rows.setdefault(kind, []).append(row)
    if not rows["train"] and not rows["valid"]:
        raise CommandError(f"{file}: no step has been logged yet")
    return rows


def curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one name, as far as they are numbers."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError(
            "plot-log needs matplotlib, which is not installed: pip install 'bagformer[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(logs: dict[str, dict[str, list[dict[str, Any]]]], args: argparse.Namespace) -> int:
    """Write the picture; gives the number of curves."""
    pyplot = _pyplot()
    metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    count = 0
    for label, rows in logs.items():
        steps, values = curve(rows["train"], args.loss)
        if steps:
            upper.plot(steps, values, label=label)
            count += 1
        for name in metrics:
            steps, values = curve(rows["valid"], name)
            if steps:
                lower.plot(steps, values, marker="o", markersize=3, label=f"{label} {name}")
                count += 1
    if not count:
        pyplot.close(figure)
        raise CommandError(f"nothing to draw: no log has {', '.join([args.loss, *metrics])}")
    upper.set_ylabel(args.loss)
    lower.set_ylabel("per cent")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out)
    pyplot.close(figure)
    return count


def run(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in FORMATS:
        raise CommandError(f"--out: expected a name in {', '.join(FORMATS)}, got {args.out}")
    logs: dict[str, Any] = {}
    for path in args.logs:
        label = path.parent.name if path.name == _LOG and path.parent.name else path.stem
        while label in logs:
            label += "'"
        logs[label] = read_log(path)
    curves = draw(logs, args)
    result = {"out": str(args.out), "logs": len(logs), "curves": curves}
    if args.json:
        print_json(result)
    else:
        print(f"{args.out}: {curves} curves of {len(logs)} logs")
    return 0
