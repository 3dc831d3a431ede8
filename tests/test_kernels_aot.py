"""Kernels compile for GPUs that are not here, and the machine code is what the tables plan.

Compiled afresh in a process of its own: an interpreted kernel cannot be compiled, and a cache could
hold what an older kernel gave.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
LOSS = ("contrastive_rows_kernel", "contrastive_sum_kernel", "contrastive_gradient_kernel")
SCORING = (
    "maxsim_forward_kernel",
    "maxsim_quantized_kernel",
    "grad_text_kernel",
    "grad_image_kernel",
)


RESULTS = ROOT / "benchmarks" / "results"
# Spilled instructions that no tile mends without costing more; docs/kernels.md has the list.
_JOINT = "bf16 D=256, text masks, image masks, mean, 32x128/128/128 slot 8/16/32"
_AGAIN = "bf16 D=256, winners again, text masks"
KNOWN_SPILLS: dict[str, dict[tuple[str, str, str], int]] = {
    "3.8.0": {
        ("sm_80", "maxsim_forward_kernel", "bf16 D=384 argmax, 64x64 slot 32"): 12,
        ("sm_80", "maxsim_forward_kernel", "bf16 D=256 argmax zero candidates, 64x32 slot 32"): 4,
        ("sm_80", "maxsim_forward_kernel", f"{_AGAIN}, 64x64 slot 8"): 2,
        ("sm_80", "maxsim_forward_kernel", f"{_AGAIN}, 64x64/64 slot 16/32"): 10,
        ("sm_80", "maxsim_quantized_kernel", "fp8 D=256, 64x64 slot 32"): 4,
        ("sm_90", "maxsim_forward_kernel", "bf16 D=256 argmax zero, 64x128/128 slot 16/32"): 8,
        ("sm_80", "grad_image_kernel", "bf16 D=256, image masks, mean, 128x32 slot 32"): 2,
        ("sm_80", "grad_image_kernel", "bf16 D=256, winners again, 128x32 slot 32"): 15,
        ("sm_100", "grad_text_kernel", _JOINT): 17,
    },
}

# How many kernels spill, and the most instructions of one.
SPILLS_OF_OLDER = {"3.6.0": (19, 80)}


@pytest.fixture(scope="module", params=TARGETS)
def rows(request, tmp_path_factory) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "aot_report.py"),
            "--json", "--quick", "--target", request.param,
        ],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    assert {row["target"] for row in found} == {request.param}
    return found


def _of_tensor_cores(rows: list[dict]) -> list[dict]:
    found = [row for row in rows if row["kernel"] in SCORING and "fp32" not in row["config"]]
    assert len(found) >= 8
    return found


def test_nothing_spills_but_what_is_known(rows):
    assert {row["kernel"] for row in rows} >= {
        *SCORING, "bag_pool_forward_kernel", "bag_pool_backward_kernel",
        "l2_normalize_forward_kernel", "l2_normalize_backward_kernel", "plan_kernel",
        "merge_kernel", "unpack_kernel", *LOSS,
    }  # fmt: skip
    known = KNOWN_SPILLS["3.8.0"]
    for row in rows:
        key = row["target"], row["kernel"], row["config"].rsplit(", ", 1)[0]
        assert row["spills"] <= known.get(key, 0), row
    assert all(row["programs_per_sm"] >= 1 for row in rows)


def test_matrix_units_are_the_target_s_own(rows):
    for row in _of_tensor_cores(rows):
        assert MATRIX[row["target"]] in row["mma"], row
    assert all(not row["mma"] for row in rows if row["config"].startswith("fp32")), "not true fp32"


def test_two_programs_share_a_multiprocessor(rows):
    """Up to 256 features and 64 bags; more fill the shared memory or the registers."""
    for row in _of_tensor_cores(rows):
        if not any(wide in row["config"] for wide in ("D=384", "D=512", "D=768", "slot 128")):
            assert row["programs_per_sm"] >= 2, row


@pytest.mark.parametrize("path", sorted(RESULTS.glob("aot_triton_*.json")), ids=lambda p: p.stem)
def test_what_spills_is_known_by_name(path):
    """Everything that is compiled for the report, with the newest Triton and with an older one."""
    report = json.loads(path.read_text(encoding="utf-8"))
    spilling = {
        (row["target"], row["kernel"], row["config"].rsplit(", ", 1)[0]): row["spills"]
        for row in report["rows"]
        if row["spills"]
    }
    if report["triton"] in SPILLS_OF_OLDER:
        assert (len(spilling), max(spilling.values())) == SPILLS_OF_OLDER[report["triton"]]
        return
    known = KNOWN_SPILLS[report["triton"]]
    assert {key: spilling[key] for key in spilling if spilling[key] > known.get(key, 0)} == {}
    assert known.keys() <= spilling.keys(), "mended: take it off the list and out of the docs"


def test_the_committed_report_is_of_these_kernels(rows):
    """Same kernels and configurations; with the same Triton, the same registers and bytes."""
    import triton

    path = RESULTS / f"aot_triton_{triton.__version__}.json"
    same = path.exists()
    committed = json.loads((path if same else RESULTS / "aot_triton_3.8.0.json").read_text())
    assert "not measurements" in committed["note"]
    known = {(row["kernel"], row["config"], row["target"]): row for row in committed["rows"]}
    for row in rows:
        key = row["kernel"], row["config"], row["target"]
        assert key in known, f"run `python benchmarks/aot_report.py --json`: {key} is new"
        assert not same or row == known[key]


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_operators_launch_compiles_and_fits(target, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    script = ROOT / "tests" / "support" / "offline_launches.py"
    done = subprocess.run(
        [sys.executable, str(script), target], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in found} == {
        *SCORING, "bag_pool_forward_kernel", "bag_pool_backward_kernel",
        "l2_normalize_backward_kernel", "plan_kernel", "merge_kernel", "unpack_kernel", *LOSS,
    }  # fmt: skip
    assert len({row["call"] for row in found}) == 9
    assert [row for row in found if row["programs_per_sm"] < 1] == []


def test_the_predicted_times_of_the_docs_are_those_of_the_report():
    """docs/kernels.md may not drift from the committed file."""
    report = json.loads((RESULTS / "aot_triton_3.8.0.json").read_text(encoding="utf-8"))
    times = {
        (row["kernel"], row["config"].rsplit(", ", 2)[0], row["target"]): row["predicted_ms"]
        for row in report["rows"]
        if row["predicted_ms"] is not None
    }
    kinds = {
        "forward, both directions": "maxsim_forward_kernel",
        "gradient of texts": "grad_text_kernel",
        "gradient of images": "grad_image_kernel",
    }
    found = 0
    for line in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        kind = next((name for name in kinds if cells[0].startswith(f"{name}, ")), None)
        if kind is None or len(cells) != 4:
            continue
        case = cells[0].removeprefix(f"{kind}, ")
        wanted = [f"{times[kinds[kind], case, target]:.1f}" for target in TARGETS]
        assert cells[1:] == wanted, line
        found += 1
    assert found == 10
