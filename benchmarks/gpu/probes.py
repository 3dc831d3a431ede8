"""What the machine itself can do, measured in the same run: the ceilings of every fraction."""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from bagformer.kernels.primitives import nan_max

from gpu.device import Device
from gpu.timing import Timer

VALUES, WARPS = 8, 8  # values a thread keeps, so that no instruction waits for the one before it


@triton.jit
def maximum_kernel(source, out, rounds, SPAN: tl.constexpr):
    """Each round takes four maxima of vectors that hang together across rounds."""
    place = tl.arange(0, SPAN)
    a = tl.load(source + place)
    b = tl.load(source + SPAN + place)
    c = tl.load(source + 2 * SPAN + place)
    d = tl.load(source + 3 * SPAN + place)
    for _ in range(rounds):
        a = nan_max(a, b)
        b = nan_max(b, c)
        c = nan_max(c, d)
        d = nan_max(d, a)
    tl.store(out + tl.program_id(0) * SPAN + place, (a + b) + (c + d))


@triton.jit
def multiply_add_kernel(source, out, rounds, SPAN: tl.constexpr):
    """As ``maximum_kernel``, with four multiply-adds a round."""
    place = tl.arange(0, SPAN)
    a = tl.load(source + place)
    b = tl.load(source + SPAN + place)
    c = tl.load(source + 2 * SPAN + place)
    d = tl.load(source + 3 * SPAN + place)
    for _ in range(rounds):
        a = tl.fma(a, b, c)
        b = tl.fma(b, c, d)
        c = tl.fma(c, d, a)
        d = tl.fma(d, a, b)
    tl.store(out + tl.program_id(0) * SPAN + place, (a + b) + (c + d))


@triton.jit
def reread_kernel(source, out, blocks, rounds, SPAN: tl.constexpr):
    """Every program reads the same ``blocks`` again and again, each from a place of its own."""
    place = tl.arange(0, SPAN)
    total = tl.zeros((SPAN,), tl.float32)
    for step in range(rounds):
        block = (tl.program_id(0) * 7 + step) % blocks
        total += tl.load(source + block * SPAN + place, cache_modifier=".cg")
    tl.store(out + tl.program_id(0) * SPAN + place, total)


def _matmul(device: Device, timer: Timer, size: int, dtype: torch.dtype) -> float:
    """Operations a second of the library's own square product, on random data."""
    left, right = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    row = timer.run({"matmul": lambda: torch.mm(left, right, out=out)}, check_bits=False)["matmul"]
    return 2.0 * size**3 / row["median_ms"] * 1e3


def _copy(device: Device, timer: Timer, size: int) -> float:
    """Bytes a second of a copy within the device, read and written both counted."""
    source = torch.randn(size // 4, device=device.device)
    out = torch.empty_like(source)
    row = timer.run({"copy": lambda: out.copy_(source)}, check_bits=False)["copy"]
    return 2.0 * size / row["median_ms"] * 1e3


def _vector(device: Device, timer: Timer) -> dict[str, float]:
    """Time of as many maxima as multiply-adds: 2 where a maximum issues at half the rate."""
    span, rounds = 32 * WARPS * VALUES, 3 if device.dry else 4096
    programs = 2 if device.dry else 8 * device.describe()["multiprocessors"]
    source = torch.rand(4 * span, device=device.device) * 1e-3
    out = torch.empty(programs * span, device=device.device)

    def of(kernel: Any) -> Callable[[], Any]:
        return lambda: kernel[(programs,)](source, out, rounds, SPAN=span, num_warps=WARPS)

    rows = timer.run(
        {"maximum": of(maximum_kernel), "multiply_add": of(multiply_add_kernel)}, check_bits=False
    )
    done = 4.0 * rounds * span * programs
    return {
        "maxima_per_s": done / rows["maximum"]["median_ms"] * 1e3,
        "multiply_adds_per_s": done / rows["multiply_add"]["median_ms"] * 1e3,
        "maximum_over_multiply_add": rows["maximum"]["median_ms"]
        / rows["multiply_add"]["median_ms"],
    }


def _l2(device: Device, timer: Timer) -> float:
    """Bytes a second that all multiprocessors together read from 16 MB that the L2 holds."""
    span, rounds = 4096, 3 if device.dry else 2048
    blocks = 4 if device.dry else (16 << 20) // (4 * span)
    programs = 2 if device.dry else 4 * device.describe()["multiprocessors"]
    source = torch.randn(blocks * span, device=device.device)
    out = torch.empty(programs * span, device=device.device)
    row = timer.run(
        {"l2": lambda: reread_kernel[(programs,)](
            source, out, blocks, rounds, SPAN=span, num_warps=8)},
        check_bits=False,
    )["l2"]  # fmt: skip
    return 4.0 * span * rounds * programs / row["median_ms"] * 1e3


def ceilings(device: Device, seconds: float, matmul: int, copy_bytes: int) -> dict[str, Any]:
    """Rates of this machine, now; see the functions above for what each counts."""
    timer = Timer(device, seconds)
    found: dict[str, Any] = {
        "matmul_size": matmul,
        "matmul_bf16_flops": _matmul(device, timer, matmul, torch.bfloat16),
        "matmul_fp16_flops": _matmul(device, timer, matmul, torch.float16),
        "matmul_fp32_flops": _matmul(device, timer, matmul // 2, torch.float32),
        "copy_bytes_per_s": _copy(device, timer, copy_bytes),
        "l2_read_bytes_per_s": _l2(device, timer),
        "dry_run": device.dry,
        "state": device.state(),
    }
    return {**found, **_vector(device, timer)}
