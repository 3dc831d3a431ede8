"""Judges the contenders of one case, then times them in turn; run.py starts this in a process."""

from __future__ import annotations

import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peak
import torch
from cases import Arguments, Call, Case, Contender, with_gradients
from registry import OPS

from bagformer import explain_backend

LIMIT = {"float32": 2e-5, "bfloat16": 2e-2}
# Who rounds similarities to bfloat16 may name another winner of a near tie, whose gradient goes
# elsewhere then. That is an error, and is recorded, but no reason not to time a rival.
RIVALS_STEP = {"float32": 2e-5, "bfloat16": 0.5}
# texts that rivals' parity is judged on, and first ours: more than those that our kernels score in
# another way
JUDGED = 6
SIDE = 2048
COPIED = 1 << 26  # float32 numbers
ROUNDS, FEWEST, SECONDS = 9, 3, 9.0


@dataclass
class Judged:
    """Calls that gave the right answer, ours on the whole case and others on a small part of it,
    each with its own layout of the inputs, and what became of every contender."""

    calls: dict[str, tuple[Call, Arguments]] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: str | None = None  # what is wrong with ours


def _wide(arguments: Arguments) -> Arguments:
    return tuple(
        one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for one in arguments
    )


def _distance(result: torch.Tensor, true: torch.Tensor, ranks: float) -> float:
    """Largest error relative to the largest value; infinite for NaN and for another shape."""
    if not result.is_floating_point():
        return _misplaced(result, true, ranks)
    if result.shape != true.shape:
        return float("inf")
    error = ((result.double() - true).abs().max() / true.abs().max()).item()
    return error if math.isfinite(error) else float("inf")


def _misplaced(ranks: torch.Tensor, scores: torch.Tensor, allowed: float) -> float:
    """Infinite unless every row of ``ranks`` holds the best columns of ``scores``, best first, the
    lowest of equals first. Two scores that are nearer than ``allowed`` may change places."""
    rows, columns = scores.shape
    if ranks.dim() != 2 or len(ranks) != rows or not 0 < ranks.shape[1] <= columns:
        return float("inf")
    k = ranks.shape[1]
    if not bool(((ranks >= 0) & (ranks < columns)).all()):
        return float("inf")
    place = torch.full((rows, columns), k)  # of each column among the best; k: not there
    place.scatter_(1, ranks, torch.arange(k).expand(rows, k))
    twice = bool(((place < k).sum(1) < k).any())
    best, order = scores.sort(dim=1, descending=True, stable=True)
    apart = (scores.gather(1, ranks) - best[:, :k]).abs() / scores.abs().max()
    place = place.gather(1, order)
    equal = best[:, 1:] == best[:, :-1]
    turned = equal & (place[:, 1:] < k) & (place[:, :-1] > place[:, 1:])
    return float("inf") if twice or bool(turned.any()) or not apart.max() <= allowed else 0.0


def truth_of(case: Case) -> list[torch.Tensor | None]:
    """Results and, of a step, gradients, in float64."""
    op = OPS[case.op]
    wide = _wide(op.arguments(case))
    true = list(op.truth(*wide))
    return true + list(with_gradients(op.truth, op.leaves)(*wide)) if case.step else true


def error_of(
    call: Call, one: Contender, case: Case, true: list[torch.Tensor | None] | None = None
) -> float:
    """Largest error relative to the largest value, over results and, of a step, gradients.

    A rival may leave a result out; ours may not. ``true``: what ``truth_of`` gives, if it is known.
    """
    op = OPS[case.op]
    given = op.arguments(case)
    found = list(call(*one.layout(*given)))
    if case.step:
        found += with_gradients(call, op.leaves)(*given)
    pairs = list(zip(found, truth_of(case) if true is None else true, strict=True))
    given_up = [result is None and true is not None for result, true in pairs]
    if all(given_up) or (any(given_up) and one.ours):
        return float("inf")
    ranks = LIMIT["float32"]
    return max(_distance(result, true, ranks) for result, true in pairs if result is not None)


def _limit(one: Contender, case: Case) -> float:
    """The error that a contender is allowed."""
    if one.ours:
        # our scores are float32 whatever the features are; other results have the features' dtype
        return LIMIT["float32" if case.results_are_float32 else case.dtype]
    return max((RIVALS_STEP if case.step else LIMIT)[case.dtype], one.inexact)


def _refused(
    one: Contender, case: Case, judged: Judged, truth: Callable[[], Any] | None
) -> str | None:
    """Why a contender is not timed; None if it is. ``truth``: of the whole case, which ours must
    meet; None: a part will do."""
    try:
        call = one.make(case)
        if isinstance(call, str):
            return call
        error = error_of(call, one, case.cut(JUDGED))
        if one.ours and truth is not None:
            error = max(error, error_of(call, one, case, truth()))
    except Exception as problem:
        if one.ours:
            raise
        return f"raised {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
    if error > _limit(one, case):
        if one.ours:
            judged.wrong = f"{one.name}: wrong: error {error:.2g}"
        return f"wrong: error {error:.2g}"
    judged.report[one.name] = {"error": error}
    op = OPS[case.op]
    timed = with_gradients(call, op.leaves) if case.step else call
    judged.calls[one.name] = timed, one.layout(*op.arguments(case))
    return None


