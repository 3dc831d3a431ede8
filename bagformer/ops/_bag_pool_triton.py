"""Bag pooling through the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from bagformer.ops._triton import on_device


def forward(
    hidden_states: Tensor, offsets: Tensor, mask: Tensor | None, normalize: bool, eps: float
) -> Tensor:
    from bagformer.kernels.bag_pool import bag_pool_forward

    with on_device(hidden_states):
        return bag_pool_forward(hidden_states, offsets, mask, normalize, eps)


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
        return bag_pool_backward(grad, hidden_states, offsets, mask, tokens, eps)
