"""Pieces of the GPU benchmark that its dry run does not reach: lost devices, goals, limits."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bagformer import reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(monkeypatch):
    """Imports a module that lies beside the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["seed_loops", "einsum", "per_image_matmul"])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_rivals_compute_the_same(load, name, masked):
    torch.manual_seed(0)
    text, image = torch.randn(3, 5, 8), torch.randn(4, 7, 8)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    mask = mask if masked else None
    found = load("rivals").PLAIN[name](text, image, mask)
    true = reference.maxsim(text, image, text_mask=mask)
    for mine, right in zip(found, true[:2], strict=True):
        torch.testing.assert_close(mine, right)


def test_the_oracle_agrees_with_the_reference(load):
    torch.manual_seed(0)
    text, image = torch.randn(3, 5, 8), torch.randn(4, 7, 8)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    for images in (image, torch.randn(3, 2, 7, 8)):
        true = reference.maxsim(text.double(), images.double(), text_mask=mask)
        for mine, right in zip(
            load("gpu.oracle").scores(text, images, mask), true[:2], strict=True
        ):
            torch.testing.assert_close(mine, right)


def failing(error: Exception):
    def call():
        raise error

    return call


def test_a_variant_that_fails_leaves_the_others_their_times(load):
    timer = load("gpu.timing").Timer(load("gpu.device").DryDevice(), 0.0)
    calls = {
        "full": failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")),
        "wrong": failing(ValueError("no such tile")),
        "good": lambda: torch.ones(2),
    }
    rows = timer.run(calls)
    assert [rows[name]["status"] for name in calls] == ["failed", "failed", "done"]
    assert "9 GiB" in rows["full"]["reason"] and "no such tile" in rows["wrong"]["reason"]
    assert rows["good"]["deterministic"] and rows["good"]["result_bytes"] == 8


def test_a_call_whose_bits_change_is_not_deterministic(load):
    timer = load("gpu.timing").Timer(load("gpu.device").DryDevice(), 0.0)
    assert timer.run({"random": lambda: torch.rand(9)})["random"]["deterministic"] is False


def test_a_lost_device_names_the_variant(load):
    timing = load("gpu.timing")
    timer = timing.Timer(load("gpu.device").DryDevice(), 0.0)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(timing.DeviceLostError) as caught:
        timer.run({"good": lambda: torch.ones(1), "rival": failing(error)})
    assert caught.value.variant == "rival"


def test_packages_are_not_tried_where_their_offsets_overflow(load):
    rivals, cases = load("gpu.rivals"), load("gpu.cases")
    variants, _ = rivals.packages(dry=True)
    plan = cases.real()
    first, second = variants["late_interaction_kernels"], variants["flash_maxsim"]
    for size, tried in ((1024, (True, True)), (2048, (False, True)), (4096, (False, False))):
        case = plan.in_batch(size)
        assert (first.limit(case, "step") is None, second.limit(case, "step") is None) == tried
        assert first.limit(case, "forward") is None and second.limit(case, "forward") is None
    assert second.limit(plan.short, "forward") is None


def run_with(load, monkeypatch, out: Path, scripts: list[str]) -> tuple[int, dict]:
    """The watching process with workers that are these scripts, which find the path in argv."""
    supervisor = load("gpu.supervisor")
    waiting = iter(scripts)

    def start(words, args, resume):
        return subprocess.Popen([sys.executable, "-c", next(waiting), str(out)])

    monkeypatch.setattr(supervisor, "_start", start)
    code = supervisor.main(["--out", str(out), "--dry-run"])
    return code, json.loads(out.read_text())


PREFIX = "import json, os, pathlib, sys; path = pathlib.Path(sys.argv[1])\n"
BEGIN = PREFIX + (
    "done, running = ({'status': status, 'rows': []} for status in ('done', 'running'))\n"
    "parts = {'machine': done, 'muge': running}\n"
    "path.write_text(json.dumps({'parts': parts, 'failures': [], 'finished': False,"
    "'dry_run': True, 'packages': {}}))\n"
)
GO_ON = PREFIX + (
    "doc = json.loads(path.read_text()); doc['finished'] = True\n"
    "doc['parts']['sizes'] = {'status': 'done', 'rows': []}\n"
    "path.write_text(json.dumps(doc))\n"
)


def test_a_worker_that_dies_costs_its_part_alone(load, monkeypatch, tmp_path, capsys):
    scripts = [BEGIN + "os.kill(os.getpid(), 11)", GO_ON]
    code, document = run_with(load, monkeypatch, tmp_path / "gpu.json", scripts)
    assert code == 1 and document["parts"]["muge"]["status"] == "crashed"
    assert document["parts"]["sizes"]["status"] == "done" and document["finished"]
    assert any("muge" in line for line in document["failures"])


def test_a_worker_that_overruns_is_stopped(load, monkeypatch, tmp_path, capsys):
    supervisor = load("gpu.supervisor")
    monkeypatch.setattr(supervisor, "_wait", lambda worker, deadline: worker.wait() or "x")
    monkeypatch.setattr(supervisor, "OVERTIME", "x")
    code, document = run_with(load, monkeypatch, tmp_path / "gpu.json", [BEGIN, *[GO_ON] * 9])
    assert document["parts"]["muge"]["status"] == "stopped" and not document["failures"]
    assert document["parts"]["compiled"] == {"status": "skipped", "reason": "the time was up"}
    assert code == 0


def test_goals_are_met_or_missed(load):
    def row(variant, mode, **more):
        return {"status": "done", "variant": variant, "mode": mode, **more}

    headline = [
        row("ours", "forward", median_ms=7.0, fraction_of_matmul=0.4),
        row("ours", "step", median_ms=30.0, peak_extra_bytes=9e8, result_bytes=6e8),
        row("late_interaction_kernels", "forward", median_ms=70.0),
        row("flash_maxsim", "forward", median_ms=28.0),
        row("einsum", "forward", median_ms=8.0),
        {"status": "failed", "variant": "flash_maxsim", "mode": "step", "reason": "no"},
    ]
    document = {"dry_run": False, "parts": {"headline": {"rows": headline}}}
    found = {
        goal["goal"]: (goal["measured"], goal["met"]) for goal in load("gpu.report").goals(document)
    }
    assert found["forward_ms"] == (7.0, True) and found["forward_fraction"] == (0.4, False)
    assert found["step_ms"] == (30.0, False) and found["step_extra_gb"] == (0.3, True)
    assert found["forward_over_rival"] == (4.0, False), "the faster of the packages counts"
    assert found["step_over_rival"] == (None, None) and found["muge_s"] == (None, None)


def test_a_document_with_nan_is_still_json(load, tmp_path):
    report = load("gpu.report")
    report.write(tmp_path / "gpu.json", {"a": float("nan"), "b": [1.23456789, float("inf")]})
    assert report.read(tmp_path / "gpu.json") == {"a": "nan", "b": [1.23457, "inf"]}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_signatures_that_changed_are_found(load):
    stubs, rivals = load("gpu.stubs"), load("gpu.rivals")
    known = stubs.MODULES["flash_maxsim"]
    assert rivals._compare(known, known) == []
    other = SimpleNamespace(**{**vars(known), "flash_maxsim": lambda query: None})
    del other.flash_maxsim_pairs_dense
    assert sorted(rivals._compare(other, known)) == ["flash_maxsim", "flash_maxsim_pairs_dense"]
