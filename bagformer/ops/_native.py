"""The C++ extension: loading it, and handing tensors over to it.

The extension never links torch. A tensor crosses as ``(address, dtype code, shape, strides)``; the
C++ side checks ranks, sizes and dtypes of these views before it reads through any of them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bagformer.threads import thread_limit

extension: Any
LOAD_ERROR: ImportError | None = None
try:
    extension = importlib.import_module("bagformer._C")
except ImportError as error:
    extension, LOAD_ERROR = None, error

_DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.int8: 9,
    torch.float8_e4m3fn: 10,
}

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def available() -> bool:
    return hasattr(extension, "maxsim_forward")


def load() -> Any:
    """The extension module, or an ImportError that says how to build it."""
    if not available():
        raise ImportError(
            "bagformer's C++ extension is not built. Run `python -m pip install -e .` in the "
            "repository root (it needs a C++20 compiler), or pass backend='torch'. "
            f"The loader said: {LOAD_ERROR}"
        )
    return extension


def view(tensor: Tensor) -> View:
    """A typed view; it keeps nothing alive, so the tensor must outlive the call."""
    code = _DTYPE_CODES[tensor.dtype]
    return tensor.data_ptr(), code, tuple(tensor.shape), tuple(tensor.stride())


def optional_view(tensor: Tensor | None) -> View | None:
    return None if tensor is None else view(tensor)


def threads() -> int:
    return thread_limit()


def describe() -> str:
    """Instruction set and threads that the kernels would use now."""
    return f"instruction set {load().cpu_isa()}, {threads()} threads"
