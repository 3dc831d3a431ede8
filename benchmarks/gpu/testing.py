"""The test suite's GPU part, in processes of its own and within a share of the time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from gpu.context import Context
from gpu.timing import Row

ROOT = Path(__file__).resolve().parents[2]
SHARE, LONGEST = 0.3, 150.0  # of the time that is left when the tests start; seconds
WORKERS = 8  # each compiles kernels of its own
DRY_TESTS = ("tests/interpreted/test_interpreter.py",)
NOTHING_COLLECTED = 5


def _outcomes(report: Path) -> dict[str, list[str]]:
    """Names of the tests by what became of them; ``uncollected``: modules that did not import."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": [], "uncollected": []}
    if not report.exists():
        return found
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        error = case.find("error")
        if error is not None and "collection" in (error.get("message") or ""):
            kind = "uncollected"
        elif error is not None or case.find("failure") is not None:
            kind = "failed"
        else:
            kind = "skipped" if case.find("skipped") is not None else "passed"
        found[kind].append(f"{case.get('classname')}.{case.get('name')}")
    return found


def _run(words: list[str], seconds: float, dry: bool) -> Row:
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        if not dry and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
        environment = {k: v for k, v in os.environ.items() if k != "BAGFORMER_BACKEND"}
        start = time.monotonic()
        row: Row = {"command": " ".join(["pytest", *words]), "dry_run": dry}
        try:
            done = subprocess.run(
                [*command, f"--junit-xml={report}"],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**row, "outcome": f"stopped after {seconds:.0f} s", "failed": False}
        found = _outcomes(report)
        # a module whose packages are missing here cannot be collected: said, and no failure
        harmless = done.returncode in (0, NOTHING_COLLECTED) or found["uncollected"]
        return {
            **row,
            "outcome": f"exit code {done.returncode}",
            "failed": bool(found["failed"]) or not harmless,
            "seconds": time.monotonic() - start,
            "counts": {kind: len(names) for kind, names in found.items()},
            "failures": found["failed"],
            "uncollected": found["uncollected"],
            "tail": done.stdout[-2000:],
        }


def tests(ctx: Context) -> Iterator[list[Row]]:
    """Kernel tests as they are, then whatever else is marked ``gpu``."""
    ctx.device.clear()
    seconds = min(LONGEST, SHARE * ctx.timer.seconds_left())
    start = time.monotonic()
    if ctx.device.dry:
        yield [_run(list(DRY_TESTS), seconds, True)]
        return
    yield [_run(["tests/interpreted"], seconds, False)]
    left = seconds - (time.monotonic() - start)
    words = ["tests", "-m", "gpu", "--ignore=tests/interpreted", "--continue-on-collection-errors"]
    yield [_run(words, max(left, 20.0), False)]
