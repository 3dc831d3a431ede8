"""The CPU suite judges before it times, and loses nothing when it is stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def suite(monkeypatch):
    """benchmarks/run.py with the contenders that take no warm-up."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run = importlib.import_module("run")
    quick = tuple(one for one in run.CONTENDERS if not one.package and "compiled" not in one.name)
    monkeypatch.setattr(run, "CONTENDERS", quick)
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_every_case_is_judged_and_timed(suite):
    for case in {(c.kind, c.dtype): c for c in suite.CASES}.values():
        small = case.tiny()
        found = suite.measure(small, 3, 0.1)
        ours = found["contenders"]["ours"]
        assert ours["ms"] > 0 and ours["error"] <= suite.LIMIT[case.dtype], case
        assert {"seed_loops", "einsum", "per_image_matmul"} <= found["contenders"].keys()
        assert all("ms" in row for row in found["contenders"].values()), found["contenders"]
        assert found["matmul_gflops"] > 0 and found["copy_gbytes"] > 0


def test_a_wrong_kernel_ends_the_run(suite, monkeypatch, tmp_path):
    def wrong(text, image, mask=None):
        good = suite.CONTENDERS[1].make(suite.CASES[0])(text, image, mask)
        return good[0], good[1] * 1.001

    broken = suite.Contender("ours", lambda case: wrong)
    monkeypatch.setattr(suite, "CONTENDERS", (broken, *suite.CONTENDERS[1:]))
    found = suite.measure(suite.CASES[0].tiny(), 3, 0.1)
    assert found["wrong"].startswith("wrong: error 0.00")
    monkeypatch.setattr(suite, "_child", lambda *_: found)
    out = tmp_path / "out.json"
    assert suite.main(["--only", "64 x 64", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["rows"][0]["wrong"]


def test_a_rival_that_is_wrong_absent_or_broken_is_written_down(suite, monkeypatch):
    def raises(case):
        raise RuntimeError("no driver")

    rivals = (
        suite.Contender("off", lambda case: lambda *_: (torch.zeros(4, 5), None)),
        suite.Contender("absent", raises, package="no_such_package"),
        suite.Contender("broken", raises),
    )
    monkeypatch.setattr(suite, "CONTENDERS", (suite.CONTENDERS[0], *rivals))
    found = suite.measure(suite.CASES[0].tiny(), 3, 0.1)["contenders"]
    assert found["off"] == {"skipped": "wrong: error 1"}
    assert found["absent"] == {"skipped": "no_such_package is not installed"}
    assert found["broken"] == {"skipped": "raised RuntimeError: no driver"}


def test_a_stop_leaves_what_was_measured(suite, monkeypatch, tmp_path):
    done = {"contenders": {"ours": {"error": 0.0, "ms": 1.0, "of_matmul": 0.9}}}
    calls = []

    def child(index, what, case, extra):
        calls.append(what)
        if len(calls) > 3:  # a case takes three: times, who runs alone, memory
            raise KeyboardInterrupt
        return {} if what == "memory" else json.loads(json.dumps(done))

    monkeypatch.setattr(suite, "_child", child)
    lonely = suite.Contender("lonely", lambda case: "", alone=True)
    monkeypatch.setattr(suite, "CONTENDERS", (*suite.CONTENDERS, lonely))
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--out", str(out)])
    report = json.loads(out.read_text())
    assert report["schema_version"] == 1 and len(report["rows"]) == 1
    goals = {goal["against"]: goal["met"] for goal in report["rows"][0]["goals"]}
    assert goals == {"seed_loops": None, "matmul": True}
    assert "failed" in report["rows"][0]["contenders"]["lonely"]["skipped"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_case_runs_in_a_process_of_its_own(suite):
    case = suite.CASES[0]
    found = suite._child(0, "memory", case, ["--tiny"])
    assert found["ours"] >= 0 and "einsum" in found
    assert "failed" in suite._child(0, "time", type(case)(**{**case.__dict__, "isa": "mmx"}), [])


def test_plots_are_of_the_committed_results():
    check = [sys.executable, BENCHMARKS / "plot.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, f"run python benchmarks/plot.py: {done.stdout}{done.stderr}"
