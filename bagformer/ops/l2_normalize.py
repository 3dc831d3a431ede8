"""Unit vectors: ``bagformer::l2_normalize`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops import _l2_normalize_triton, _native
from bagformer.ops._checks import (
    FLOATS,
    check_choice,
    check_no_tangent,
    check_no_transform,
    check_tensor,
)
from bagformer.ops._library import define, differentiate
from bagformer.ops._nested import is_nested, map_rows
from bagformer.ops.backend import BACKENDS, choose_backend


def unit(wide: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / norm.clamp_min(eps)


def unit_backward(grad: Tensor, wide: Tensor, eps: float) -> Tensor:
    """Where the norm is clamped it is a constant, so that only the division has a gradient."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    clamped = norm.clamp_min(eps)
    direction = wide / clamped
    along = torch.where(norm < eps, 0.0, (grad * direction).sum(dim=-1, keepdim=True))
    return (grad - direction * along) / clamped


def check_eps(eps: Any) -> None:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def _run(x: Tensor, eps: float, backend: str) -> Tensor:
    chosen = choose_backend("l2_normalize", x.device, x.dtype, backend).backend
    if chosen == "triton":
        return _l2_normalize_triton.forward(x, eps)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if chosen == "cpu":
        rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
        flat = output.view(rows.shape)
        _native.load().l2_normalize(_native.view(rows), eps, _native.view(flat), _native.threads())
        return output
    if chosen == "reference":
        return output.copy_(reference.l2_normalize(x, eps))
    return output.copy_(unit(x.to(reference.accumulation_dtype(x.dtype)), eps))


def _run_backward(grad: Tensor, x: Tensor, eps: float, backend: str) -> Tensor:
    chosen = choose_backend("l2_normalize", x.device, x.dtype, backend).backend
    if chosen == "triton":
        return _l2_normalize_triton.backward(grad, x, eps)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if chosen == "cpu":
        shape = (-1 if x.numel() else 0, x.shape[-1])
        _native.load().l2_normalize_backward(
            _native.view(rows := grad.reshape(shape)),
            _native.view(inputs := x.reshape(shape)),
            eps,
            _native.view(output.view(shape)),
            _native.threads(),
        )
        del rows, inputs
        return output
    wide = reference.accumulation_dtype(x.dtype)
    return output.copy_(unit_backward(grad.to(wide), x.to(wide), eps))


def _fake(x: Tensor, eps: float, backend: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(grad: Tensor, x: Tensor, eps: float, backend: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, eps, backend = inputs
    ctx.save_for_backward(x)
    ctx.options = (eps, backend)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    op = torch.ops.bagformer.l2_normalize_backward
    return op(grad, *ctx.saved_tensors, *ctx.options), None, None


def _elements(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _flops(x_shape: Any, *_: Any, **__: Any) -> int:
    return 3 * _elements(x_shape)


def _backward_flops(grad_shape: Any, x_shape: Any, *_: Any, **__: Any) -> int:
    return 7 * _elements(x_shape)


define("l2_normalize(Tensor x, float eps, str backend) -> Tensor", _run, _fake, _flops)
define(
    "l2_normalize_backward(Tensor grad, Tensor x, float eps, str backend) -> Tensor",
    _run_backward,
    _fake_backward,
    _backward_flops,
)
differentiate("l2_normalize", _backward, _setup_context)


def l2_normalize(x: Tensor, eps: float = 1e-12, *, backend: str = "auto") -> Tensor:
    """Divide each vector of the last axis by its Euclidean norm, clamped from below at ``eps``.

    As ``torch.nn.functional.normalize(x, dim=-1)``: the norm is clamped, not its square, and a zero
    vector stays zero. Computed in float32 (float64 for float64), returned in the dtype of ``x``.

    Args:
        x: ``[..., D]`` float32, bfloat16, float16 or float64, any strides; or a jagged
            ``torch.nested`` tensor ``[B, j, D]``.
        eps: least norm, positive.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        A contiguous tensor of the shape and dtype of ``x``, jagged where ``x`` is. Differentiable
        once.

    Raises:
        TypeError: ``x`` is no float tensor or ``eps`` no number.
        ValueError: ``x`` has no axis, ``eps`` is not positive, unknown backend.

    Example:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    check_tensor("x", x)
    if is_nested(x):
        return map_rows("x", x, lambda rows: l2_normalize(rows, eps, backend=backend))
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got layout {x.layout}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check_no_tangent("x", x)
    check_no_transform("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., D], got a tensor without axes")
    check_eps(eps)
    check_choice("backend", backend, ("auto", *BACKENDS))
    return torch.ops.bagformer.l2_normalize(x, eps, backend)
