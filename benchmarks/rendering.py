"""What the tables of pages are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(result: dict[str, Any], file: str, root: str = "") -> str:
    """Machine, versions, date, commit and file; ``root``: from the page to the repository's."""
    machine, versions = result["machine"], result["versions"]
    named = ", ".join(
        f"{name} {number}" for name, number in versions.items() if name != "bagformer"
    )
    threads = machine["threads"]
    return (
        f"{machine['processor']} ({machine['capability']}), {threads} thread{'s' * (threads > 1)}, "
        f"{named}, {result['date']}, commit {result['commit'][:8]} "
        f"([{file}]({root}benchmarks/results/{file}))"
    )