def judge(case: Case, alone: bool = False, whole: bool = True) -> Judged:
    """``alone``: those who need a process of their own, instead of the others. ``whole``: ours must
    be right on the whole case."""
    judged = Judged()
    truth = functools.cache(lambda: truth_of(case)) if whole else None
    for one in OPS[case.op].contenders:
        if one.alone == alone:
            reason = one.missing() or _refused(one, case, judged, truth)
            if reason:
                judged.report[one.name] = {"skipped": reason}
    return judged


def _in_turn(calls: dict[str, Callable], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, all of them once a round; the first round warms up. Each round has an
    order of its own: who follows a large product finds the caches full of it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started, order = time.perf_counter(), random.Random(0)
    for turn in range(rounds + 1):
        for name in order.sample(list(calls), len(calls)):
            begin = time.perf_counter()
            calls[name]()
            if turn:
                times[name].append(time.perf_counter() - begin)
        if turn >= FEWEST and time.perf_counter() - started > seconds:
            break
    return times


def measure(
    case: Case, rounds: int, seconds: float, alone: bool = False, library: Path | None = None
) -> dict[str, Any]:
    """Parity, then times in turn. ``contenders``: what is known of each."""
    torch.set_num_threads(case.threads)
    judged = judge(case, alone)
    if judged.wrong:
        return {"wrong": judged.wrong}
    square = torch.randn(SIDE, SIDE).to(getattr(torch, case.dtype))
    calls: dict[str, Callable] = {
        name: lambda call=call, given=given: call(*given)
        for name, (call, given) in judged.calls.items()
    }
    calls["matmul"] = lambda: torch.mm(square, square)
    ceiling = None
    # beside torch's threads, which spin for a while after each product, more would share cores
    if library is not None and case.threads == 1:
        ceiling = peak.chains(library, case.dtype)
    if ceiling is not None:
        calls["peak"] = ceiling[0]
    times = _in_turn(calls, rounds, seconds)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    rates = {"matmul": 2.0 * SIDE**3 / middle["matmul"] / 1e9, "copy": copy_rate()}
    if ceiling is not None:
        rates["peak"] = ceiling[1] / middle["peak"] / 1e9
    for name in judged.calls:
        judged.report[name] |= _figures(case, times[name], rates, middle.get("ours"))
    features = OPS[case.op].arguments(case.cut(1))[0]
    return {
        "matmul_gflops": round(rates["matmul"], 1),
        "peak_gflops": round(rates["peak"], 1) if "peak" in rates else None,
        "peak_of": peak.level_of(case.dtype) if "peak" in rates else None,
        "copy_gbytes": round(rates["copy"], 1),
        "flops": case.flops,
        "bytes": case.bytes,
        "backend": explain_backend(case.op, features),
        "contenders": judged.report,
    }


def _figures(
    case: Case, taken: list[float], rates: dict[str, float], ours: float | None
) -> dict[str, Any]:
    middle = statistics.median(taken)
    low, _, high = statistics.quantiles(taken, n=4)
    found = {"ms": round(1e3 * middle, 3), "iqr_ms": round(1e3 * (high - low), 3)}
    found["rounds"] = len(taken)
    if not case.step:
        gflops, gbytes = case.flops / middle / 1e9, case.bytes / middle / 1e9
        found |= {"gflops": round(gflops, 1), "gbytes": round(gbytes, 2)}
        found["of_copy"] = round(gbytes / rates["copy"], 3)
        for name in ("matmul", "peak"):
            if name in rates:
                found[f"of_{name}"] = round(gflops / rates[name], 3)
    if ours is not None:
        found["over_ours"] = round(middle / ours, 3)
    return found


def copy_rate() -> float:
    """Bytes read and written a second, in GB, of copying 256 MB."""
    source = torch.ones(COPIED)
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
    judged = judge(case, whole=False)
    found = {}
    for name, (call, given) in judged.calls.items():
        call(*given)  # what compiles at the first call of a shape does so before
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _high_water()
        call(*given)
        # the kernel counts pages in batches: a little less than before is nothing
        found[name] = round(max(0, _high_water() - before) / 1024, 1)
    return found


def environment(case: Case, what: str) -> dict[str, str]:
    """What a process for the case starts with."""
    found = dict(os.environ, OMP_NUM_THREADS=str(case.threads))
    if case.isa:
        found["BAGFORMER_CPU_ISA"] = case.isa
    if what == "memory":
        found |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return found
