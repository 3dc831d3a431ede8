"""Compiles every kernel for GPUs that are not here, and reads the machine code.

``python benchmarks/aot_report.py --json`` prints one row for each kernel, configuration and target:
registers, spilled instructions, shared memory, programs that fit on a multiprocessor, the kind of
matrix instruction, and a time **predicted** from instruction counts (docs/kernels.md shows the
sum). Nothing is measured here.

The launchers run as they do in production, on tensors without storage; only the driver is replaced,
so what is compiled is exactly what a GPU would be given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent))
from aot_cases import cases, forward_cases
from bagformer.kernels import tiles
from machine_code import Code, disassemble


@dataclass(frozen=True)
class Target:
    """What a prediction assumes of a GPU; from vendors' data sheets, at the boost clock."""

    name: str
    capability: int
    family: str
    sms: int
    ghz: float
    terabytes: float  # a second, from memory
    l2_terabytes: float  # a second, from L2: an assumption
    flops_per_clock: int  # bfloat16, dense, one multiprocessor
    shared: int  # bytes a multiprocessor can give to programs


TARGETS = {
    "sm_80": Target("A100", 80, "sm_80", 108, 1.41, 2.0, 4.5, 2048, 164 << 10),
    "sm_90": Target("H200", 90, "sm_90", 132, 1.83, 4.8, 5.5, 4096, 228 << 10),
    "sm_100": Target("B200", 100, "sm_100", 148, 1.85, 7.7, 8.0, 8192, 228 << 10),
    "sm_86": Target("A10", 86, "small", 72, 1.695, 0.6, 2.0, 1024, 100 << 10),
    "sm_89": Target("L40S", 89, "small", 142, 2.52, 0.864, 4.0, 1024, 100 << 10),
    "sm_120": Target("RTX 5090", 120, "small", 170, 2.41, 1.79, 5.0, 512, 100 << 10),
}


@dataclass(frozen=True)
class Row:
    kernel: str
    config: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    programs_per_sm: int
    mma: str
    predicted_ms: float | None


@dataclass(frozen=True)
class Launch:
    name: str
    compiled: Any
    constants: dict[str, Any]
    grid: tuple[int, ...]
    warps: int
    stages: int


