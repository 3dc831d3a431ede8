"""Argument checks of the public functions: each is made once, before an operator is entered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bagformer.ops._library import dims

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_no_tangent(name: str, value: Tensor) -> None:
    """Operators of torch.library drop tangents: without this the answer would be a silent zero."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{name} carries a forward-mode tangent, but bagformer's operators are differentiable "
            "in reverse mode only. Use bagformer.reference for torch.func.jvp."
        )


def check_no_transform(name: str, value: Tensor) -> None:
    """PyTorch's own message for gradients by ``torch.func`` speaks of a class that no caller sees.

    Compiled code meets that one: the look at the tensor is no part of a graph.
    """
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_gradtrackingtensor(value) and value.requires_grad:
            raise RuntimeError(
                f"{name} is differentiated by torch.func (grad, vjp, jacrev), which bagformer's "
                "operators do not support: use backward() or torch.autograd.grad, or take "
                "bagformer.reference"
            )
        value = functorch.get_unwrapped(value)


def check_features(name: str, value: Any, layouts: Sequence[str]) -> None:
    """``layouts`` lists the accepted shapes as text, such as ``[Nt, N, D]``."""
    check_tensor(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    check_no_tangent(name, value)
    check_no_transform(name, value)
    if value.dim() not in [layout.count(",") + 1 for layout in layouts]:
        raise ValueError(f"{name} must have shape {' or '.join(layouts)}, got {dims(value.shape)}")


def check_alike(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """Same device, dtype and feature size."""
    if value.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name} ({first.device}), got {value.device}"
        )
    if value.dtype != first.dtype:
        raise TypeError(
            f"{name} must have the dtype of {first_name} ({first.dtype}), got {value.dtype}"
        )
    if value.shape[-1] != first.shape[-1]:
        raise ValueError(
            f"{name} must have the feature size D of {first_name} ({first.shape[-1]}), "
            f"got {value.shape[-1]}"
        )


def check_mask(name: str, mask: Any, owner_name: str, owner: Tensor) -> None:
    """A mask is bool, shaped as its features without the last axis, on their device."""
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = counts), got {mask.dtype}")
    if mask.shape != owner.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {dims(owner.shape[:-1])} as {owner_name}, "
            f"got {dims(mask.shape)}"
        )
    if mask.device != owner.device:
        raise ValueError(
            f"{name} must be on the device of {owner_name} ({owner.device}), got {mask.device}"
        )
