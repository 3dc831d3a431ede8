"""Jagged ``torch.nested`` tensors become a padded tensor and a mask at the border."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pad_nested(
    name: str, features: Tensor, mask_name: str, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``[B, j, D]`` jagged becomes ``[B, max j, D]`` and its mask; anything else passes through."""
    if not (isinstance(features, Tensor) and features.is_nested):
        return features, mask
    if mask is not None:
        raise ValueError(f"{mask_name} must be None: the nested {name} has lengths of its own")
    jagged: Any = features
    if features.layout != torch.jagged or features.dim() != 3 or jagged.lengths() is not None:
        raise ValueError(
            f"{name} must be a contiguous jagged tensor [B, j, D] if nested "
            f"(torch.nested.nested_tensor(..., layout=torch.jagged)), got layout "
            f"{features.layout} with {features.dim()} dimensions"
        )
    lengths = jagged.offsets().diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    padded = torch.nested.to_padded_tensor(
        features, 0.0, (len(lengths), longest, features.shape[-1])
    )
    places = torch.arange(longest, device=features.device)
    return padded, places < lengths[:, None]
