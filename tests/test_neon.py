"""Every level of the CPU kernels against plain loops in C++, without torch: those of this machine,
and those of 64-bit Arm, cross-compiled and emulated."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bagformer import _C

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted(path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.name != "bindings_cpu.cpp"),
    ROOT / "tests/cpp/levels.cpp",
]
FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
ARM_COMPILER = "aarch64-linux-gnu-g++"
# by its path: run() passes no PATH on
ARM_MACHINE = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
# what qemu calls a processor, and the level to be chosen on it
ARM_PROCESSORS = {"max": "neonbf16", "neoverse-n1": "neondotprod", "cortex-a53": "neon"}


def build(compiler: str, folder: Path, *flags: str) -> Path:
    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    program = folder / "levels"
    subprocess.run([compiler, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program


def run(*command: object, level: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"BAGFORMER_CPU_ISA": level}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def digests(output: str) -> dict[str, list[str]]:
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("level ")]
    return {name: hashes for name, *hashes in rows}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("SKIPPED LOUDLY: there is no C++ compiler")
    return build(compiler, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    found = {ARM_COMPILER: shutil.which(ARM_COMPILER), "qemu-aarch64-static": ARM_MACHINE}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(
            f"SKIPPED LOUDLY: no {' and no '.join(missing)}; the kernels for 64-bit Arm are not "
            "tested (apt install g++-aarch64-linux-gnu qemu-user-static)"
        )
    return build(ARM_COMPILER, tmp_path_factory.mktemp("arm"), "-static")


@pytest.mark.skipif(sys.platform == "win32", reason="the harness takes setenv")
def test_levels_of_this_machine(native):
    done = run(native)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" cases, 0 failures\n")
    levels = _C.cpu_isas()
    best = levels.index(_C.best_cpu_isa())
    assert list(digests(done.stdout)) == levels[: best + 1]


@pytest.mark.parametrize("processor", list(ARM_PROCESSORS))
def test_arm_processors_take_their_best_level(arm, processor):
    best = ARM_PROCESSORS[processor]
    assert run(ARM_MACHINE, "-cpu", processor, arm, "best").stdout.split() == [best]
    done = run(ARM_MACHINE, "-cpu", processor, arm, level="avx2")
    assert done.returncode == 2
    assert done.stdout.startswith(
        "BAGFORMER_CPU_ISA must be scalar, neon, neondotprod or neonbf16; got 'avx2'"
    )
    if best != "neonbf16":
        done = run(ARM_MACHINE, "-cpu", processor, arm, level="neonbf16")
        assert (done.returncode, f"has at most {best}" in done.stdout) == (2, True)


def test_levels_of_arm(arm, native):
    done = run(ARM_MACHINE, "-cpu", "max", arm)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(" cases, 0 failures\n")
    found, own = digests(done.stdout), digests(run(native).stdout)
    assert list(found) == ["scalar", "neon", "neondotprod", "neonbf16"]
    if "avx2" in own:  # the same chains of fused multiply-adds: all kinds but float64, the last
        assert found["neon"][:-1] == own["avx2"][:-1]
