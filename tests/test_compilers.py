"""csrc compiles without a warning with Clang too, for this machine and for 64-bit Arm.

GCC's build is tested everywhere else; a Clang of 14 or newer is what macOS has.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for path in sorted(ROOT.glob("csrc/*/*.cpp")) if "bindings" not in path.name]
FLAGS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
# the headers of Debian's cross compiler
ARM_HEADERS = Path("/usr/aarch64-linux-gnu/include")


@pytest.mark.parametrize("target", ["", "aarch64-linux-gnu"])
def test_clang_compiles_all_of_it(target):
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("SKIPPED LOUDLY: there is no clang++ (apt install clang)")
    if target and (not ARM_HEADERS.exists() or platform.machine() == "aarch64"):
        pytest.skip("SKIPPED LOUDLY: no headers for 64-bit Arm (apt install g++-aarch64-linux-gnu)")
    flags = [*FLAGS, *([f"--target={target}"] if target else [])]

    def complaints(source: Path) -> str:
        command = [clang, *flags, str(source)]
        return subprocess.run(command, capture_output=True, text=True).stderr[:2000]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(complaints, SOURCES))
    assert not any(found), "".join(found)
