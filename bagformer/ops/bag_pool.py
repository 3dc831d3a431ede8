"""Token rows into bag rows: ``bagformer::bag_pool`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops import _bag_pool_triton, _native
from bagformer.ops._checks import (
    check_choice,
    check_features,
    check_flag,
    check_mask,
    check_tensor,
)
from bagformer.ops._library import define, differentiate, dims
from bagformer.ops._nested import pad_nested
from bagformer.ops.backend import BACKENDS, choose_backend
from bagformer.ops.l2_normalize import check_eps, unit, unit_backward


def check_offset_values(offsets: Tensor, tokens: int) -> None:
    """Each row must rise, never fall, within ``0..tokens``. Looks at CPU tensors only: elsewhere
    it would stop the device, and there the bounds are clamped instead."""
    if offsets.device.type != "cpu" or offsets.numel() == 0:
        return
    outside = (offsets < 0) | (offsets > tokens)
    if bool(outside.any()):
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"offsets must lie within 0..T = {tokens}, got {int(offsets[row, place])} at row "
            f"{row}, place {place}"
        )
    falling = offsets.diff(dim=1) < 0
    if bool(falling.any()):
        row, place = falling.nonzero()[0].tolist()
        pair = offsets[row, place : place + 2].tolist()
        raise ValueError(
            f"offsets must never fall along a row, got {pair[0]} then {pair[1]} at row {row}, "
            f"places {place} and {place + 1}"
        )


def _safe_bounds(offsets: Tensor, tokens: int) -> Tensor:
    return offsets.to(torch.int64).clamp(0, tokens).cummax(dim=1).values


def _pool(hidden_states: Tensor, offsets: Tensor) -> Tensor:
    """Wide bag sums ``[B, N, D]`` in plain PyTorch."""
    batch, tokens, width = hidden_states.shape
    n_bags = offsets.shape[1] - 1
    wide = hidden_states.to(reference.accumulation_dtype(hidden_states.dtype))
    if wide.numel() == 0 or n_bags == 0:
        return wide.new_zeros(batch, n_bags, width)
    # two bags more for each row take the tokens before the first bound and after the last
    starts = torch.arange(batch, device=offsets.device)[:, None] * tokens
    bounds = _safe_bounds(offsets, tokens) + starts
    flat = torch.cat([torch.cat([starts, bounds], dim=1).view(-1), starts[-1] + tokens])
    pooled = torch.nn.functional.embedding_bag(
        torch.arange(batch * tokens, device=offsets.device),
        wide.reshape(batch * tokens, width),
        flat,
        mode="sum",
        include_last_offset=True,
    )
    return pooled.view(batch, n_bags + 2, width)[:, 1:-1]


def _zero_masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else torch.where(mask[..., None], rows, torch.zeros_like(rows))


def _empty_output(hidden_states: Tensor, offsets: Tensor) -> Tensor:
    batch, _, width = hidden_states.shape
    return hidden_states.new_empty([batch, offsets.shape[1] - 1, width])


def _run(
    hidden_states: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
    backend: str,
) -> Tensor:
    device, dtype = hidden_states.device, hidden_states.dtype
    chosen = choose_backend("bag_pool", device, dtype, backend).backend
    if chosen != "cpu":  # the C++ kernels look themselves, and say the same
        check_offset_values(offsets, hidden_states.shape[1])
    if chosen == "triton":
        return _bag_pool_triton.forward(hidden_states, offsets, mask, normalize, eps)
    output = _empty_output(hidden_states, offsets)
    if chosen == "cpu":
        _native.load().bag_pool(
            _native.view(hidden_states),
            _native.view(offsets),
            _native.optional_view(mask),
            normalize,
            eps,
            _native.view(output),
            _native.threads(),
        )
        return output
    if chosen == "reference":
        pooled = reference.bag_pool(hidden_states, offsets)
        unmasked = reference.l2_normalize(pooled, eps) if normalize else pooled
    else:
        pooled = _pool(hidden_states, offsets)
        unmasked = unit(pooled, eps) if normalize else pooled
    return output.copy_(_zero_masked(unmasked, mask))


def _run_backward(
    grad: Tensor,
    hidden_states: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    tokens: int,
    eps: float,
    backend: str,
) -> Tensor:
    """``hidden_states`` is needed, and given, only where the forward normalised."""
    chosen = choose_backend("bag_pool", grad.device, grad.dtype, backend).backend
    if chosen != "cpu":
        check_offset_values(offsets, tokens)
    if chosen == "triton":
        return _bag_pool_triton.backward(grad, hidden_states, offsets, mask, tokens, eps)
    batch, n_bags, width = grad.shape
    output = grad.new_empty([batch, tokens, width])
    if chosen == "cpu":
        _native.load().bag_pool_backward(
            _native.view(grad),
            _native.optional_view(hidden_states),
            _native.view(offsets),
            _native.optional_view(mask),
            eps,
            _native.view(output),
            _native.threads(),
        )
        return output
    wide = grad.to(reference.accumulation_dtype(grad.dtype))
    if hidden_states is not None:
        wide = unit_backward(wide, _pool(hidden_states, offsets), eps)
    wide = _zero_masked(wide, mask)
    if output.numel() == 0 or n_bags == 0:
        return output.zero_()
    places = torch.arange(tokens, device=grad.device).expand(batch, tokens).contiguous()
    bag = torch.searchsorted(_safe_bounds(offsets, tokens), places, right=True) - 1
    inside = (bag >= 0) & (bag < n_bags)
    rows = wide.gather(1, bag.clamp(0, n_bags - 1)[..., None].expand(-1, -1, width))
    return output.copy_(_zero_masked(rows, inside))


def _fake(
    hidden_states: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return _empty_output(hidden_states, offsets)


def _fake_backward(
    grad: Tensor,
    hidden_states: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    tokens: int,
    eps: float,
    backend: str,
) -> Tensor:
    return grad.new_empty([grad.shape[0], tokens, grad.shape[2]])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden_states, offsets, mask, normalize, eps, backend = inputs
    ctx.save_for_backward(hidden_states if normalize else None, offsets, mask)
    ctx.options = (hidden_states.shape[1], eps, backend)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    op = torch.ops.bagformer.bag_pool_backward
    return (op(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5)


def _flops(hidden_shape: Any, offsets_shape: Any, mask: Any, normalize: Any, *_: Any, **__: Any):
    batch, tokens, width = hidden_shape
    bags = offsets_shape[1] - 1
    return batch * width * (tokens + (3 * bags if normalize else 0))


def _backward_flops(grad_shape: Any, hidden_shape: Any, *_: Any, **__: Any) -> int:
    batch, bags, width = grad_shape
    return 0 if hidden_shape is None else batch * width * (hidden_shape[1] + 7 * bags)


define(
    "bag_pool(Tensor hidden_states, Tensor offsets, Tensor? mask, bool normalize, float eps, "
    "str backend) -> Tensor",
    _run,
    _fake,
    _flops,
)
define(
    "bag_pool_backward(Tensor grad, Tensor? hidden_states, Tensor offsets, Tensor? mask, "
    "SymInt tokens, float eps, str backend) -> Tensor",
    _run_backward,
    _fake_backward,
    _backward_flops,
)
differentiate("bag_pool", _backward, _setup_context)


def bag_pool(
    hidden_states: Tensor,
    bags: Any,
    *,
    mask: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    backend: str = "auto",
) -> Tensor:
    """Sum the token rows of each bag; on demand, normalise and mask in the same pass.

    Args:
        hidden_states: ``[B, T, D]`` float32, bfloat16, float16 or float64, any strides; or a
            jagged ``torch.nested`` tensor ``[B, j, D]``, whose rows are zeros from their end to
            the longest row's, T.
        bags: a ``bagformer.bags.Bags``, or its ``offsets [B, N + 1]`` int32 or int64: bag ``n`` of
            row ``b`` is tokens ``offsets[b, n]`` up to but not including ``offsets[b, n + 1]``.
        mask: bool ``[B, N]``; a bag where it is False becomes a zero vector without gradient,
            whatever its tokens hold. A ``Bags`` object's own mask is not applied unless passed.
        normalize: divide each bag row by its norm, clamped from below at ``eps``.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[B, N, D]`` in the dtype of ``hidden_states``, summed in token order in at least float32
        and rounded once. An empty bag is a zero vector. Differentiable once.

    Raises:
        TypeError: not a tensor, not a float, offsets that are not int32 or int64.
        ValueError: wrong rank, batch or device; offsets that fall or leave ``0..T`` (checked on
            CPU; on other devices they are clamped); unknown backend.

    Example:
        >>> hidden = torch.tensor([[[1.0], [2.0], [4.0]]])
        >>> bag_pool(hidden, torch.tensor([[0, 2, 2, 3]]))
        tensor([[[3.],
                 [0.],
                 [4.]]])
    """
    hidden_states, _ = pad_nested("hidden_states", hidden_states, "", None)
    check_features("hidden_states", hidden_states, ("[B, T, D]",))
    offsets = bags if isinstance(bags, Tensor) else getattr(bags, "offsets", bags)
    check_tensor("bags", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"bags' offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 2 or offsets.shape[1] < 1:
        raise ValueError(f"bags' offsets must have shape [B, N + 1], got {dims(offsets.shape)}")
    batch = hidden_states.shape[0]
    if offsets.shape[0] != batch:
        raise ValueError(
            f"bags' offsets must have B = {batch} rows as hidden_states, got {offsets.shape[0]}"
        )
    if offsets.device != hidden_states.device:
        raise ValueError(
            f"bags' offsets must be on the device of hidden_states ({hidden_states.device}), "
            f"got {offsets.device}"
        )
    if mask is not None:
        owner = offsets[:, 1:, None]
        check_mask("mask", mask, "the bags", owner)
    check_flag("normalize", normalize)
    check_eps(eps)
    check_choice("backend", backend, ("auto", *BACKENDS))
    return torch.ops.bagformer.bag_pool(hidden_states, offsets, mask, normalize, eps, backend)
