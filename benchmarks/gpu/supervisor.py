"""The process that watches: a worker measures, and if it dies a fresh one goes on.

A rival's kernel that writes where it must not takes the whole CUDA context with it. That costs the
part that the worker was in, no more.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu import report
from gpu.cases import PART_NAMES

HERE = Path(__file__).resolve().parent
GRACE, DRY_GRACE = 15.0, 600.0  # seconds past the time before a worker is killed
MOST_WORKERS = 6
BUDGET, DRY_BUDGET = 520.0, 3600.0  # seconds; a dry run may take as long as it takes
OVERTIME = "killed: it ran past the time"


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure bagformer's kernels on a GPU.")
    parser.add_argument("--out", required=True, help="the JSON file, rewritten after every step")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no GPU")
    parser.add_argument("--budget", type=float, help=f"seconds in all ({BUDGET:.0f})")
    parser.add_argument("--started", type=float, help="when they began, in seconds since 1970")
    parser.add_argument("--parts", help="only these, comma-separated")
    parser.add_argument("--spoil", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.budget is None:
        args.budget = DRY_BUDGET if args.dry_run else BUDGET
    args.deadline = (args.started or time.time()) + args.budget
    unknown = [name for name in (args.parts or "machine").split(",") if name not in PART_NAMES]
    if unknown:
        expected = ", ".join(PART_NAMES)
        parser.error(f"--parts: expected some of {expected}, got {', '.join(unknown)}")
    results = HERE.parent / "results"
    if args.dry_run and results in Path(args.out).resolve().parents:
        parser.error(f"--out: a dry run must not write to {results}")
    return args


def _start(words: list[str], args: argparse.Namespace, resume: bool) -> subprocess.Popen:
    environment = {**os.environ, "BAGFORMER_BACKEND": "triton"}  # an error rather than a fallback
    if args.dry_run:
        environment.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        environment["KINETO_LOG_LEVEL"] = "99"  # it reports at length that there is no GPU
    started = args.deadline - args.budget
    command = [sys.executable, str(HERE), *words, "--worker", "--started", str(started)]
    return subprocess.Popen(command + ["--resume"] * resume, env=environment)


def _wait(worker: subprocess.Popen, end: float) -> str | None:
    """None when the worker ended by itself with 0 or 1, else what became of it."""
    try:
        code = worker.wait(max(1.0, end - time.time()))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return OVERTIME
    return None if code in (0, 1) else f"the worker ended with code {code}"


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _close(path: Path, fate: str) -> bool:
    """Note how a worker died in its part; whether there is anything to go on from."""
    document = report.read(path)
    running = [name for name, part in document["parts"].items() if part["status"] == "running"]
    for name in running:
        document["parts"][name].update(status="crashed", reason=fate)
        if fate == OVERTIME:
            document["parts"][name]["status"] = "stopped"
        else:
            document["failures"].append(f"{name}: {fate}")
    if fate == OVERTIME:
        for name in PART_NAMES:
            skipped = {"status": "skipped", "reason": "the time was up"}
            document["parts"].setdefault(name, skipped)
        document["finished"] = True
    document["goals"] = report.goals(document)
    report.write(path, document)
    return bool(document["parts"])


def supervise(words: list[str], args: argparse.Namespace) -> int:
    path = Path(args.out)
    before = _stamp(path)  # an earlier run's file stays until this one has something to say
    for number in range(MOST_WORKERS):
        worker = _start(words, args, resume=number > 0)
        stop = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            fate = _wait(worker, args.deadline + (DRY_GRACE if args.dry_run else GRACE))
        finally:
            signal.signal(signal.SIGTERM, stop)
            if worker.poll() is None:  # this process was told to stop
                worker.terminate()
                worker.wait()
            for part in path.parent.glob(f"{path.name}.{worker.pid}.part"):
                part.unlink()  # it was killed while writing
        if fate is None or _stamp(path) == before:
            break
        if not _close(path, fate) or time.time() > args.deadline:
            break
        print(f"{fate}: going on with the next part", flush=True)
    if _stamp(path) == before:
        print("nothing was measured", file=sys.stderr)
        return 2
    document = report.read(path)
    print(report.table(document))
    print(f"written to {path}")
    return 1 if document["failures"] or not document["finished"] else 0


def main(words: list[str]) -> int:
    args = arguments(words)
    if not args.worker:
        return supervise(words, args)
    from gpu import worker

    return worker.main(args)
