"""Draw the committed results: python benchmarks/plot.py [--check]

Writes docs/plots/*.svg from benchmarks/results/*.json (needs matplotlib: pip install
'bagformer[plot]'). The same numbers give the same bytes with the same matplotlib. With ``--check``
nothing is written, and the exit status is 1 if a plot was made from other results.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "plots"
COLOURS = {"ours": "#1b7837", "seed_loops": "#999999", "einsum": "#4393c3"}
COLOURS |= {"compiled_einsum": "#92c5de", "per_image_matmul": "#d6604d"}
OPERATIONS = {
    "maxsim": "o",
    "maxsim_topk": "s",
    "bag_pool": "^",
    "l2_normalize": "v",
    "contrastive_loss": "D",
}


def _bars(axes: Any, result: dict[str, Any], value: str, label: str) -> None:
    rows = [
        row
        for row in result["rows"]
        if row["op"] == "maxsim" and value in row["contenders"]["ours"]
    ]
    names = [f"{row['name']}, {row['dtype']}" for row in rows]
    height = 0.8 / len(COLOURS)
    for place, (who, colour) in enumerate(COLOURS.items()):
        found = [
            (row + place * height, entry["contenders"][who][value])
            for row, entry in enumerate(rows)
            if value in entry["contenders"].get(who, {})
        ]
        if found:
            places, values = zip(*found, strict=True)
            axes.barh(places, values, height, color=colour, label=who.replace("_", " "))
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7)


def speed(axes: Any, result: dict[str, Any]) -> None:
    _bars(axes, result, "gflops", "useful GFLOP/s, more is better")


def memory(axes: Any, result: dict[str, Any]) -> None:
    _bars(axes, result, "peak_extra_mb", "extra memory of a call, MB, less is better")
    axes.set_xscale("symlog")


def roofline(axes: Any, result: dict[str, Any]) -> None:
    """Ours under its two ceilings: the processor's multiply-adds and the rate of copying."""
    rows = [row for row in result["rows"] if row["threads"] == 1 and row["isa"] is None]
    for dtype, colour in (("float32", "#2166ac"), ("bfloat16", "#b2182b")):
        own = [row for row in rows if row["dtype"] == dtype]
        peaks = sorted(row["peak_gflops"] for row in own if row["peak_gflops"])
        copies = sorted(row["copy_gbytes"] for row in own)
        if peaks:
            peak, copy = peaks[len(peaks) // 2], copies[len(copies) // 2]
            ends = [0.05, peak / copy, 4000.0]
            axes.plot(ends, [copy * ends[0], peak, peak], color=colour, label=f"limit, {dtype}")
        for op, marker in OPERATIONS.items():
            found = [
                (row["flops"] / row["bytes"], row["contenders"]["ours"]["gflops"])
                for row in own
                if row["op"] == op and "gflops" in row["contenders"]["ours"]
            ]
            if found:
                axes.scatter(*zip(*found, strict=True), s=22, color=colour, marker=marker, label=op)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful operations for each byte of inputs and results")
    axes.set_ylabel("useful GFLOP/s, one thread")
    axes.legend(fontsize=7)


def recall(axes: Any, result: dict[str, Any]) -> None:
    for place, kind in enumerate(("valid", "valid_unseen")):
        rows = [row[f"{kind} R@1"] for row in result["summary"]]
        axes.bar(
            [x + 0.4 * place for x in range(len(rows))],
            [row["mean"] for row in rows],
            0.4,
            yerr=[row["spread"] for row in rows],
            label=("pairs of words", "words never seen")[place],
            color=("#1b7837", "#a6dba0")[place],
        )
    names = [row["variant"].replace(", ", ",\n") for row in result["summary"]]
    axes.set_xticks([x + 0.2 for x in range(len(names))], names, fontsize=8)
    axes.set_ylabel("R@1 of 2,000 pictures, percent")
    axes.legend()


DRAWN: dict[str, tuple[str, Callable[[Any, dict[str, Any]], None]]] = {
    "speed": ("cpu.json", speed),
    "memory": ("cpu.json", memory),
    "roofline": ("cpu.json", roofline),
    "recall": ("learning.json", recall),
}


def source_of(file: str) -> str:
    """What a plot says of the results that it was drawn from."""
    digest = hashlib.sha256((RESULTS / file).read_bytes()).hexdigest()
    return f"benchmarks/results/{file} sha256 {digest}"


def draw(name: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "bagformer"
    file, function = DRAWN[name]
    result = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    tall = 7.5 if name in ("speed", "memory") else 4.0
    figure, axes = pyplot.subplots(figsize=(7.5, tall), layout="constrained")
    function(axes, result)
    described = {"Date": None, "Description": source_of(file)}
    figure.savefig(PLOTS / f"{name}.svg", metadata=described)
    pyplot.close(figure)


def main() -> int:
    if "--check" in sys.argv[1:]:
        stale = [
            name
            for name, (file, _) in DRAWN.items()
            if source_of(file) not in (PLOTS / f"{name}.svg").read_text(encoding="utf-8")
        ]
        print("\n".join(f"{name}.svg is not of the committed results" for name in stale))
        return int(bool(stale))
    PLOTS.mkdir(parents=True, exist_ok=True)
    for name in DRAWN:
        draw(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
