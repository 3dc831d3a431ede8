"""Runs tests/interpreted/ in the Triton interpreter, one process for each file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/interpreted/ runs on the GPU here"),
    pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
        reason="the interpreter of Triton 3.6 fails in loops of a length known at run time",
    ),
]
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_agree_with_the_reference(path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT,
        # tiles are small: a BLAS that starts threads for each product is ten times slower
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout, done.stdout
