"""Bag pooling through the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from bagformer.ops._triton import on_device


def _rising(offsets: Tensor, tokens: int) -> Tensor:
    """Offsets that rise within ``0..tokens``, made so on the device: looking would stop it.

    With bounds that fall, two programs would write one gradient row, or none would.
    """
    return offsets.clamp(0, tokens).to(torch.int32).cummax(dim=1).values


def forward(
    hidden_states: Tensor, offsets: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> Tensor:
    from bagformer.kernels.bag_pool import bag_pool_forward

    with on_device(hidden_states):
        bounds = _rising(offsets, hidden_states.shape[1])
        return bag_pool_forward(hidden_states, bounds, mask, normalize, eps)


def backward(
    grad: Tensor,
    hidden_states: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    tokens: int,
    eps: float,
) -> Tensor:
    """``hidden_states`` is given only where the forward normalised."""
    from bagformer.kernels.bag_pool import bag_pool_backward

    with on_device(grad):
        bounds = _rising(offsets, tokens)
        return bag_pool_backward(grad, hidden_states, bounds, mask, tokens, eps)
