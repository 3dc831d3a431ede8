"""Kernel tests: on a GPU as they are, else in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and an interpreted kernel cannot be compiled in
the same process, so without a GPU this folder is collected only where the variable is set:
``tests/test_kernels_interpreter.py`` starts that process.
"""

from __future__ import annotations

import os

import pytest
import torch
from support import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

if INTERPRETED:
    torch.set_num_threads(1)
    interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
