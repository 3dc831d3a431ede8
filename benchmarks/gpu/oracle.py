"""The truth in float64, stated without any of the package's code, and the errors against it."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest allowed error: of a score relative to the largest score; of a gradient as the norm of the
# difference over the norm of the truth. Products of 16-bit features are exact in float32, so scores
# carry float32's rounding alone; 16-bit gradients are rounded twice, as selections and as results.
SCORE_LIMIT = 2e-5
GRADIENT_LIMIT = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}


def scores(text: Tensor, image: Tensor, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``text [Nt, N, D]`` with ``image [Ni, P, D]`` or ``[Nt, K, P, D]``, in float64.

    Gives ``[Nt, Ni]`` and ``[Ni, Nt]``, or ``[Nt, K]`` twice. Masked bags are left out.
    """
    text, image = text.double(), image.double()
    if image.dim() == 3:
        similarity = torch.tensordot(text, image, dims=([2], [2])).permute(0, 2, 1, 3)
    else:
        similarity = torch.matmul(text[:, None], image.transpose(2, 3))
    best_patch, best_bag = similarity.max(3).values, similarity
    if text_mask is not None:
        best_patch = best_patch * text_mask[:, None]
        outside = torch.zeros_like(text_mask, dtype=torch.float64).masked_fill(~text_mask, -1e300)
        best_bag = similarity + outside[:, None, :, None]
    to_image, to_text = best_patch.sum(2), best_bag.max(2).values.sum(2)
    return to_image, to_text.t() if image.dim() == 3 else to_text


def gradients(
    text: Tensor, image: Tensor, text_mask: Tensor | None, slopes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(slope * score)`` over both directions, in float64."""
    leaves = text.double().requires_grad_(), image.double().requires_grad_()
    found = scores(*leaves, text_mask)
    made = torch.autograd.grad(found, leaves, [slope.double() for slope in slopes])
    return made[0], made[1]


def score_error(found: Tensor, true: Tensor) -> float:
    """Largest difference, relative to the largest true score; inf where a score is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return ((found.double() - true).abs().max() / true.abs().max()).item()


def gradient_error(found: Tensor, true: Tensor) -> dict[str, float]:
    """``norm``: of the difference over that of the truth. ``largest``: relative to the largest."""
    if not bool(torch.isfinite(found).all()):
        return {"norm": float("inf"), "largest": float("inf")}
    gap = found.double() - true
    return {
        "norm": (gap.norm() / true.norm()).item(),
        "largest": (gap.abs().max() / true.abs().max()).item(),
    }
