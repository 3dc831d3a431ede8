"""The Triton kernels: whether they can serve a call, and what every adapter does before a launch.

Neither triton nor ``bagformer.kernels`` is imported here: the adapters do so when a call runs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
INSTALL = "python -m pip install 'triton>=3.6'"
# of float32 products; those of two 16-bit numbers are exact in every one of them
PRECISIONS = {"fp32": "ieee", "tf32": "tf32", "bf16": "bf16"}
FARTHEST = 1 << 31  # the kernels' offsets inside one text or image are 32-bit


@functools.cache
def available() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve tensors of ``dtype`` on ``device``, or None where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the Triton kernels need CUDA tensors, got tensors on {device}"
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, got {dtype}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs, and this PyTorch is built for AMD"
    if device.type == "cuda" and torch.cuda.is_initialized():
        capability = _capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"the Triton kernels need compute capability 8.0, this GPU has {capability}"
    return None


def load_error() -> str:
    return f"triton is not installed ({INSTALL})"


def on_device(tensor: Tensor) -> Any:
    """Launches go to the current device: enter the tensor's own; on a CPU this does nothing."""
    return torch.cuda.device_of(tensor)


def precision_of(dtype: torch.dtype, precision: str) -> str:
    """The kernels' word for ``precision``; 16-bit features know only one."""
    return PRECISIONS[precision] if dtype == torch.float32 else "ieee"


def near(name: str, features: Tensor) -> Tensor:
    """``features [..., L, D]`` such that an item's offsets fit in 31 bits, copied if need be.

    Raises:
        ValueError: one item alone has 2**31 elements or more.
    """
    length, width = features.shape[-2:]
    if length * width >= FARTHEST:
        raise ValueError(
            f"one item of {name} must hold fewer than 2**31 elements for the Triton kernels, got "
            f"{length} x {width}; pass backend='torch'"
        )
    reach = length * features.stride(-2) + width * features.stride(-1)
    return features if reach < FARTHEST else features.contiguous()
