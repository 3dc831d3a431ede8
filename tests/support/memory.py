"""How much memory a test's code takes: tensors made, and the peak of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_PEAK = 77
SUPPORT = str(Path(__file__).resolve().parent.parent)

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made while this was on."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        made = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.found = max([self.found, *made])
        return result


def high_water_mb() -> float:
    """Peak of this process's resident set, in MiB, since it began or :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_peak() -> float:
    """Start to measure; gives the peak that counts as nothing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        sys.exit(NO_PEAK)
    return high_water_mb()


def printed_by(program: str, *arguments: object) -> str:
    """What a program that measures its own peak prints; it may import ``support.memory``."""
    start = f"import sys; sys.path.append({SUPPORT!r})\n"
    command = [sys.executable, "-c", start + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == NO_PEAK:
        pytest.skip("the peak of the resident set cannot be reset here")
    assert done.returncode == 0, done.stderr
    return done.stdout
