"""Which code computes an operator: one visible choice, and a way to ask why."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from bagformer.ops import _maxsim_triton, _native, _triton
from bagformer.ops._checks import check_choice, check_tensor

BACKENDS = ("cpu", "triton", "torch", "reference")
OPERATORS = (
    "bag_pool",
    "contrastive_loss",
    "l2_normalize",
    "maxsim",
    "maxsim_candidates",
    "maxsim_pairs",
    "maxsim_quantized",
    "maxsim_topk",
    "maxsim_topk_screened",
)
ENVIRONMENT = "BAGFORMER_BACKEND"


class Choice(NamedTuple):
    backend: str
    reason: str


def choose_backend(
    op: str, device: torch.device, dtype: torch.dtype, override: str = "auto"
) -> Choice:
    """The backend of one operator call.

    - ``cpu``: the C++ kernels. ``triton``: the Triton kernels, for float32, bfloat16 and float16
      on NVIDIA GPUs. ``torch``: plain PyTorch in chunks, on any device. ``reference``: the slow
      truth of ``bagformer.reference``.
    - ``override`` wins over the environment variable ``BAGFORMER_BACKEND``, which wins over the
      default: ``cpu`` for CPU tensors where the extension is built, ``triton`` for CUDA tensors
      where it can serve them, else ``torch``.
    - With ``TRITON_INTERPRET=1`` in the environment ``triton`` may be asked for on CPU tensors too:
      they run, very slowly, in Triton's interpreter.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on ``device``.
        ImportError: ``cpu`` was asked for and the extension is not built, or ``triton`` and it is
            not installed.
    """
    asked, source = override, "backend="
    if asked == "auto":
        asked, source = os.environ.get(ENVIRONMENT) or "auto", f"{ENVIRONMENT}="
    check_choice(source.rstrip("="), asked, ("auto", *BACKENDS))
    if asked == "cpu":
        if device.type != "cpu":
            raise ValueError(f"{source}'cpu' needs CPU tensors, got tensors on {device}")
        _native.load()
    if asked == "triton":
        obstacle = _triton.obstacle(device, dtype)
        if obstacle:
            raise ValueError(f"{source}'triton': {obstacle}")
        if not _triton.available():
            raise ImportError(f"{source}'triton': {_triton.load_error()}")
    if asked != "auto":
        return Choice(asked, f"{source}{asked!r} asks for it")
    if device.type == "cuda":
        obstacle = _triton.obstacle(device, dtype)
        if obstacle is None and _triton.available():
            return Choice("triton", f"{dtype} tensors on {device.type} and triton is installed")
        return Choice("torch", obstacle or _triton.load_error())
    if device.type != "cpu":
        return Choice("torch", f"there are no kernels of our own for {device.type} tensors")
    if not _native.available():
        return Choice("torch", "the C++ extension is not built (pip install -e .)")
    return Choice("cpu", "CPU tensors and the C++ extension is built")


def explain_backend(op: str, *tensors: Tensor, backend: str = "auto") -> str:
    """Say which backend ``op`` would run on ``tensors`` with, and why.

    Args:
        op: one of ``bag_pool``, ``contrastive_loss``, ``l2_normalize``, ``maxsim``,
            ``maxsim_candidates`` (``maxsim`` of images ``[Nt, K, P, D]``), ``maxsim_pairs``,
            ``maxsim_quantized``, ``maxsim_topk``, ``maxsim_topk_screened``.
        tensors: the operator's tensors; the first decides device and dtype. Given text and image,
            the line for ``triton`` also says which tiles the scoring kernel would use.
        backend: what would be passed as ``backend=``.

    Raises:
        TypeError: one of ``tensors`` is not a tensor.
        ValueError: ``op`` is unknown, no tensor is given, or the operator would refuse the device,
            dtype or backend.
        ImportError: the backend asked for is not installed.
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
    if op == "maxsim_pairs":
        line += "; runs maxsim_candidates"
    if op == "maxsim_topk_screened":
        if first.device.type != "cpu":
            raise ValueError(
                f"{op} needs CPU tensors, got tensors on {first.device}; maxsim_topk serves them"
            )
        # its screen has int8 texts, which not every backend takes
        choose_backend("maxsim_quantized", first.device, torch.int8, backend)
        line += "; runs maxsim_quantized on int8 copies, then maxsim on what these leave"
    if choice.backend == "cpu":
        line += f"; {_native.describe()}"
    if choice.backend == "triton" and op.startswith("maxsim") and len(tensors) > 1:
        image = tensors[1][:, None] if op == "maxsim_pairs" else tensors[1]
        line += f"; {_maxsim_triton.describe(first, image)}"
    return line
