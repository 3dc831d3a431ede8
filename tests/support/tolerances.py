"""How far a result may be from the truth: never farther than PyTorch's own, plus a little."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to PyTorch's own error; relative to the largest true value.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 1e-3,
    torch.float16: 2e-4,
}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value (at least 1e-30)."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp_min(1e-30)
    return ((value.double() - truth.double()).abs().max() / scale).item()


def assert_no_worse(ours: Tensor, torch_own: Tensor, truth: Tensor, what: str = "") -> None:
    """Three-way judgement: our error against the float64 ``truth`` may exceed the error of
    ``torch_own``, PyTorch's result in the same dtype, by the tolerance of that dtype alone."""
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape}, expected {truth.shape}"
    allowed = relative_error(torch_own, truth) + TOLERANCES[torch_own.dtype]
    error = relative_error(ours, truth)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
