"""L2 normalisation through the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from bagformer.ops._triton import on_device


def forward(x: Tensor, eps: float) -> Tensor:
    from bagformer.kernels.normalize import l2_normalize_forward

    with on_device(x):
        return l2_normalize_forward(x, eps)


def backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    from bagformer.kernels.normalize import l2_normalize_backward

    with on_device(x):
        return l2_normalize_backward(grad, x, eps)
