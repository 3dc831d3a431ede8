"""Runs the CPU suite of registry.py and writes JSON after every case.

    python benchmarks/run.py [--quick] [--only TEXT] [--out benchmarks/results/cpu.json]

Each case has a process of its own, with its threads and its instruction set. There, before anything
is timed, every contender's scores and gradients are compared with float64; if ours are wrong the
exit status is 1, and a rival's error is recorded and the rival not timed. Then contenders run in
turn within each round, next to torch's own 2,048 x 2,048 x 2,048 product, so that a busy machine
slows all of them: compare ratios. Peak memory is what one call adds to the resident set, measured
in another process whose allocator gives memory back (Linux alone).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from registry import CASES, CONTENDERS, Case, Contender, inputs, with_gradients

from bagformer import explain_backend, reference

LIMIT = {"float32": 2e-5, "bfloat16": 2e-2}
# Who rounds similarities to bfloat16 may name another winner of a near tie, whose gradient goes
# elsewhere then. That is an error, and is recorded, but no reason not to time a rival.
RIVALS_STEP = {"float32": 2e-5, "bfloat16": 0.5}
SIDE = 2048
ROUNDS, FEWEST, SECONDS = 9, 3, 9.0


def truth(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores and gradients in float64 by the reference."""
    text, image, mask = inputs(case)
    text, image = text.double(), image.double()

    def scores(a: Any, b: Any, m: Any = None) -> Any:
        found = reference.maxsim(a, b, text_mask=m)
        return found.text_to_image, found.image_to_text

    return [*scores(text, image, mask)], [*with_gradients(scores)(text, image, mask)]


def error_of(call: Callable, case: Case, known: tuple[list, list]) -> float:
    """Largest error relative to the largest value, over scores and, of a step, gradients."""
    text, image, mask = inputs(case)
    found = list(zip(call(text, image, mask), known[0], strict=True))
    if case.kind == "step":
        found += zip(with_gradients(call)(text, image, mask), known[1], strict=True)
    errors = [0.0]
    for mine, true in found:
        if mine is not None:
            errors.append(((mine.double() - true).abs().max() / true.abs().max()).item())
    return max(errors)


def prepare(case: Case, alone: bool = False) -> tuple[dict[str, Callable], dict[str, Any]]:
    """Calls that gave the right answer on a small part of the case, and what became of others."""
    small = case.cut(4)
    known, calls = truth(small), {}
    report: dict[str, Any] = {}
    for one in CONTENDERS:
        if one.alone != alone:
            continue
        reason = one.missing() or _try(one, case, small, known, calls, report)
        if reason:
            report[one.name] = {"skipped": reason}
    return calls, report


def _try(
    one: Contender, case: Case, small: Case, known: Any, calls: dict, report: dict
) -> str | None:
    try:
        call = one.make(case)
        if isinstance(call, str):
            return call
        error = error_of(call, small, known)
    except Exception as problem:
        if one.name == "ours":
            raise
        return f"raised {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
    lenient = case.kind == "step" and one.name != "ours"
    if not error <= (RIVALS_STEP if lenient else LIMIT)[case.dtype]:
        return f"wrong: error {error:.2g}"
    report[one.name] = {"error": error}
    calls[one.name] = with_gradients(call) if case.kind == "step" else call
    return None


def measure(case: Case, rounds: int, seconds: float, alone: bool = False) -> dict[str, Any]:
    """Parity, then times in turn. ``contenders``: what is known of each."""
    torch.set_num_threads(case.threads)
    calls, report = prepare(case, alone)
    wrong = report.get("ours", {}).get("skipped")
    if wrong:
        return {"wrong": wrong}
    text, image, mask = inputs(case)
    square = torch.randn(SIDE, SIDE).to(getattr(torch, case.dtype))
    times: dict[str, list[float]] = {name: [] for name in (*calls, "matmul")}
    started = time.perf_counter()
    for turn in range(rounds + 1):
        for name in times:
            begin = time.perf_counter()
            if name == "matmul":
                torch.mm(square, square)
            else:
                calls[name](text, image, mask)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
        if turn >= FEWEST and time.perf_counter() - started > seconds:
            break
    rate = 2.0 * SIDE**3 / statistics.median(times["matmul"]) / 1e9
    for name in calls:
        middle = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4)
        found = report[name]
        found |= {"ms": round(1e3 * middle, 3), "iqr_ms": round(1e3 * (high - low), 3)}
        found |= {"rounds": len(times[name])}
        if case.kind != "step":
            found["gflops"] = round(case.flops / middle / 1e9, 1)
            found["of_matmul"] = round(case.flops / middle / 1e9 / rate, 3)
        if "ours" in calls:
            found["over_ours"] = round(middle / statistics.median(times["ours"]), 3)
    return {
        "matmul_gflops": round(rate, 1),
        "copy_gbytes": round(copy_rate(), 1),
        "backend": explain_backend("maxsim", text),
        "contenders": report,
    }


