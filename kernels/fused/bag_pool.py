"""Sum of token rows over the bags of a CSR table, with normalisation and mask fused in.

A program owns a few bags of one text, over the full width. It walks its bags' tokens in order, so
sums are added in token order in float32 and nothing is written by two programs. In the backward the
owner of a bag also owns the gradient rows of the bag's tokens.
"""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import torch
import triton
import triton.language as tl
from bagformer.kernels.normalize import through_norm
from torch import Tensor

TILE_ELEMENTS = 2048  # bags are one or two tokens long: small tiles waste fewer masked loads
MOST_BAGS = 128  # of one program
BATCH_SIZES = ["n_tokens", "n_bags", "offsets_stride", "mask_stride"]  # compiled once for all


@triton.jit
def _bounds(
    offsets, text, first, n_bags, n_tokens, text_stride, bound_stride, BAGS: tl.constexpr
):  # fmt: skip
    """Bag numbers of this program and their token ranges, which rise within ``0..n_tokens``.

    Each bound is the largest up to its place. Where a caller's offsets fall, two programs would
    else write one gradient row, or none would; on the host, looking at them would stop the device.
    """
    CUT: tl.constexpr = 1024 // BAGS
    bag = first + tl.arange(0, BAGS)
    row = offsets + text.to(tl.int64) * text_stride
    start = tl.zeros((BAGS,), tl.int32)
    end = tl.zeros((BAGS,), tl.int32)
    for low in range(0, first + BAGS + 1, CUT):
        place = low + tl.arange(0, CUT)
        bound = tl.load(row + place.to(tl.int64) * bound_stride, mask=place <= n_bags, other=0)
        bound = tl.minimum(tl.maximum(bound, 0), n_tokens).to(tl.int32)[None, :]
        before = place[None, :] - bag[:, None]
        start = tl.maximum(start, tl.max(tl.where(before <= 0, bound, 0), 1))
        end = tl.maximum(end, tl.max(tl.where(before <= 1, bound, 0), 1))
    return bag, start, end


@triton.jit
def _sum_tokens(base, start, end, token_stride, width, BAGS: tl.constexpr, SPAN: tl.constexpr):
    col = tl.arange(0, SPAN)
    total = tl.zeros((BAGS, SPAN), tl.float32)
    for step in range(tl.maximum(tl.max(end - start, 0), 0)):
        token = start + step
        inside = (token < end)[:, None] & (col < width)[None, :]
        row = base + token.to(tl.int64)[:, None] * token_stride + col[None, :]
        total += tl.load(row, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=BATCH_SIZES)
def bag_pool_forward_kernel(
    hidden, offsets, mask, out, n_tokens, n_bags, width, text_stride, token_stride,
    offsets_stride, bound_stride, mask_stride, keep_stride, eps,
    BAGS: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    text = tl.program_id(0)
    first = tl.program_id(1) * BAGS
    bag, start, end = _bounds(
        offsets, text, first, n_bags, n_tokens, offsets_stride, bound_stride, BAGS)  # fmt: skip
    base = hidden + text.to(tl.int64) * text_stride
    total = _sum_tokens(base, start, end, token_stride, width, BAGS, SPAN)
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(total * total, 1))
        norm = tl.where(norm < eps, eps, norm)
        total = tl.div_rn(total, tl.broadcast_to(norm[:, None], (BAGS, SPAN)))
    place = text.to(tl.int64) * n_bags + bag
    if MASKED:
        keep = mask + text.to(tl.int64) * mask_stride + bag * keep_stride
        keep = tl.load(keep, mask=bag < n_bags, other=0) != 0
        total = tl.where(keep[:, None], total, 0.0)
    col = tl.arange(0, SPAN)
    inside = (bag < n_bags)[:, None] & (col < width)[None, :]
    tl.store(out + place[:, None] * width + col[None, :], total, mask=inside)


