"""The C++ code under sanitizers, without Python and torch (tests/cpp/README.md).

The bag automaton always; the kernels, which take minutes to build, where BAGFORMER_SANITIZE=kernels
asks for them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPP = ROOT / "tests/cpp"
# each program's sources; csrc's bindings need Python
PROGRAMS = {"bags": "csrc/bags", "levels": "csrc/cpu"}
# stood in for: OpenMP's runtime is not built for sanitizers
FLAGS = ["-std=c++20", "-pthread", f"-I{CPP / 'std_threads'}", f"-I{ROOT / 'csrc'}"]
SANITIZERS = {
    "thread": ["-fsanitize=thread"],
    # the standard library's own checks see an index that leaves a span and not the memory
    "address": ["-fsanitize=address,undefined", "-D_GLIBCXX_ASSERTIONS"],
}
STOP = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}
ONLY_ASKED = pytest.mark.skipif(
    os.environ.get("BAGFORMER_SANITIZE") != "kernels",
    reason="takes minutes; BAGFORMER_SANITIZE=kernels asks for it",
)


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if sys.platform == "win32" or found is None:
        pytest.skip("SKIPPED LOUDLY: there is no C++ compiler with sanitizers")
    return found


def needs(sanitizer: str, folder: Path) -> None:
    """Skips where the compiler or this machine lacks ``sanitizer``."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = [compiler(), *FLAGS, *SANITIZERS[sanitizer], str(source), "-o", str(folder / "empty")]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode or subprocess.run([folder / "empty"], capture_output=True).returncode:
        pytest.skip(f"SKIPPED LOUDLY: {compiler()} has no sanitizer {sanitizer!r} that runs here")


def build(program: str, sanitizer: str, folder: Path, *flags: str) -> Path:
    needs(sanitizer, folder)
    flags = (*FLAGS, *SANITIZERS[sanitizer], *flags)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler(), *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    sources = sorted((ROOT / PROGRAMS[program]).glob("*.cpp"))
    sources = [path for path in sources if not path.name.startswith("bindings")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, CPP / f"{program}.cpp"]))
    target = folder / program
    subprocess.run([compiler(), *flags, *map(str, objects), "-o", str(target)], check=True)
    return target


def quiet(*command: object) -> str:
    """What a program prints that ends well and without a sanitizer's report."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | STOP)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stderr == ""
    return done.stdout.splitlines()[-1]


@pytest.mark.timeout(120)
def test_threads_share_an_automaton(tmp_path):
    program = build("bags", "thread", tmp_path, "-O0")
    assert quiet(program, "threads", 4) == "4 threads, 0 failures"


@pytest.mark.timeout(120)
def test_damaged_automata_are_searched_within_their_bytes(tmp_path):
    program = build("bags", "address", tmp_path, "-O0")
    line = quiet(program, "damage", 6000)
    assert re.fullmatch(r"6000 images: \d+ refused, \d+ contradict .*; 0 failures", line)
    assert quiet(program, "threads", 2) == "2 threads, 0 failures"


@ONLY_ASKED
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sanitizer", list(SANITIZERS))
def test_kernels(tmp_path, sanitizer):
    program = build("levels", sanitizer, tmp_path, "-O0" if sanitizer == "address" else "-O1")
    assert quiet(program, "threads", 3).endswith(" cases, 0 failures")
