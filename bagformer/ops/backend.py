"""Which code computes an operator: one visible choice, and a way to ask why."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from bagformer.ops import _native
from bagformer.ops._checks import check_choice, check_tensor

BACKENDS = ("cpu", "torch", "reference")
OPERATORS = ("bag_pool", "l2_normalize", "maxsim", "maxsim_candidates", "maxsim_topk")
ENVIRONMENT = "BAGFORMER_BACKEND"


class Choice(NamedTuple):
    backend: str
    reason: str


def choose_backend(
    op: str, device: torch.device, dtype: torch.dtype, override: str = "auto"
) -> Choice:
    """The backend of one operator call.

    - ``cpu``: the C++ kernels. ``torch``: plain PyTorch in chunks, on any device.
      ``reference``: the slow truth of ``bagformer.reference``.
    - ``override`` wins over the environment variable ``BAGFORMER_BACKEND``, which wins over the
      default: ``cpu`` for CPU tensors where the extension is built, else ``torch``.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on ``device``.
        ImportError: ``cpu`` was asked for and the extension is not built.
    """
    asked, source = override, "backend="
    if asked == "auto":
        asked, source = os.environ.get(ENVIRONMENT) or "auto", f"{ENVIRONMENT}="
    check_choice(source.rstrip("="), asked, ("auto", *BACKENDS))
    if asked == "cpu":
        if device.type != "cpu":
            raise ValueError(f"{source}'cpu' needs CPU tensors, got tensors on {device}")
        _native.load()
    if asked != "auto":
        return Choice(asked, f"{source}{asked!r} asks for it")
    if device.type != "cpu":
        return Choice("torch", f"there are no kernels of our own for {device.type} tensors")
    if not _native.available():
        return Choice("torch", "the C++ extension is not built (pip install -e .)")
    return Choice("cpu", "CPU tensors and the C++ extension is built")


def explain_backend(op: str, *tensors: Tensor, backend: str = "auto") -> str:
    """Say which backend ``op`` would run on ``tensors`` with, and why.

    Args:
        op: one of ``bag_pool``, ``l2_normalize``, ``maxsim``, ``maxsim_candidates``,
            ``maxsim_topk``.
        tensors: the operator's tensors; the first decides device and dtype.
        backend: what would be passed as ``backend=``.
    """
    check_choice("op", op, OPERATORS)
    if not tensors:
        raise ValueError("explain_backend needs at least one of the operator's tensors")
    for number, tensor in enumerate(tensors):
        check_tensor(f"tensors[{number}]", tensor)
    first = tensors[0]
    choice = choose_backend(op, first.device, first.dtype, backend)
    line = (
        f"{op} on {first.device.type} {first.dtype}: backend '{choice.backend}' ({choice.reason})"
    )
    if choice.backend == "cpu":
        line += f"; {_native.describe()}"
    return line
