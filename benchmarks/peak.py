"""The processor's own multiply-add rate, by a few lines of C++ that are compiled on demand."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from bagformer.ops import _native

# operations of the twelve instructions of a round
WORK = {"avx2": 12 * 8 * 2, "avx512": 12 * 16 * 2, "avx512bf16": 12 * 32 * 2}
ROUNDS = 2_000_000


def build(folder: Path) -> Path | None:
    """The compiled library, or None where there is no compiler for it."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    library = folder / "peak.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", library]
    if compiler is None:
        return None
    done = subprocess.run([*command, Path(__file__).with_suffix(".cpp")], capture_output=True)
    return library if done.returncode == 0 else None


def level_of(dtype: str) -> str:
    """The instructions that our kernels multiply ``dtype`` with on this processor, or as forced."""
    active = str(_native.load().cpu_isa())
    if active == "avx512vnni" or (active == "avx512bf16" and dtype != "bfloat16"):
        return "avx512"
    return active


def chains(library: Path, dtype: str) -> tuple[Callable[[], None], float] | None:
    """A call that multiplies and adds on one thread, and its operations; None if none fits."""
    level = level_of(dtype)
    function = getattr(ctypes.CDLL(str(library)), level, None) if level in WORK else None
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_int64], None
    return lambda: function(ROUNDS), float(ROUNDS * WORK[level])
