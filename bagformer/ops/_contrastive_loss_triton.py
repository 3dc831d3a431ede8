"""The contrastive loss through the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from bagformer.ops._contrastive_loss_torch import Inputs
from bagformer.ops._triton import on_device


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    from bagformer.kernels.contrastive_loss import contrastive_loss_forward

    with on_device(inputs.any_scores):
        return contrastive_loss_forward(
            *inputs.scores,
            inputs.positives,
            inputs.temperature,
            inputs.bias,
            inputs.divisor,
            inputs.softmax,
        )


def backward(
    grad: Tensor, inputs: Inputs, rows: Tensor, slopes: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    from bagformer.kernels.contrastive_loss import contrastive_loss_backward

    with on_device(inputs.any_scores):
        return contrastive_loss_backward(
            grad,
            *inputs.scores,
            rows,
            slopes,
            inputs.positives,
            inputs.temperature,
            inputs.bias,
            inputs.divisor,
            inputs.softmax,
        )
