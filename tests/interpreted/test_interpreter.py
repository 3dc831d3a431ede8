"""What the patched interpreter must get right before any kernel can be judged with it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from bagformer.kernels.primitives import nan_max, reduce_max


@triton.jit
def _round_trip(source, target, n, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.arange(0, BLOCK)
    value = tl.load(source + index, mask=index < n, other=0.0)
    tl.store(target + index, value, mask=index < n)


@triton.jit
def _product(left, right, out, M: tl.constexpr, K: tl.constexpr):  # noqa: N803
    row, col = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(left + row[:, None] * K + col[None, :])
    b = tl.load(right + row[:, None] * K + col[None, :])
    tl.store(out + row[:, None] * M + row[None, :], tl.dot(a, tl.trans(b)))


@triton.jit
def _peak(source, out, WIDTH: tl.constexpr):  # noqa: N803
    value = tl.load(source + tl.arange(0, 16)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    value = nan_max(value, float("-inf"))
    tl.store(out + tl.arange(0, 16), reduce_max(value, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(device, dtype):
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-30, 65504.0])]).to(device)
    out = torch.empty(1004, dtype=dtype, device=device)
    _round_trip[(1,)](values, out, 1004, BLOCK=1024)
    assert torch.equal(out, values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_accumulate_in_float32(device, dtype):
    left, right = (torch.randn(16, 64, device=device).to(dtype) for _ in range(2))
    out = torch.empty(16, 16, device=device)
    _product[(1,)](left, right, out, M=16, K=64)
    torch.testing.assert_close(out, left.float() @ right.float().T, rtol=1e-5, atol=1e-4)


def test_maxima_propagate_nan(device):
    values = torch.randn(16, 32, device=device)
    values[3, 7] = float("nan")
    values[5] = float("-inf")
    out = torch.empty(16, device=device)
    _peak[(1,)](values, out, WIDTH=32)
    assert torch.equal(out.isnan(), values.amax(1).isnan())
    torch.testing.assert_close(out, values.amax(1), rtol=0, atol=0, equal_nan=True)
