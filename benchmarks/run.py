"""Runs the CPU suite of registry.py and writes JSON after every case.

    python benchmarks/run.py [--quick] [--only TEXT] [--out benchmarks/results/cpu.json [--update]]

Each case has a process of its own, with its threads and its instruction set. There, before anything
is timed, every contender's results and gradients are compared with float64, rivals' on a few texts
and images, ours on all; if ours are wrong the exit status is 1, and a rival's error is recorded and
the rival not timed. Then contenders run in turn within each round, next to torch's own 2,048 x
2,048 x 2,048 product and the processor's own rate of multiply-adds, so that a busy machine slows
all of them: compare ratios. Peak memory is what one call adds to the resident set, measured in
another process whose allocator gives memory back (Linux alone).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peak
from cases import Case
from measure import ROUNDS, SECONDS, environment, measure, memory
from provenance import provenance
from registry import CASES, OPS


def _child(index: int, what: str, case: Case, extra: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--index", str(index), *extra]
    done = subprocess.run(command, env=environment(case, what), capture_output=True, text=True)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"exit status {done.returncode}: {tail[0][:300]}"}
    return json.loads(done.stdout.splitlines()[-1])


def judge_goals(case: Case, result: dict[str, Any], before: list[dict]) -> list[dict[str, Any]]:
    """Each goal of the case, what was reached, and whether it is met; ``before``: earlier rows."""
    found, rows = result["contenders"], []
    for rival, bound in case.goals:
        rate = rival in ("matmul", "peak")
        key, who = (f"of_{rival}", "ours") if rate else ("over_ours", rival)
        reached = found.get(who, {}).get(key)
        if rival == "memory":
            peaks = [found.get(who, {}).get("peak_extra_mb") for who in ("ours", "einsum")]
            reached = None if None in peaks or not peaks[1] else round(peaks[0] / peaks[1], 3)
        elif rival == "padding":
            reached = _over_share(case, found, before)
        most = rival in ("memory", "padding")
        met = None if reached is None else (reached <= bound if most else reached >= bound)
        name = "most" if most else "least"
        rows.append({"against": rival, name: bound, "reached": reached, "met": met})
    return rows


def _over_share(case: Case, found: dict[str, Any], before: list[dict]) -> float | None:
    """Time over the padded case's, as a multiple of the share of operations that is useful. The two
    ran at different times: each is taken in units of torch's product in its own run."""
    same = ("texts", "images", "width", "dtype", "threads", "isa")
    rates = [found.get(who, {}).get("of_matmul") for who in ("ours", "ours_nested")]
    for row in before:
        if row["kind"] == "scores" and all(row[name] == getattr(case, name) for name in same):
            whole = row.get("contenders", {}).get("ours", {}).get("of_matmul")
            best = max((rate for rate in rates if rate), default=None)
            return round(whole / best, 3) if whole and best else None
    return None


def run_case(index: int, case: Case, extra: list[str], before: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {**case.__dict__, "op": case.op, "goals": None}
    result = _child(index, "time", case, extra)
    row |= result
    if "contenders" not in result:
        return row
    lonely = [one for one in OPS[case.op].contenders if one.alone]
    alone = _child(index, "alone", case, extra) if lonely else {}
    for one in lonely:
        found = alone.get("contenders", {}).get(one.name)
        found = found or {"skipped": f"its process failed: {alone.get('failed', 'no result')}"}
        row["contenders"][one.name] = {**found, "process": "its own"}
    if sys.platform == "linux":
        peaks = _child(index, "memory", case, extra)
        row["memory_failed"] = peaks.pop("failed", None)
        for name, most in peaks.items():
            row["contenders"][name]["peak_extra_mb"] = most
    row["goals"] = judge_goals(case, row, before)
    return row


def show(row: dict[str, Any]) -> None:
    print(f"{row['name']}, {row['dtype']}" + "".join(f" {row[k]}" for k in ("failed",) if k in row))
    for name, found in row.get("contenders", {}).items():
        words = found.get("skipped") or (
            f"{found['ms']:9.2f} ms  {found.get('over_ours', float('nan')):6.2f} x  "
            f"{found.get('of_matmul', 0):5.2f} of matmul  {found.get('of_peak', 0):5.2f} of peak  "
            f"{found.get('of_copy', 0):5.2f} of copy  {found.get('peak_extra_mb', 0):8.1f} MB"
        )
        print(f"    {name:26} {words}")
    for goal in row.get("goals") or ():
        word = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        bound = f"at most {goal['most']}" if "most" in goal else f"at least {goal['least']}"
        print(f"    goal, {goal['against']}: {bound}, reached {goal['reached']}: {word}")


def _run_child(options: argparse.Namespace) -> None:
    case = CASES[options.index]
    case = case.tiny() if options.tiny else case
    rounds, seconds = (3, 1.0) if options.quick or options.tiny else (ROUNDS, SECONDS)
    if options.child == "memory":
        found: dict[str, Any] = memory(case)
    else:
        found = measure(case, rounds, seconds, options.child == "alone", options.peak)
    print(json.dumps(found))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({**provenance(1), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _earlier(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file by name and dtype, each with the commit that it was measured at."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return {
        (row["name"], row["dtype"]): {"commit": report["commit"], **row} for row in report["rows"]
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small cases, about a minute")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--update", action="store_true", help="keep the other cases of --out")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("time", "alone", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        _run_child(options)
        return 0
    extra = [word for word, on in (("--quick", options.quick), ("--tiny", options.tiny)) if on]
    rows: list[dict[str, Any]] = []
    kept = _earlier(options.out) if options.update and options.out else {}
    with tempfile.TemporaryDirectory() as folder:
        library = peak.build(Path(folder))
        extra += ["--peak", str(library)] if library else []
        for index, case in enumerate(CASES):
            large = case.texts * case.images > 4096
            if options.only not in case.name or (options.quick and (large or case.goals == ())):
                rows += [kept[name] for name in [(case.name, case.dtype)] if name in kept]
                continue
            rows.append(run_case(index, case.tiny() if options.tiny else case, extra, rows))
            show(rows[-1])
            if options.out:
                later = [kept.get((one.name, one.dtype)) for one in CASES[index + 1 :]]
                _write(options.out, rows + [row for row in later if row])
    if options.out and kept:
        _write(options.out, rows)
    bad = [row for row in rows if "wrong" in row or "failed" in row]
    for row in bad:
        reason = row.get("wrong") or row.get("failed")
        print(f"ours, {row['name']}, {row['dtype']}: {reason}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
