"""L2 normalisation of the last axis, forward and backward.

A program owns a few whole rows: it reads each once, reduces along the row in registers and writes
it once. Launchers trust their arguments (the ops check them), allocate, and launch on any device.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 4096  # 32 values a thread at 4 warps: two fp32 tiles stay in registers


@triton.jit(do_not_specialize=["n_rows"])
def l2_normalize_forward_kernel(
    x, y, n_rows, width, row_stride, eps, ROWS: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, SPAN)
    inside = (row < n_rows)[:, None] & (col < width)[None, :]
    start = row.to(tl.int64)[:, None]
    value = tl.load(x + start * row_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(value * value, 1))
    # written so that a NaN norm stays NaN
    norm = tl.where(norm < eps, eps, norm)
    value = tl.div_rn(value, tl.broadcast_to(norm[:, None], (ROWS, SPAN)))
    tl.store(y + start * width + col[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def l2_normalize_backward_kernel(
    grad, x, grad_x, n_rows, width, grad_stride, row_stride, eps,
    ROWS: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, SPAN)
    inside = (row < n_rows)[:, None] & (col < width)[None, :]
    start = row.to(tl.int64)[:, None]
    value = tl.load(x + start * row_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + start * grad_stride + col[None, :], mask=inside, other=0.0)
    slope = through_norm(slope.to(tl.float32), value, eps)
    tl.store(grad_x + start * width + col[None, :], slope, mask=inside)


@triton.jit
def through_norm(slope, value, eps):
    """Gradient of ``value / max(|value|, eps)`` along axis 1, for [rows, width] tiles.

    Below eps the norm is a constant, so only the division remains.
    """
    norm = tl.sqrt_rn(tl.sum(value * value, 1))
    small = norm < eps
    norm = tl.where(small, eps, norm)
    along = tl.sum(slope * value, 1)
    along = tl.where(small, 0.0, along / norm / norm)
    return (slope - value * along[:, None]) / norm[:, None]


def _plan(width: int) -> tuple[int, int, int]:
    """Rows of a tile, its width, warps."""
    span = triton.next_power_of_2(width)
    return max(1, TILE_ELEMENTS // span), span, 8 if span > TILE_ELEMENTS else 4


def _rows(x: Tensor) -> Tensor:
    """[rows, width] with unit stride along a row."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def l2_normalize_forward(x: Tensor, eps: float = 1e-12) -> Tensor:
    """``x [..., D]`` divided by its norm, clamped at ``eps``; same shape and dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    flat = _rows(x)
    rows, span, warps = _plan(flat.shape[1])
    grid = (triton.cdiv(flat.shape[0], rows),)
    l2_normalize_forward_kernel[grid](
        flat, y, *flat.shape, flat.stride(0), eps, ROWS=rows, SPAN=span, num_warps=warps
    )
    return y


def l2_normalize_backward(grad: Tensor, x: Tensor, eps: float = 1e-12) -> Tensor:
    """Gradient with respect to ``x`` in its dtype, from ``grad`` of the same shape."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    flat, slope = _rows(x), _rows(grad)
    rows, span, warps = _plan(flat.shape[1])
    grid = (triton.cdiv(flat.shape[0], rows),)
    l2_normalize_backward_kernel[grid](
        slope, flat, grad_x, *flat.shape, slope.stride(0), flat.stride(0), eps,
        ROWS=rows, SPAN=span, num_warps=warps,
    )  # fmt: skip
    return grad_x
