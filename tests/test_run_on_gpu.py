"""The GPU benchmark without a GPU: its dry run, what it writes, and what a stop leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason="the interpreter of Triton 3.6 fails in loops of a length known at run time",
)
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "run_on_gpu.sh"
PARTS = (
    "machine", "ceilings", "parity", "headline", "tests", "rerank", "muge", "short_texts",
    "training", "tiles", "sizes", "package_parity", "other_depth", "gradient_tiles", "muge_slice",
    "compiled",
)  # fmt: skip
PACKAGES = ("late_interaction_kernels", "flash_maxsim")


def start(out: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SCRIPT), "--installed", "--dry-run", "--out", str(out), *words],
        env={**os.environ, "PYTHON": sys.executable, "BAGFORMER_RIVAL_WHEELS": str(out.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(run: subprocess.Popen) -> str:
    printed, _ = run.communicate(timeout=560)
    return printed


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[dict, str]:
    """The document and the printed lines of a whole dry run."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    run = start(out)
    printed = finish(run)
    assert run.returncode == 0, printed
    assert list(out.parent.iterdir()) == [out], "temporary files stay behind"
    return json.loads(out.read_text()), printed


def rows(document: dict, part: str, **wanted) -> list[dict]:
    found = document["parts"][part]["rows"]
    return [row for row in found if all(row.get(k) == v for k, v in wanted.items())]


def test_every_part_runs(dry):
    document, printed = dry
    assert tuple(document["parts"]) == PARTS
    status = {name: part["status"] for name, part in document["parts"].items()}
    assert status == dict.fromkeys(PARTS, "done")
    assert document["finished"] and not document["failures"] and not document["excluded"]
    for part in document["parts"].values():
        # torch.compile alone may lack what it needs on a CPU
        assert not [row for row in part["rows"] if row.get("status") == "failed"], part
    assert printed.rstrip().splitlines()[-2].startswith("DRY RUN")


def test_the_document_says_where_it_comes_from(dry):
    document, _ = dry
    assert document["schema_version"] == 1 and document["kind"] == "gpu"
    assert document["dry_run"] is True
    assert torch.__version__.startswith(document["versions"]["torch"])
    assert {"commit", "dirty", "date", "machine", "budget_s"} <= document.keys()
    assert document["parts"]["machine"]["rows"][0]["name"].startswith("none")
    for name in PACKAGES:
        info = document["packages"][name]
        assert info["version"] or "no wheel" in info["reason"]


def test_every_time_is_marked_as_a_dry_run_s(dry):
    document, _ = dry
    timed = 0
    for part in document["parts"].values():
        for row in part["rows"]:
            if "median_ms" in row or "median_us" in row or "copy_bytes_per_s" in row:
                assert row["dry_run"] is True, row
                timed += 1
    assert timed > 50
    assert all(goal["met"] is None for goal in document["goals"])


def test_rows_hold_what_docs_promise(dry):
    document, _ = dry
    everyone = {"ours", "seed_loops", "einsum", *PACKAGES}
    for mode in ("forward", "step"):
        found = {row["variant"]: row for row in rows(document, "headline", mode=mode)}
        assert everyone <= found.keys()
        for row in found.values():
            assert row["median_ms"] > 0 and row["iqr_ms"] >= 0 and row["repeats"] >= 1
            assert row["deterministic"] in (True, False) and row["peak_extra_bytes"] >= 0
            assert row["useful_tflops"] > 0 and row["fraction_of_matmul"] > 0
    assert "flash_maxsim_invgrid" in {r["variant"] for r in rows(document, "headline", mode="step")}
    assert all(row["fraction_of_copy"] > 0 for row in rows(document, "rerank", variant="ours"))
    assert {row.get("direction") for row in rows(document, "muge", mode="top_k")} == {
        "text_to_image", "image_to_text",
    }  # fmt: skip
    assert len({row["label"] for row in document["parts"]["short_texts"]["rows"][:6]}) == 3
    assert rows(document, "training", variant="CUDA graph", replay_equals_eager=True)
    assert rows(document, "training", what="launches of training step")[0]["launches"] > 0
    assert {row["variant"] for row in rows(document, "compiled", mode="step")} >= {"torch.compile"}
    ceilings = document["parts"]["ceilings"]["rows"][0]
    assert ceilings["matmul_bf16_flops"] > 0 and ceilings["maximum_over_multiply_add"] > 0


def test_parity_is_judged_for_each_dtype_mask_and_form(dry):
    document, _ = dry
    judged = rows(document, "parity", variant="ours")
    assert all(row["ok"] for row in judged)
    assert {row["case"]["dtype"] for row in judged} == {"bfloat16", "float16", "float32"}
    assert {row["what"] for row in judged} == {"scores", "gradients"}
    assert any(row["case"]["real_bags"] for row in judged)
    assert any(row["case"]["form"] == "candidates" for row in judged)
    assert rows(document, "parity", variant="einsum", what="gradients"), "nothing to compare with"
    for name in PACKAGES:
        for row in rows(document, "package_parity", variant=name, what="scores"):
            assert max(row["errors"].values()) < 1e-2


def test_other_tiles_change_the_time_and_not_the_results(dry):
    document, _ = dry
    gaps = [row["gap"] for row in rows(document, "tiles", what="agreement")]
    assert gaps and max(gaps) < 1e-6
    gaps = [row["gap"] for row in rows(document, "gradient_tiles", what="agreement")]
    assert gaps and max(gaps) < 1e-2, "bfloat16 gradients of another tile"
    assert len({row["variant"] for row in rows(document, "tiles", mode="forward")}) > 1


def test_wrong_scores_make_it_fail(tmp_path):
    out = tmp_path / "gpu.json"
    run = start(out, "--spoil", "--parts", "parity")
    printed = finish(run)
    document = json.loads(out.read_text())
    assert run.returncode == 1, printed
    assert any("parity: scores" in line for line in document["failures"])
    assert "WRONG" in printed and document["parts"]["headline"]["status"] == "skipped"


def test_a_stop_loses_nothing_that_was_measured(tmp_path):
    out = tmp_path / "gpu.json"
    run = start(out, "--parts", "machine,ceilings,parity,headline,sizes")
    deadline = time.monotonic() + 280
    finished: list[str] = []
    while "ceilings" not in finished and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.1)
        if out.exists():
            parts = json.loads(out.read_text())["parts"]  # readable at any moment
            finished = [name for name, part in parts.items() if part["status"] == "done"]
    run.send_signal(signal.SIGTERM)
    printed = finish(run)
    assert run.returncode == 128 + signal.SIGTERM, printed
    document = json.loads(out.read_text())
    assert document["parts"]["ceilings"]["rows"] and not document["finished"], printed


def test_time_that_runs_out_is_recorded(tmp_path):
    out = tmp_path / "gpu.json"
    run = start(out, "--budget", "1")
    printed = finish(run)
    document = json.loads(out.read_text())
    assert run.returncode == 0 and document["finished"], printed
    assert "left" in document["parts"]["headline"]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_an_earlier_result_stays(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text("an earlier run's")
    done = subprocess.run(
        [sys.executable, str(SCRIPT.parent / "gpu"), "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert out.read_text() == "an earlier run's"


@pytest.mark.parametrize(
    "words,complaint",
    [
        (("--parts", "parity,speed"), "--parts: expected some of machine"),
        (("--out", str(ROOT / "benchmarks" / "results" / "gpu.json")), "a dry run must not write"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, words, complaint):
    run = start(tmp_path / "gpu.json", *words)
    assert complaint in finish(run) and run.returncode == 2
