"""Three-way judgement of a float result: the truth in float64, PyTorch's own result, ours."""

from __future__ import annotations

import torch
from torch import Tensor


def judge(ours: Tensor, theirs: Tensor, truth: Tensor, slack: float) -> None:
    """Our largest error is at most PyTorch's plus ``slack`` times the largest true value.

    NaN and infinities must stand where the truth has them.
    """
    wide, finite = truth.double(), truth.isfinite()
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    assert torch.equal(ours.isnan(), wide.isnan()), "NaN stands elsewhere than in the truth"
    if not finite.any():
        return
    scale = wide[finite].abs().max().item()
    allowed = (theirs.double() - wide)[finite].abs().max().item() + slack * max(scale, 1e-30)
    error = (ours.double() - wide)[finite].abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"
