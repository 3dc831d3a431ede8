"""Seeded inputs and the instruction sets of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bagformer.ops import _native

MASKS = ("none", "random", "first_side_all", "all")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for every dtype up to its rounding."""
    made = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return made.to(dtype)


def mask(*shape: int, seed: int = 0, keep: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)) < keep


def masks(kind: str, texts: tuple[int, ...], images: tuple[int, ...], seed: int = 0):
    """``(text_mask, image_mask)`` of a kind of ``MASKS``; in ``first_side_all`` the first text and
    the first image are wholly masked."""
    if kind == "none":
        return None, None
    text, image = mask(*texts, seed=seed), mask(*images, seed=seed + 1)
    if kind == "first_side_all":
        text[:1], image[:1] = False, False
    if kind == "all":
        text[:], image[:] = False, False
    return text, image


def instruction_sets() -> list:
    """Every level of ``BAGFORMER_CPU_ISA``, those that this machine lacks marked as skipped."""
    levels = _native.load().cpu_isas()
    best = levels.index(_native.load().best_cpu_isa())
    return [
        pytest.param(
            level,
            marks=pytest.mark.skipif(place > best, reason=f"this processor has no {level}"),
        )
        for place, level in enumerate(levels)
    ]


def same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    """Equal dtype, shape and bytes, NaN payloads included."""
    if first is None or second is None:
        return first is second
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*raw)
