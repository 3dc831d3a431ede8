"""Reads NVIDIA machine code (SASS) with the disassembler that Triton ships."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "QGMMA", "QMMA", "IGMMA", "IMMA", "UTCQMMA")
# units that take a warp every second clock on each of the four schedulers
HALF_RATE = {
    "FMNMX", "FMNMX3", "FSEL", "SEL", "FSETP", "ISETP", "VIMNMX", "VIMNMX3", "IADD3", "LOP3",
    "PLOP3", "SHF", "LEA", "PRMT", "F2FP", "VIADD", "VIADDMNMX", "IABS", "P2R", "R2P", "FCHK",
}  # fmt: skip
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"^\s*(\.L_[\w$]+):")


@dataclass(frozen=True)
class Code:
    """Instructions of one kernel in order, and its loops as (first, last), innermost first."""

    registers: int
    instructions: list[tuple[str, str]]
    loops: list[tuple[int, int]]

    @property
    def spills(self) -> int:
        """Instructions that touch local memory."""
        return sum(op.startswith(("LDL", "STL")) for op, _ in self.instructions)

    @property
    def mma(self) -> str:
        """Kinds of matrix instructions, without their operands' modifiers."""
        kinds = {".".join(op.split(".")[:2]) for op, _ in self.instructions if _is_matrix(op)}
        return " ".join(sorted(kinds))

    def has(self, name: str) -> bool:
        return any(op.split(".")[0] == name for op, _ in self.instructions)

    def vector_cycles(self, inner_rounds: int = 1) -> float:
        """Clocks of one warp on each scheduler in a round of the hot loop, matrix units apart.

        The hot loop is, of those that multiply and hold no other that does, the one that multiplies
        most; where the maxima are taken outside it, the loop around it counts too, with
        ``inner_rounds`` of the inner one.
        """
        found = [loop for loop in self.loops if self._multiplies(loop)]
        if not found:
            return 0.0
        inner = [one for one in found if not any(_contains(one, other) for other in found)]
        hot = max(inner, key=self._multiplications)
        if inner_rounds == 1:
            return _clocks(self._ops(hot))
        around = next((loop for loop in self.loops if _contains(loop, hot)), hot)
        inner = _clocks(self._ops(hot))
        return _clocks(self._ops(around)) + (inner_rounds - 1) * inner

    def _ops(self, loop: tuple[int, int]) -> list[str]:
        return [op.split(".")[0] for op, _ in self.instructions[loop[0] : loop[1] + 1]]

    def _multiplies(self, loop: tuple[int, int]) -> bool:
        ops = Counter(self._ops(loop))
        return any(ops[name] for name in MATRIX) or ops["FFMA"] + ops["FFMA2"] >= 64

    def _multiplications(self, loop: tuple[int, int]) -> int:
        ops = Counter(self._ops(loop))
        return sum(ops[name] for name in MATRIX) or ops["FFMA"] + ops["FFMA2"]


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]


def _is_matrix(op: str) -> bool:
    return op.split(".")[0] in MATRIX


def _clocks(ops: list[str]) -> float:
    counted = Counter(ops)
    half = sum(counted[name] for name in HALF_RATE)
    shuffles = counted["SHFL"]
    # one instruction a clock; half-rate ones take two, a shuffle four of the shared unit's
    return max(sum(counted.values()), 2 * half, 4 * shuffles)


def disassemble(cubin: bytes) -> Code:
    """Machine code of a compiled kernel (``compiled.asm["cubin"]``)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        text = _run("nvdisasm", "-c", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise ValueError(f"cuobjdump printed no register count:\n{usage}")
    return Code(int(registers[1]), *_parse(text))


def _run(tool: str, *arguments: str) -> str:
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")
    return done.stdout


def _parse(text: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := INSTRUCTION.match(line):
            found.append((instruction[1], instruction[2]))
    loops = []
    for place, (op, arguments) in enumerate(found):
        target = re.search(r"\((\.L_[\w$]+)\)", arguments)
        if op.startswith("BRA") and target and labels.get(target[1], place + 1) <= place:
            loops.append((labels[target[1]], place))
    return found, sorted(loops, key=lambda loop: loop[1] - loop[0])