class _OfflineDriver:
    """Answers what Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps one target for each device number
        return self.target.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Launch]]:
    """Inside, launches compile for ``target`` and are listed instead of run.

    The process keeps the driver that was put in place: it is of no use for running kernels.
    """
    launches: list[Launch] = []
    run, family = JITFunction.run, tiles.family_of

    def record(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        metadata = compiled.metadata
        launches.append(
            Launch(self.__name__, compiled, options, grid, metadata.num_warps, metadata.num_stages)
        )

    driver.set_active(_OfflineDriver(target.capability))
    JITFunction.run, tiles.family_of = record, lambda device: target.family
    try:
        yield launches
    finally:
        JITFunction.run, tiles.family_of = run, family


def _programs_per_sm(code: Code, launch: Launch, target: Target) -> int:
    warps = launch.warps
    by_registers = 65536 // (-(-code.registers // 8) * 8 * 32 * warps)
    by_shared = target.shared // (launch.compiled.metadata.shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


@dataclass(frozen=True)
class Work:
    """The hot loop of a launch: its rounds, and what one round multiplies and streams from L2."""

    trips: float
    flops: float
    bytes: float


def _work(launch: Launch, shape: dict[str, int]) -> Work:
    const = launch.constants
    rows, cols = const["BLOCK_P"], const["BLOCK_N"]
    if isinstance(cols, tuple):
        (cols,) = cols
    tiles_of_image = -(-shape["patches"] // rows)
    size = shape["itemsize"]
    if launch.name == "maxsim_forward_kernel":
        head, tail, step, *_ = const["SHAPE"]
        depth = -(-shape["width"] // step) * step if step else head + tail
        streamed = (rows + (cols if step else 0)) * depth * size
        rounds = shape["images"] * tiles_of_image
        if any(const["SHARED"]):  # leftover rows take one tile a program
            rounds = shape["images"] * (shape["patches"] // rows) + launch.grid[1]
        return Work(launch.grid[0] * rounds, 2.0 * rows * cols * depth, streamed)
    span = const["SPAN"]
    if launch.name == "grad_text_kernel":
        trips = launch.grid[0] * launch.grid[1] * shape["images"] * tiles_of_image
        return Work(trips, 2.0 * rows * cols * span, rows * span * size)
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    slot = min(tiles.slot_of(shape["bags"]), tiles.LONGEST_PIECE)
    pieces = (1 if const["CANDIDATES"] else shape["texts"]) * -(-shape["bags"] // slot)
    trips = programs * -(-pieces // max(cols // slot, 1))
    return Work(trips, 2.0 * rows * cols * span, cols * span * size)


def _clocks(code: Code, launch: Launch, target: Target, shape: dict[str, int], work: Work) -> float:
    """Clocks of one round on one multiprocessor, by the model of docs/kernels.md."""
    rate = target.flops_per_clock
    if target.capability == 90 and not code.has("HGMMA"):
        rate //= 2
    if not code.mma:
        rate = 256  # 128 fused multiply-adds a clock outside the matrix units
    matrix = work.flops / rate
    _, tail, step = (launch.constants.get("SHAPE") or (0, 0, 0))[:3]
    rounds = -(-shape["width"] // step) if step else 1
    vector = code.vector_cycles(rounds) * launch.warps / 4
    l2 = work.bytes / (target.l2_terabytes * 1e3 / target.sms / target.ghz)
    latency = 120 if launch.stages > 1 else 1800 if tail else 900
    resident = max(1, _programs_per_sm(code, launch, target))
    return max(matrix, vector, l2, (matrix + vector + latency) / resident)


def _predict(code: Code, launch: Launch, target: Target, shape: dict[str, int]) -> float | None:
    """Milliseconds of the launch; None for a kernel that the model does not cover."""
    if "BLOCK_P" not in launch.constants or not code.loops:
        return None
    if launch.name == "maxsim_quantized_kernel":
        return None  # the model knows no rates of the instructions that widen numbers
    if len(launch.constants.get("RANKS", ())) > 0:
        return None  # which programs take which loop, the texts decide
    work = _work(launch, shape)
    clocks = _clocks(code, launch, target, shape, work)
    lists = shape["texts"] if launch.constants["CANDIDATES"] else 1
    rows = lists * shape["images"] * shape["patches"] + shape["texts"] * shape["bags"]
    memory = rows * shape["width"] * shape["itemsize"] / target.terabytes / 1e9
    return max(memory, work.trips * clocks / target.sms / target.ghz / 1e6)


def _joined(value: int | tuple[int, ...]) -> str:
    """One number, or one of each slot class that a launch serves."""
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _describe(launch: Launch, case: str) -> str:
    const = launch.constants
    parts = [case]
    if "BLOCK_P" in const:
        parts.append(
            f"{const['BLOCK_P']}x{_joined(const['BLOCK_N'])} slot {_joined(const['SLOT'])}"
        )
    return ", ".join([*parts, f"warps {launch.warps} stages {launch.stages}"])


def report(target_name: str, full: bool = True) -> list[Row]:
    """One row for each kernel that the cases launch on a target."""
    target, rows, seen = TARGETS[target_name], [], set()
    with compiling_for(target) as launches:
        listed = [] if target.family == "small" else cases(full)
        listed += forward_cases(target.family)
        for case, shape, launch_all in listed:
            launches.clear()
            launch_all(shape)
            for launch in launches:
                config = _describe(launch, case)
                if (launch.name, config) in seen:
                    continue
                seen.add((launch.name, config))
                code = disassemble(launch.compiled.asm["cubin"])
                predicted = _predict(code, launch, target, shape)
                rows.append(
                    Row(
                        launch.name, config, target_name, code.registers, code.spills,
                        launch.compiled.metadata.shared, _programs_per_sm(code, launch, target),
                        code.mma, None if predicted is None else round(predicted, 3),
                    )
                )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="only what the tests compile")
    options = parser.parse_args(argv)
    rows = [row for name in options.target or TARGETS for row in report(name, not options.quick)]
    if options.json:
        assumed = {name: asdict(target) for name, target in TARGETS.items()}
        note = "predicted_ms are predictions from instruction counts, not measurements"
        print(json.dumps(
            {"schema": 1, "note": note, "triton": triton.__version__, "assumed": assumed,
             "rows": [asdict(row) for row in rows]}, indent=1,
        ))  # fmt: skip
        return
    for row in rows:
        ms = "" if row.predicted_ms is None else f"{row.predicted_ms:.2f} ms predicted"
        print(
            f"{row.target:7} {row.kernel:28} {row.config:60} regs {row.registers:3} "
            f"spills {row.spills:3} shared {row.shared_bytes:6} x{row.programs_per_sm:<2} "
            f"{row.mma:28} {ms}"
        )


if __name__ == "__main__":
    main()
