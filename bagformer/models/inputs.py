"""Checks of a model's inputs, made once before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INDICES = (torch.int32, torch.int64)


def check_texts(
    embedding: Any, max_positions: int, input_ids: Any, attention_mask: Any, bags: dict[str, Any]
) -> None:
    """Raise TypeError or ValueError naming the argument that does not fit.

    ``embedding`` is the table of token vectors; ``bags`` holds ``bag_offsets`` and ``bag_mask``
    where the interaction needs them, else nothing. Ids are compared with the table on CPUs alone:
    elsewhere reading them would make the device wait.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask, **bags}
    for name, value in given.items():
        if name in bags and value is None:
            raise ValueError(
                "interaction='bagwise' needs bag_offsets [B, N + 1] and bag_mask [B, N], "
                "as BagFormerProcessor gives them"
            )
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be [B, T] with at least one text and token, "
            f"got {list(input_ids.shape)}"
        )
    if input_ids.dtype not in _INDICES:
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")
    if input_ids.shape[1] > max_positions:
        raise ValueError(
            f"input_ids: {input_ids.shape[1]} tokens, the model has {max_positions} positions"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)} as input_ids, "
            f"got {list(attention_mask.shape)}"
        )
    if bags:
        _check_bags(bags["bag_offsets"], bags["bag_mask"], len(input_ids))
    _check_devices(embedding.weight, given)
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= len(embedding.weight):
            raise ValueError(
                f"input_ids must lie within 0..{len(embedding.weight) - 1}, got {low}..{high}"
            )


def _check_bags(offsets: Tensor, mask: Tensor, batch: int) -> None:
    if offsets.dim() != 2 or offsets.shape[0] != batch or offsets.shape[1] < 2:
        raise ValueError(f"bag_offsets must be [{batch}, N + 1], got {list(offsets.shape)}")
    if mask.shape != (batch, offsets.shape[1] - 1):
        raise ValueError(
            f"bag_mask must be {[batch, offsets.shape[1] - 1]}, got {list(mask.shape)}"
        )


def _check_devices(weight: Tensor, given: dict[str, Any]) -> None:
    # weights that are offloaded lie on meta, and hooks bring them to their inputs
    expected = given["input_ids"].device if weight.device.type == "meta" else weight.device
    for name, value in given.items():
        if value is not None and value.device != expected:
            raise ValueError(f"{name} is on {value.device}, expected {expected}")


def check_pixels(weight: Tensor, pixel_values: Any, fixed_size: tuple[int, int] | None) -> None:
    """Raise TypeError or ValueError unless ``pixel_values`` is float ``[B, 3, H, W]`` beside
    ``weight``; ``fixed_size`` is the only (H, W) that the backbone takes, if there is one."""
    if not isinstance(pixel_values, Tensor):
        raise TypeError(f"pixel_values must be a tensor, got {type(pixel_values).__name__}")
    if not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values must be floating point, got {pixel_values.dtype}")
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values must be [B, 3, H, W], got {list(pixel_values.shape)}")
    if fixed_size is not None and tuple(pixel_values.shape[2:]) != tuple(fixed_size):
        rows, columns = fixed_size
        raise ValueError(
            f"pixel_values must be [B, 3, {rows}, {columns}], got {list(pixel_values.shape)}"
        )
    if weight.device.type != "meta" and pixel_values.device != weight.device:
        raise ValueError(f"pixel_values is on {pixel_values.device}, expected {weight.device}")
