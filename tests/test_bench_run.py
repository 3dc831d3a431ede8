"""The CPU suite judges before it times, and loses nothing when it is stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bagformer import reference

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAN = float("nan")
LIMIT = {"float32": 2e-5, "bfloat16": 2e-2}


@pytest.fixture
def suite(monkeypatch):
    """benchmarks/run.py with the contenders that take no warm-up."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run, measure = importlib.import_module("run"), importlib.import_module("measure")
    for name, op in measure.OPS.items():
        quick = [one for one in op.contenders if not one.package and "compiled" not in one.name]
        monkeypatch.setitem(measure.OPS, name, replace(op, contenders=tuple(quick)))
    monkeypatch.setattr(measure, "SIDE", 128)
    monkeypatch.setattr(measure, "COPIED", 1 << 16)
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def contend(monkeypatch, suite, *contenders):
    """Let these, behind ours, take part in ``maxsim``."""
    op = suite.OPS["maxsim"]
    monkeypatch.setitem(suite.OPS, "maxsim", replace(op, contenders=contenders))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled chains of multiply-adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        built = importlib.import_module("peak").build(tmp_path_factory.mktemp("peak"))
    if built is None:
        pytest.skip("no C++ compiler, or one that cannot build benchmarks/peak.cpp")
    return built


RIVALS = {
    "maxsim": {"seed_loops", "einsum", "one_matmul", "per_image_matmul"},
    "maxsim_topk": {"seed_loops", "einsum", "maxsim_then_topk"},
    "bag_pool": {"seed_loops", "index_add", "segment_reduce"},
    "l2_normalize": {"functional_normalize"},
    "contrastive_loss": {"cross_entropy"},
}


def test_every_kind_of_case_is_judged_and_timed(suite):
    for case in {(c.kind, c.dtype): c for c in suite.CASES}.values():
        small = case.tiny()
        found = suite.measure(small, 3, 0.1)
        ours = found["contenders"]["ours"]
        assert ours["ms"] > 0 and ours["error"] <= LIMIT[case.dtype], case
        assert RIVALS[case.op] <= found["contenders"].keys()
        told = [row for name, row in found["contenders"].items() if name != "ours_nested"]
        assert all("ms" in row for row in told), found["contenders"]
        assert found["matmul_gflops"] > 0 and found["copy_gbytes"] > 0
        nested = found["contenders"].get("ours_nested", {})
        assert ("ms" in nested) == (case.kind == "nested")


def test_the_peak_is_the_processors(suite, library):
    peak = importlib.import_module("peak")
    if peak.level_of("float32") not in peak.WORK:
        pytest.skip("our kernels run without vector instructions here")
    found = suite.measure(suite.CASES[0].tiny(), 3, 0.1, library=library)
    assert found["peak_of"] == peak.level_of("float32") and found["peak_gflops"] > 1
    assert 0 <= found["contenders"]["ours"]["of_peak"] < 1


def test_useful_work_is_counted_once_and_padding_never(suite):
    ragged = next(case for case in suite.CASES if case.kind == "ragged")
    assert int(ragged.bag_counts().sum()) == 8 * sum(range(3, 11))
    assert ragged.flops == 2.0 * 416 * 64 * 257 * 256
    nested = next(case for case in suite.CASES if case.kind == "nested")
    counts = nested.patch_counts()
    assert counts.min() >= 100 and counts.max() <= 257 and counts.unique().numel() > 30
    arguments = suite.OPS["maxsim"].arguments(nested)
    assert torch.equal(arguments[3].sum(1), counts) and arguments[2] is None
    pool = next(case for case in suite.CASES if case.kind == "pool")
    hidden, offsets = suite.OPS["bag_pool"].arguments(pool)
    assert pool.flops == hidden.numel()
    assert pool.bytes == 4 * (hidden.numel() + 256 * 25 * 768)
    assert (offsets[:, -1] == 50).all() and bool((offsets.diff(dim=1) == 0).any())


