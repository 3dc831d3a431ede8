"""Where a figure comes from: commit, machine and versions, for the JSON of every benchmark."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def provenance(threads: int, *packages: str) -> dict[str, Any]:
    """Fields that every result file starts with; ``packages`` are those that were timed."""
    import torch

    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "HEAD"),
        # results of the last run may lie about, the code that made them may not differ
        "dirty": bool(
            _git("status", "--porcelain", "-uno", "--", ":(top,exclude)benchmarks/results")
        ),
        "machine": {
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
        },
        "versions": {name: version(name) for name in ("bagformer", "torch", *packages)},
    }
