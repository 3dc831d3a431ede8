"""Write the README's figures from the JSON files that hold them.

python benchmarks/render_readme.py [--check]

What stands between the markers ``<!-- figures:begin NAME -->`` and ``<!-- figures:end -->`` is
replaced. With ``--check`` nothing is written, and the exit status is 1 if the README is out of
date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _caption(result: dict[str, Any], file: str) -> str:
    machine, versions = result["machine"], result["versions"]
    named = ", ".join(
        f"{name} {number}" for name, number in versions.items() if name != "bagformer"
    )
    threads = machine["threads"]
    return (
        f"{machine['processor']} ({machine['capability']}), {threads} thread{'s' * (threads > 1)}, "
        f"{named}, {result['date']}, commit {result['commit'][:8]} "
        f"([{file}](benchmarks/results/{file}))"
    )


def tiny() -> str:
    """Recall of the shipped model, from what its training script measured."""
    path = ROOT / "bagformer" / "assets" / "tiny" / "metrics.json"
    metrics = _load(path)
    names = {
        "sample": "pairs of words that training never joined",
        "sample_unseen": "words that training never saw",
    }
    rows = [
        [f"{label}: {metrics[kind]['queries']} queries"]
        + [f"{metrics[kind][f'R@{k}']:.1f} %" for k in (1, 5, 10)]
        for kind, label in names.items()
    ]
    return (
        f"The shipped model was trained from nothing in minutes on two cores, on the other themes "
        f"of the same icons. Text to picture, among {metrics['sample']['pictures']} pictures "
        f"([metrics.json]({path.relative_to(ROOT)}), which `bagformer demo` measures again):\n\n"
        + _table(["", "R@1", "R@5", "R@10"], rows)
    )


def cpu() -> str:
    """Both directions on the CPU, ours against einsum and the bare product."""
    file = "maxsim_cpu.json"
    result = _load(RESULTS / file)
    shape, rows = result["shape"], []
    for dtype, part in result["results"].items():
        for name, label in (("", "scores"), ("_backward", "scores and gradients")):
            ours, einsum = (part["times"][f"{who}{name}"] for who in ("ours", "einsum"))
            product = part["times"]["product"]
            peak = part["peak_extra_mb"]
            rows.append(
                [
                    f"{dtype}, {label}",
                    f"{ours['median_ms']:.1f} ms",
                    f"{einsum['median_ms']:.1f} ms ({einsum['over_ours']:.1f} x)",
                    "" if name else f"{product['median_ms']:.1f} ms ({product['over_ours']:.1f} x)",
                    f"{peak[f'ours{name}']:.0f} MB",
                    f"{peak[f'einsum{name}']:.0f} MB",
                ]
            )
    head = ["", "`maxsim`", "einsum + amax", "torch's bare matmul, no maxima"]
    return (
        f"{shape['texts']} texts of {shape['bags']} bags with {shape['images']} pictures of "
        f"{shape['patches']} patches, {shape['depth']} features, both directions; medians, in turn "
        f"within one run. {_caption(result, file)}.\n\n"
        + _table([*head, "extra memory", "einsum's"], rows)
    )


def segmentation() -> str:
    """Cutting texts into bags, ours against pyahocorasick's walk."""
    file = "segmentation.json"
    result = _load(RESULTS / file)
    rows = []
    for kind, label in (("full_texts", "25 tokens"), ("short_texts", "a query in 25 tokens")):
        ours, walk = (result[kind][who]["us_per_text"] for who in ("bagformer", "pyahocorasick"))
        rows.append([f"a text, {label}", f"{ours:.2f} µs", f"{walk:.2f} µs ({walk / ours:.0f} x)"])
    build = result["build_s"]
    rows.append(["building", f"{build['bagformer']:.2f} s", f"{build['pyahocorasick']:.2f} s"])
    rows.append(["opening the saved file", f"{result['reopen_ms']:.1f} ms", ""])
    return (
        f"Bags of {result['texts']:,} texts over {result['entities']:,} entities; pyahocorasick's "
        f"own longest-match walk over the same ids, without making bags of it. "
        f"{_caption(result, file)}.\n\n" + _table(["", "bagformer", "pyahocorasick"], rows)
    )


def render(text: str) -> str:
    """``text`` with every marked part written anew. Raises KeyError for an unknown name."""
    parts = {"tiny": tiny, "cpu": cpu, "segmentation": segmentation}
    return re.sub(
        r"(<!-- figures:begin (\w+) -->\n).*?(<!-- figures:end -->)",
        lambda found: f"{found[1]}{parts[found[2]]()}\n{found[3]}",
        text,
        flags=re.S,
    )


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
