"""Contrastive loss of score matrices: ``bagformer::contrastive_loss`` and its backward."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops import _contrastive_loss_torch, _contrastive_loss_triton
from bagformer.ops._checks import (
    FLOATS,
    check_choice,
    check_no_tangent,
    check_no_transform,
    check_tensor,
)
from bagformer.ops._contrastive_loss_torch import Inputs
from bagformer.ops._library import define, differentiate, dims
from bagformer.ops.backend import BACKENDS, choose_backend

_ARGUMENTS = (
    "Tensor? text_to_image, Tensor? image_to_text, Tensor? positives, Tensor? temperature, "
    "Tensor? bias, float divisor, str objective, str backend"
)


LARGEST = sys.float_info.max
FIELDS = 6  # that the GPU kernels leave of each row


def _on_gpu(inputs: Inputs, backend: str) -> bool:
    first = inputs.any_scores
    return choose_backend("contrastive_loss", first.device, first.dtype, backend)[0] == "triton"


def _left(inputs: Inputs, kernels: bool) -> tuple[Tensor, Tensor]:
    """Unwritten room for what the forward leaves: of each row, and slopes by the numbers.

    PyTorch leaves nothing: it works out a softmax again sooner than three numbers of each row.
    """
    # shape, not len: a symbolic size stays one under torch.compile
    rows = sum(one.shape[0] for one in inputs.scores if one is not None)
    sizes = ([FIELDS, rows], [3]) if kernels else ([0, 0], [0])
    new = inputs.any_scores.new_empty
    return new(sizes[0], dtype=inputs.wide), new(sizes[1], dtype=inputs.wide)


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    inputs = Inputs(*given)
    if _on_gpu(inputs, backend):
        return _contrastive_loss_triton.forward(inputs)
    # a matrix of scores is small beside what made it: a CPU needs no kernel of its own
    return _contrastive_loss_torch.forward(inputs), *_left(inputs, False)


def _run_backward(
    grad: Tensor, rows: Tensor, slopes: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    inputs = Inputs(*given)
    if not _on_gpu(inputs, backend):
        first, second, scaled = _contrastive_loss_torch.backward(grad, inputs)
    elif rows.numel():
        first, second, scaled = _contrastive_loss_triton.backward(grad, inputs, rows, slopes)
    else:
        raise ValueError(
            "rows must be those that the forward of backend 'triton' left, got an empty tensor: "
            "the backend has changed between forward and backward"
        )
    none = inputs.any_scores.new_empty(0, 0)
    return none if first is None else first, none if second is None else second, scaled


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, backend = arguments
    inputs = Inputs(*given)
    loss = inputs.any_scores.new_empty([], dtype=inputs.wide)
    return loss, *_left(inputs, _on_gpu(inputs, backend))


def _fake_backward(
    grad: Tensor, rows: Tensor, slopes: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:-1])
    new = inputs.any_scores.new_empty
    first, second = (new([0, 0] if one is None else one.shape) for one in inputs.scores)
    return first, second, new([3], dtype=inputs.wide)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    *tensors, rows, slopes = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    op = torch.ops.bagformer.contrastive_loss_backward
    first, second, scaled = op(grad, rows, slopes, *tensors, *ctx.options)
    _, _, _, temperature, bias = tensors
    found = [
        first,
        second,
        None,
        None if temperature is None else scaled[0].reshape(temperature.shape).to(temperature.dtype),
        None if bias is None else scaled[1:].to(bias.dtype),
        *[None] * 3,
    ]
    return tuple(
        one if wanted else None for one, wanted in zip(found, ctx.needs_input_grad, strict=True)
    )


def _elements(shape: Any) -> int:
    return 0 if shape is None else shape[0] * shape[1]


def _flops(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """A division, a difference, a power and two sums of each score."""
    return 5 * (_elements(first) + _elements(second))


def _backward_flops(grad: Any, rows: Any, slopes: Any, *shapes: Any, **_: Any) -> int:
    return _flops(*shapes)


define(f"contrastive_loss({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _run, _fake, _flops)
define(
    f"contrastive_loss_backward(Tensor grad, Tensor rows, Tensor slopes, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _backward_flops,
)
differentiate("contrastive_loss", _backward, _setup_context)


def check_scores(text_to_image: Any, image_to_text: Any) -> tuple[Tensor, tuple[int, int]]:
    """One of the matrices, and numbers of texts and images; raises what is wrong with them."""
    given = [
        (name, one)
        for name, one in (("text_to_image", text_to_image), ("image_to_text", image_to_text))
        if one is not None
    ]
    if not given:
        raise ValueError("give text_to_image, image_to_text or both, got neither")
    for name, one in given:
        check_tensor(name, one)
        if one.layout != torch.strided or one.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be a dense tensor in float32, bfloat16, float16 or float64, got "
                f"{one.dtype} of layout {one.layout}"
            )
        if one.dim() != 2 or 0 in one.shape:
            raise ValueError(
                f"{name} must be a matrix of at least one text and one image, got {dims(one.shape)}"
            )
        check_no_tangent(name, one)
        check_no_transform(name, one)
    name, first = given[0]
    sizes = tuple(first.shape if name == "text_to_image" else first.shape[::-1])
    if len(given) == 2:
        if tuple(image_to_text.shape) != sizes[::-1]:
            raise ValueError(
                f"image_to_text must be {list(sizes[::-1])} as text_to_image is {list(sizes)}, "
                f"got {dims(image_to_text.shape)}"
            )
        if (image_to_text.dtype, image_to_text.device) != (first.dtype, first.device):
            raise TypeError(
                f"image_to_text must be in {first.dtype} on {first.device} as text_to_image is, "
                f"got {image_to_text.dtype} on {image_to_text.device}"
            )
    return first, (sizes[0], sizes[1])


def _check_positives(positives: Any, sizes: tuple[int, int], device: torch.device) -> None:
    if positives is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                "without positives, text b belongs to image b: expected as many texts as images, "
                f"got {sizes[0]} and {sizes[1]}"
            )
        return
    check_tensor("positives", positives)
    if positives.dtype != torch.bool:
        raise TypeError(f"positives must be bool, got {positives.dtype}")
    if tuple(positives.shape) != sizes:
        raise ValueError(f"positives must be {list(sizes)}, got {list(positives.shape)}")
    if positives.device != device:
        raise ValueError(f"positives must be on {device}, got {positives.device}")


def _check_number(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> None:
    check_tensor(name, value)
    if not value.is_floating_point() or tuple(value.shape) != shape:
        raise ValueError(
            f"{name} must be a float tensor {list(shape)}, got {value.dtype} {list(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    check_no_tangent(name, value)
    check_no_transform(name, value)


def contrastive_loss(
    text_to_image: Tensor | None,
    image_to_text: Tensor | None,
    *,
    positives: Tensor | None = None,
    temperature: Tensor | float | None = None,
    bias: Tensor | None = None,
    objective: str = "softmax",
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss of the score matrices of both directions, or of one.

    Logits are scores over ``temperature``. ``softmax``: a row's loss is the mean over its positives
    of -log softmax, cross-entropy. ``sigmoid``: the sum over its columns of -log sigmoid(z logit),
    z = 1 for a positive and -1 for any other pair, where ``bias`` of the direction is added to the
    logits. The mean over rows, then over directions. Nothing as large as the scores is kept for the
    backward but the scores themselves.

    Args:
        text_to_image: ``[Nt, Ni]`` or None; ``image_to_text`` ``[Ni, Nt]`` or None; not both None.
            float32, bfloat16, float16 or float64, any strides.
        positives: bool ``[Nt, Ni]``; None: text b belongs to image b alone. A row without one has
            NaN for its loss and its gradients.
        temperature: a positive number, or a tensor ``[]`` that may want a gradient; None: 1.
        bias: float ``[2]`` for text_to_image and image_to_text; ``sigmoid`` alone has one.
        objective: ``"softmax"`` or ``"sigmoid"``.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"torch"`` or ``"reference"``. All but
            ``triton`` compute it in plain PyTorch.

    Returns:
        ``[]`` in float32 (float64 for float64). Differentiable once, by the scores, temperature
        and bias; the same bits every time.

    Raises:
        TypeError, ValueError: what an argument is, and what was expected.
    """
    first, sizes = check_scores(text_to_image, image_to_text)
    _check_positives(positives, sizes, first.device)
    check_choice("objective", objective, reference.OBJECTIVES)
    check_choice("backend", backend, ("auto", *BACKENDS))
    divisor, given = 1.0, None
    if isinstance(temperature, Tensor):
        _check_number("temperature", temperature, (), first.device)
        given = temperature
    elif temperature is not None:
        number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
        if not number or not 0 < temperature <= LARGEST:
            raise ValueError(f"temperature must be a number above 0, got {temperature!r}")
        divisor = float(temperature)
    if bias is not None:
        if objective != "sigmoid":
            raise ValueError("bias: a softmax does not change by one; objective='sigmoid' has it")
        _check_number("bias", bias, (2,), first.device)
    return torch.ops.bagformer.contrastive_loss(
        text_to_image, image_to_text, positives, given, bias, divisor, objective, backend
    )[0]
