"""Jagged ``torch.nested`` tensors become a padded tensor and a mask at the border."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def pad_nested(
    name: str, features: Tensor, mask_name: str, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``[B, j, D]`` jagged becomes ``[B, max j, D]`` and its mask; anything else passes through.

    The longest length is read from the device, which waits for it.
    """
    if not is_nested(features):
        return features, mask
    if mask is not None:
        raise ValueError(f"{mask_name} must be None: the nested {name} has lengths of its own")
    jagged = _plain_jagged(name, features)
    lengths = jagged.offsets().diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    padded = torch.nested.to_padded_tensor(
        features, 0.0, (len(lengths), longest, features.shape[-1])
    )
    places = torch.arange(longest, device=features.device)
    return padded, places < lengths[:, None]


def map_rows(name: str, features: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` on the rows ``[sum of j, D]`` of a jagged ``[B, j, D]``: jagged as it came."""
    jagged = _plain_jagged(name, features)
    rows = run(jagged.values())
    # the same offsets: PyTorch then knows that both have the same lengths
    return torch.nested.nested_tensor_from_jagged(rows, jagged.offsets())


def is_nested(features: Any) -> bool:
    return isinstance(features, Tensor) and features.is_nested


def _plain_jagged(name: str, features: Tensor) -> Any:
    jagged: Any = features
    plain = features.layout == torch.jagged and features.dim() == 3
    if not plain or jagged.lengths() is not None or jagged._ragged_idx != 1:
        raise ValueError(
            f"{name} must be a contiguous jagged tensor [B, j, D] if nested "
            f"(torch.nested.nested_tensor(..., layout=torch.jagged)), got layout "
            f"{features.layout} with {features.dim()} dimensions; candidates [Nt, K, P, D] are "
            "padded, with a mask"
        )
    return jagged