@triton.jit(do_not_specialize=BATCH_SIZES)
def bag_pool_backward_kernel(
    grad, hidden, offsets, mask, grad_hidden,
    n_tokens, n_bags, width, text_stride, token_stride,
    offsets_stride, bound_stride, mask_stride, keep_stride, grad_stride, slope_stride, eps,
    BAGS: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    text = tl.program_id(0)
    first = tl.program_id(1) * BAGS
    bag, start, end = _bounds(
        offsets, text, first, n_bags, n_tokens, offsets_stride, bound_stride, BAGS)  # fmt: skip
    col = tl.arange(0, SPAN)
    keep = bag < n_bags
    if MASKED:
        place = mask + text.to(tl.int64) * mask_stride + bag * keep_stride
        keep = keep & (tl.load(place, mask=keep, other=0) != 0)
    inside = keep[:, None] & (col < width)[None, :]
    place = text.to(tl.int64) * grad_stride + bag.to(tl.int64) * slope_stride
    slope = tl.load(grad + place[:, None] + col[None, :], mask=inside, other=0.0)
    slope = slope.to(tl.float32)
    if NORMALIZE:
        base = hidden + text.to(tl.int64) * text_stride
        total = _sum_tokens(base, start, end, token_stride, width, BAGS, SPAN)
        # a masked bag's NaN must not reach its tokens as 0 * NaN
        total = tl.where(keep[:, None], total, 0.0)
        slope = through_norm(slope, total, eps)
    # tokens before the first bag and after the last get their zeros from those bags' owners
    low = tl.where(bag == 0, 0, start)
    high = tl.where(bag == n_bags - 1, n_tokens, end)
    high = tl.where(bag < n_bags, high, low)
    for step in range(tl.maximum(tl.max(high - low, 0), 0)):
        token = low + step
        own = (token >= start) & (token < end)
        row = (text.to(tl.int64) * n_tokens + token)[:, None] * width + col[None, :]
        value = tl.where(own[:, None], slope, 0.0)
        tl.store(grad_hidden + row, value, mask=(token < high)[:, None] & (col < width)[None, :])


def _plan(width: int, n_bags: int) -> tuple[int, int]:
    span = triton.next_power_of_2(width)
    bags = min(TILE_ELEMENTS // span, triton.next_power_of_2(n_bags), MOST_BAGS)
    return max(1, bags), span


def _strides(offsets: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    return (*offsets.stride(), *((0, 0) if mask is None else mask.stride()))


def bag_pool_forward(
    hidden: Tensor,
    offsets: Tensor,
    mask: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """``hidden [B, T, D]`` summed over ``offsets [B, N + 1]``: ``[B, N, D]``, same dtype.

    One launch. ``offsets`` int32 or int64, any strides; one that is out of ``0..T`` or falls along
    a row is moved to the nearest that is not. ``mask [B, N]`` bool zeroes the bags that are False,
    after ``normalize`` has divided each bag by its norm (clamped at ``eps``).
    """
    batch, n_tokens, width = hidden.shape
    n_bags = offsets.shape[1] - 1
    out = torch.empty(batch, n_bags, width, dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    bags, span = _plan(width, n_bags)
    bag_pool_forward_kernel[(batch, triton.cdiv(n_bags, bags))](
        hidden, offsets, mask, out,
        n_tokens, n_bags, width, hidden.stride(0), hidden.stride(1), *_strides(offsets, mask), eps,
        BAGS=bags, SPAN=span, MASKED=mask is not None, NORMALIZE=normalize, num_warps=4,
    )  # fmt: skip
    return out


def bag_pool_backward(
    grad: Tensor,
    hidden: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    n_tokens: int,
    eps: float = 1e-12,
) -> Tensor:
    """Gradient ``[B, T, D]`` of the hidden states from ``grad [B, N, D]``: 0 outside bags.

    One launch. ``hidden`` is given where the forward normalised, and None where it did not.
    """
    batch, n_bags, width = grad.shape
    shape = batch, n_tokens, width
    if grad.numel() == 0 or n_tokens == 0:
        return torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    grad_hidden = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    if hidden is not None and hidden.stride(2) != 1:
        hidden = hidden.contiguous()
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    strides = (0, 0) if hidden is None else (hidden.stride(0), hidden.stride(1))
    bags, span = _plan(width, n_bags)
    bag_pool_backward_kernel[(batch, triton.cdiv(n_bags, bags))](
        grad, hidden, offsets, mask, grad_hidden,
        n_tokens, n_bags, width, *strides, *_strides(offsets, mask),
        grad.stride(0), grad.stride(1), eps,
        BAGS=bags, SPAN=span, MASKED=mask is not None, NORMALIZE=hidden is not None, num_warps=4,
    )  # fmt: skip
    return grad_hidden