def copy_rate() -> float:
    """Bytes read and written a second, in GB, of copying 256 MB."""
    source = torch.ones(1 << 26)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best / 1e9


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def memory(case: Case) -> dict[str, float]:
    """MB that one call of each contender adds at its peak."""
    torch.set_num_threads(case.threads)
    calls, _ = prepare(case)
    text, image, mask = inputs(case)
    found = {}
    for name, call in calls.items():
        call(text[:1], image[:1], None if mask is None else mask[:1])
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _high_water()
        call(text, image, mask)
        found[name] = round((_high_water() - before) / 1024, 1)
    return found


def _child(index: int, what: str, case: Case, extra: list[str]) -> dict[str, Any]:
    environment = dict(os.environ, OMP_NUM_THREADS=str(case.threads))
    if case.isa:
        environment["BAGFORMER_CPU_ISA"] = case.isa
    if what == "memory":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--child", what, "--index", str(index), *extra]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"exit status {done.returncode}: {tail[0][:300]}"}
    return json.loads(done.stdout.splitlines()[-1])


def judge(case: Case, result: dict[str, Any], before: list[dict]) -> list[dict[str, Any]]:
    """Each goal of the case, what was reached, and whether it is met; ``before``: earlier rows."""
    found, rows = result["contenders"], []
    for rival, bound in case.goals:
        key, who = ("of_matmul", "ours") if rival == "matmul" else ("over_ours", rival)
        reached = found.get(who, {}).get(key)
        if rival == "memory":
            peaks = [found.get(who, {}).get("peak_extra_mb") for who in ("ours", "einsum")]
            reached = round(peaks[0] / peaks[1], 3) if all(peaks) else None
        elif rival == "padding":
            whole = next((row for row in before if _padded(row, case)), None)
            if whole is not None:
                share = case.flops / (2.0 * case.texts * case.images * case.bags)
                share /= case.patches * case.width
                reached = round(found["ours"]["ms"] / whole["contenders"]["ours"]["ms"] / share, 3)
        most = rival in ("memory", "padding")
        met = None if reached is None else (reached <= bound if most else reached >= bound)
        name = "most" if most else "least"
        rows.append({"against": rival, name: bound, "reached": reached, "met": met})
    return rows


def _padded(row: dict[str, Any], case: Case) -> bool:
    same = ("texts", "images", "width", "dtype", "threads", "isa")
    return row["kind"] == "scores" and all(row[name] == getattr(case, name) for name in same)


def run_case(index: int, case: Case, extra: list[str], before: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {**case.__dict__, "goals": None}
    result = _child(index, "time", case, extra)
    row |= result
    if "contenders" not in result:
        return row
    alone = _child(index, "alone", case, extra)
    for one in (one for one in CONTENDERS if one.alone):
        found = alone.get("contenders", {}).get(one.name)
        found = found or {"skipped": f"its process failed: {alone.get('failed', 'no result')}"}
        row["contenders"][one.name] = {**found, "process": "its own"}
    if sys.platform == "linux":
        peaks = _child(index, "memory", case, extra)
        row["memory_failed"] = peaks.pop("failed", None)
        for name, peak in peaks.items():
            row["contenders"][name]["peak_extra_mb"] = peak
    row["goals"] = judge(case, row, before)
    return row


def show(row: dict[str, Any]) -> None:
    print(f"{row['name']}, {row['dtype']}" + "".join(f" {row[k]}" for k in ("failed",) if k in row))
    for name, found in row.get("contenders", {}).items():
        words = found.get("skipped") or (
            f"{found['ms']:9.2f} ms  {found.get('over_ours', float('nan')):6.2f} x  "
            f"{found.get('of_matmul', 0):5.2f} of matmul  {found.get('peak_extra_mb', 0):8.1f} MB"
        )
        print(f"    {name:26} {words}")
    for goal in row.get("goals") or ():
        word = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        bound = f"at most {goal['most']}" if "most" in goal else f"at least {goal['least']}"
        print(f"    goal, {goal['against']}: {bound}, reached {goal['reached']}: {word}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small cases, about a minute")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("time", "alone", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        case = CASES[options.index]
        case = case.tiny() if options.tiny else case
        rounds, seconds = (3, 1.0) if options.quick or options.tiny else (ROUNDS, SECONDS)
        found = (
            memory(case)
            if options.child == "memory"
            else measure(case, rounds, seconds, options.child == "alone")
        )
        print(json.dumps(found))
        return 0
    extra = [word for word, on in (("--quick", options.quick), ("--tiny", options.tiny)) if on]
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(CASES):
        large = case.texts * case.images > 4096
        if options.only not in case.name or (options.quick and (large or case.goals == ())):
            continue
        rows.append(run_case(index, case.tiny() if options.tiny else case, extra, rows))
        show(rows[-1])
        if options.out:
            report = {**provenance(1), "rows": rows}
            draft = options.out.with_suffix(".draft")
            draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            draft.replace(options.out)
    bad = [row for row in rows if "wrong" in row or "failed" in row]
    for row in bad:
        reason = row.get("wrong") or row.get("failed")
        print(f"ours, {row['name']}, {row['dtype']}: {reason}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