def test_a_wrong_kernel_ends_the_run(suite, monkeypatch, tmp_path):
    good = {one.name: one for one in suite.OPS["maxsim"].contenders}["seed_loops"]

    def wrong(*arguments):
        found = good.make(suite.CASES[0])(*arguments)
        return found[0], found[1] * 1.001

    contend(monkeypatch, suite, replace(good, name="ours", make=lambda case: wrong), good)
    found = suite.measure(suite.CASES[0].tiny(), 3, 0.1)
    assert found["wrong"].startswith("ours: wrong: error 0.00")
    monkeypatch.setattr(suite, "_child", lambda *_: found)
    out = tmp_path / "out.json"
    assert suite.main(["--only", "64 x 64", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["rows"][0]["wrong"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda to_image, to_text: (to_image * NAN, to_text),
        lambda to_image, to_text: (to_image, to_text[:1, :1]),
        lambda to_image, to_text: (to_image, to_text.t()),
        lambda to_image, to_text: (to_image, None),
        lambda to_image, to_text: (None, None),
        lambda to_image, to_text: (to_image, to_text * 1.001),
    ],
    ids=["nan", "one for all", "turned", "one direction", "no direction", "a thousandth"],
)
@pytest.mark.parametrize("name", ["ours", "ours_nested"])
def test_no_fault_of_ours_passes(suite, monkeypatch, spoil, name):
    ours = suite.OPS["maxsim"].contenders[0]
    case = next(case for case in suite.CASES if (case.kind, case.dtype) == ("nested", "bfloat16"))
    right = ours.make(case)
    wrong = replace(ours, name=name, make=lambda case: lambda *given: spoil(*right(*given)))
    contend(monkeypatch, suite, *([wrong] if name == "ours" else [ours, wrong]))
    assert suite.measure(case.tiny(), 3, 0.1)["wrong"].startswith(f"{name}: wrong: error ")


def put_in_the_last_place(tensor, wrong):
    spoiled = tensor.clone()
    spoiled.flatten()[-1] = wrong(spoiled.flatten()[-1])
    return spoiled


OUTSIDE = [
    ("scores", "bfloat16", 0, lambda number: number * 1.001),
    ("scores", "float32", 1, lambda number: number * 1.001),
    ("topk", "float32", 0, lambda number: number * 1.001),
    ("topk", "float32", 1, lambda place: (place + 1) % 10),
    ("pool", "float32", 0, lambda number: number + 0.001),
    ("normalize", "float32", 0, lambda number: number + 0.001),
]


@pytest.mark.parametrize("kind,dtype,place,wrong", OUTSIDE)
def test_a_wrong_entry_outside_of_the_slice_ends_the_run(
    suite, monkeypatch, capsys, kind, dtype, place, wrong
):
    case = next(case for case in suite.CASES if (case.kind, case.dtype) == (kind, dtype))
    case = replace(case.tiny(), texts=10, images=10, patches=18)
    ours = suite.OPS[case.op].contenders[0]
    right, spoilt = ours.make(case), []

    def spoil(*given):
        found = list(right(*given))
        if len(given[0]) == 10:  # all of the case, and not the slice
            spoilt.append(place)
            found[place] = put_in_the_last_place(found[place], wrong)
        return tuple(found)

    monkeypatch.setattr(suite, "CASES", (case,))
    monkeypatch.setattr(suite, "_child", lambda _i, what, _c, _e: suite.measure(case, 3, 0.1))
    monkeypatch.setattr(suite.peak, "build", lambda folder: None)
    monkeypatch.setattr(suite.sys, "platform", "none")  # no process for memory
    assert suite.main([]) == 0
    op = replace(suite.OPS[case.op], contenders=(replace(ours, make=lambda case: spoil),))
    monkeypatch.setitem(suite.OPS, case.op, op)
    assert suite.main([]) == 1 and spoilt
    assert f"ours, {case.name}, {dtype}: ours: wrong: error " in capsys.readouterr().err


def test_a_wrong_gradient_outside_of_the_slice_is_found(suite, monkeypatch):
    case = next(case for case in suite.CASES if (case.kind, case.dtype) == ("step", "float32"))
    case = replace(case.tiny(), texts=10, images=10)
    ours = suite.OPS["maxsim"].contenders[0]
    right = ours.make(case)

    def spoil(text, image, *masks):
        found = right(text, image, *masks)
        if len(text) < 10:
            return found
        # as much as before, with another gradient
        shift = text[-1].sum() - text[-1].sum().detach()
        return found[0] + 0.01 * shift, found[1]

    contend(monkeypatch, suite, ours)
    assert "wrong" not in suite.measure(case, 3, 0.1)
    contend(monkeypatch, suite, replace(ours, make=lambda case: spoil))
    assert suite.measure(case, 3, 0.1)["wrong"].startswith("ours: wrong: error ")


@pytest.mark.parametrize("kind", ["step", "ragged", "nested"])
def test_the_truth_in_parts_is_the_references(suite, monkeypatch, kind):
    contenders = importlib.import_module("contenders")
    monkeypatch.setattr(contenders, "HELD", 1000)  # a text at a time
    case = replace(next(case for case in suite.CASES if case.kind == kind).tiny(), kind=kind)
    text, image, *masks = suite.OPS["maxsim"].arguments(case)
    sides = [side.double().requires_grad_() for side in (text, image)]
    ours = contenders.truth(*sides, *masks)
    theirs = reference.maxsim(*sides, text_mask=masks[0], image_mask=masks[1])[:2]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(sum(one.sum() for one in both), sides) for both in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_ranks_are_judged_with_their_ties(suite):
    measure = importlib.import_module("measure")
    scores = torch.tensor([[3.0, 5.0, 5.0, 1.0, 5.0, 3.0, 2.99999999]], dtype=torch.float64)

    def fault(*ranks, scores=scores):
        return measure._misplaced(torch.tensor([ranks]), scores, 1e-6)

    assert fault(1, 2, 4, 0, 5) == 0 and fault(1, 2) == 0
    assert fault(1, 2, 4, 0, 6, 5) == 0, "6 is as good as 5 but for rounding"
    for wrong in [(2, 1), (1, 4), (1, 2, 4, 5), (1, 2, 4, 3), (1, 1, 2), (1, 2, 7), (-6, 2)]:
        assert fault(*wrong) == float("inf"), wrong
    assert fault(1, 2, scores=scores * float("nan")) == float("inf")
    assert measure._misplaced(torch.tensor([[1], [1]]), scores, 1e-6) == float("inf")


def test_a_rival_may_leave_a_direction_out_but_not_be_nan(suite, monkeypatch):
    ours = suite.OPS["maxsim"].contenders[0]
    right = ours.make(suite.CASES[0])
    half = replace(ours, name="half", make=lambda case: lambda *given: (right(*given)[0], None))
    nan = replace(ours, name="nan", make=lambda case: lambda *given: (right(*given)[0] * NAN, None))
    contend(monkeypatch, suite, ours, half, nan)
    found = suite.measure(suite.CASES[0].tiny(), 3, 0.1)["contenders"]
    assert found["half"]["ms"] > 0 and found["nan"] == {"skipped": "wrong: error inf"}


def test_no_call_always_follows_the_same_one(suite):
    measure, order = importlib.import_module("measure"), []
    calls = {name: lambda name=name: order.append(name) for name in "abcd"}
    times = measure._in_turn(calls, 40, 60.0)
    assert all(len(taken) == 40 for taken in times.values())
    assert all(set(order[at : at + 4]) == set(calls) for at in range(0, len(order), 4))
    followed = [first for first, second in pairwise(order) if second == "a"]
    assert all(followed.count(name) > 4 for name in "bcd")


def test_memory_that_rounds_to_nothing_is_measured(suite):
    case = replace(suite.CASES[0], goals=(("memory", 0.05),))
    peaks = {"ours": {"peak_extra_mb": 0.0}, "einsum": {"peak_extra_mb": 9.0}}
    goal = suite.judge_goals(case, {"contenders": peaks}, [])[0]
    assert goal["reached"] == 0.0 and goal["met"]
    peaks["einsum"]["peak_extra_mb"] = 0.0
    assert suite.judge_goals(case, {"contenders": peaks}, [])[0]["met"] is None


def test_padding_is_judged_by_rates_of_the_same_run(suite):
    case = next(case for case in suite.CASES if case.kind == "nested")
    padded = {**replace(case, kind="scores").__dict__, "contenders": {"ours": {"of_matmul": 0.9}}}
    rates = {"ours": {"of_matmul": 0.6}, "ours_nested": {"of_matmul": 0.75}}

    def reached(found, *before):
        return suite.judge_goals(case, {"contenders": found}, list(before))[0]["reached"]

    assert reached(rates, {**padded, "threads": 2}, padded) == 1.2
    assert reached({"ours": rates["ours"]}, padded) == 1.5
    assert reached(rates) is None and reached({"ours": {}}, padded) is None
    assert reached(rates, {**padded, "contenders": {}}) is None


@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512vnni", "avx512bf16"])
def test_the_peak_of_every_level_is_known(suite, monkeypatch, level):
    peak = importlib.import_module("peak")
    monkeypatch.setattr(peak._native, "load", lambda: SimpleNamespace(cpu_isa=lambda: level))
    assert {peak.level_of("float32"), peak.level_of("bfloat16")} <= peak.WORK.keys()


def test_a_rival_that_is_wrong_absent_or_broken_is_written_down(suite, monkeypatch):
    def raises(case):
        raise RuntimeError("no driver")

    ours = suite.OPS["maxsim"].contenders[0]
    off = replace(ours, name="off", make=lambda case: lambda *_: (torch.zeros(4, 5), None))
    rivals = (
        off,
        replace(off, name="rough", inexact=1.0),
        replace(ours, name="absent", make=raises, package="no_such_package"),
        replace(ours, name="broken", make=raises),
    )
    contend(monkeypatch, suite, ours, *rivals)
    found = suite.measure(replace(suite.CASES[0].tiny(), texts=4, images=5), 3, 0.1)["contenders"]
    assert found["off"] == {"skipped": "wrong: error 1"}
    assert found["rough"]["error"] == 1 and found["rough"]["ms"] > 0
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
    ours = suite.OPS["maxsim"].contenders[0]
    contend(monkeypatch, suite, ours, replace(ours, name="lonely", alone=True))
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--out", str(out)])
    report = json.loads(out.read_text())
    assert report["schema_version"] == 1 and len(report["rows"]) == 1
    goals = {goal["against"]: goal["met"] for goal in report["rows"][0]["goals"]}
    assert goals == {"seed_loops": None, "matmul": True}
    assert "failed" in report["rows"][0]["contenders"]["lonely"]["skipped"]


def test_a_stop_while_one_case_is_measured_again_keeps_the_others(suite, monkeypatch, tmp_path):
    told = {"contenders": {"ours": {"error": 0.0, "ms": 1.0, "of_matmul": 0.9}}}
    child = {"time": lambda: json.loads(json.dumps(told)), "alone": dict, "memory": dict}
    monkeypatch.setattr(suite, "_child", lambda _i, what, _c, _e: child[what]())
    monkeypatch.setattr(suite.peak, "build", lambda folder: None)
    out = tmp_path / "out.json"
    assert suite.main(["--only", "64 x 64", "--out", str(out)]) == 0
    names = [row["name"] for row in json.loads(out.read_text())["rows"]]

    def stop(row):
        if row["dtype"] == "bfloat16":
            raise KeyboardInterrupt

    monkeypatch.setattr(suite, "show", stop)
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--only", "64 x 64, D", "--out", str(out), "--update"])
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == names


def test_one_case_is_measured_again_and_the_others_kept(suite, monkeypatch, tmp_path):
    found = {"contenders": {"ours": {"error": 0.0, "ms": 1.0, "of_matmul": 0.9}}}
    monkeypatch.setattr(
        suite, "_child", lambda _i, what, _c, _e: {} if what == "memory" else json.loads(told)
    )
    monkeypatch.setattr(suite.peak, "build", lambda folder: None)
    told, out = json.dumps(found), tmp_path / "out.json"
    assert suite.main(["--only", "AVX2", "--out", str(out)]) == 0
    first = json.loads(out.read_text())
    found["contenders"]["ours"]["ms"] = 2.0
    told = json.dumps(found)
    assert suite.main(["--only", "D=128", "--out", str(out), "--update"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["contenders"]["ours"]["ms"]) for row in rows] == [
        ("64 x 64, AVX2", 1.0),
        ("64 x 64, D=128", 2.0),
    ]
    assert rows[0]["commit"] == first["commit"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_case_runs_in_a_process_of_its_own(suite):
    case = suite.CASES[0]
    found = suite._child(0, "memory", case, ["--tiny"])
    assert found["ours"] >= 0 and "einsum" in found
    assert "failed" in suite._child(0, "time", replace(case, isa="mmx"), [])


def test_the_entries_for_pytest_benchmark_run():
    command = [sys.executable, "-m", "pytest", "-q", BENCHMARKS / "bench_cpu.py"]
    chosen = ["-k", "l2_normalize and not compiled and not step", "--benchmark-disable"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


def test_plots_are_of_the_committed_results():
    check = [sys.executable, BENCHMARKS / "plot.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, f"run python benchmarks/plot.py: {done.stdout}{done.stderr}"
