"""Any nest of plain values and tensors as JSON and safetensors, and back: nothing is pickled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _DICT, _FLOAT = "__tensor__", "__tuple__", "__dict__", "__float__"
_DTYPE = "__dtype__"


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """What JSON can hold of ``value``; tensors go into ``tensors`` under their path.

    Takes None, bool, int, float, str, dtypes, tensors, lists, tuples and dicts of them, with keys
    that are str or int. Raises TypeError, naming the path, for anything else.
    """
    if isinstance(value, Tensor):
        tensors[path or "value"] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path or "value"}
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{path}.{place}") for place, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise TypeError(f"{path}: a key must be str or int, got {key!r}")
            pairs.append([key, pack(item, tensors, f"{path}.{key}")])
        return {_DICT: pairs}
    raise TypeError(f"{path}: {type(value).__name__} cannot be stored without pickle")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What :func:`pack` was given. Raises KeyError for a tensor that is not there."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _FLOAT:
        return float(content)
    if kind == _DTYPE:
        return getattr(torch, content)
    if kind == _TUPLE:
        return tuple(unpack(item, tensors) for item in content)
    return {key: unpack(item, tensors) for key, item in content}


def to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors share no memory, as safetensors needs."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


__all__ = ["pack", "to_cpu", "unpack"]
