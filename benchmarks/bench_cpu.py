"""The quick cases of registry.py for pytest-benchmark:

    pytest benchmarks/bench_cpu.py

A contender that gives a wrong answer fails if it is ours and is skipped, with its error, if not.
run.py times in turn and holds the goals; this is for comparing two states of the code, by
pytest-benchmark's own --benchmark-save and --benchmark-compare.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cases import Case
from measure import Judged, judge
from registry import CASES, OPS

QUICK = [
    case
    for case in CASES
    if case.texts * case.images <= 4096 and case.threads == 1 and case.isa is None
]
BOTH = [
    pytest.param(case, one.name, id=f"{case.name}, {case.dtype}, {one.name}")
    for case in QUICK
    for one in OPS[case.op].contenders
    if not one.alone
]


@functools.lru_cache(maxsize=1)
def judged(case: Case) -> Judged:
    import torch

    torch.set_num_threads(1)
    return judge(case)


@pytest.mark.parametrize(("case", "name"), BOTH)
def test_cpu(benchmark, case, name):
    found = judged(case)
    assert not found.wrong, found.wrong
    if name not in found.calls:
        pytest.skip(found.report[name]["skipped"])
    call, arguments = found.calls[name]
    benchmark.group = f"{case.name}, {case.dtype}"
    benchmark(call, *arguments)
