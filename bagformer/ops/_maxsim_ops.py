"""The operators ``bagformer::maxsim`` and ``bagformer::maxsim_candidates`` with their backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops import _maxsim_cpu, _maxsim_torch, _maxsim_triton
from bagformer.ops._library import define, differentiate
from bagformer.ops._maxsim_torch import Options, argmax_dtype, narrow_argmax
from bagformer.ops.backend import choose_backend

_ARGUMENTS = (
    "Tensor text, Tensor image, Tensor? text_mask, Tensor? image_mask, "
    "str mask_mode, str directions, str reduction, bool argmax, str precision, str backend"
)
_BACKWARD_ARGUMENTS = (
    "Tensor? grad_text_to_image, Tensor? grad_image_to_text, Tensor text, Tensor image, "
    "Tensor? text_mask, Tensor? image_mask, Tensor text_argmax, Tensor image_argmax, "
    "str mask_mode, str reduction, str precision, str backend, bool wants_text, bool wants_image, "
    # last and optional: graphs that PyTorch cached on disk may call without
    "Tensor? plan=None"
)


def _outputs(
    text: Tensor, image: Tensor, options: Options, argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten outputs; one that is not wanted is empty and keeps its rank."""
    texts, bags, images, patches = *text.shape[:2], *image.shape[-3:-1]
    candidates = image.dim() == 4
    lead = [texts, images]
    turned = lead if candidates else [images, texts]
    wide = reference.accumulation_dtype(text.dtype)
    shapes = (
        (lead, options.wants_text, wide),
        (turned, options.wants_image, wide),
        ([*lead, bags], options.wants_text and argmax, argmax_dtype(patches)),
        ([*turned, patches], options.wants_image and argmax, argmax_dtype(bags)),
    )
    made = [
        text.new_empty(shape if wanted else [0] * len(shape), dtype=dtype)
        for shape, wanted, dtype in shapes
    ]
    return made[0], made[1], made[2], made[3]


def _chosen(text: Tensor, image: Tensor, backend: str) -> str:
    op = "maxsim" if image.dim() == 3 else "maxsim_candidates"
    return choose_backend(op, text.device, text.dtype, backend).backend


def run(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    mask_mode: str,
    directions: str,
    reduction: str,
    argmax: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, narrow winners, and what the Triton kernels' backward wants of the masks."""
    chosen = _chosen(text, image, backend)
    options = Options(mask_mode, directions, reduction, precision)
    if chosen == "triton":
        return _maxsim_triton.forward(text, image, text_mask, image_mask, options, argmax)
    outputs = _outputs(text, image, options, argmax)
    if chosen == "cpu":
        _maxsim_cpu.forward(text, image, text_mask, image_mask, options, outputs)
    elif chosen == "torch":
        _maxsim_torch.forward(text, image, text_mask, image_mask, options, outputs)
    else:
        _run_reference(text, image, text_mask, image_mask, options, outputs)
    return *outputs, _no_plan(text)


def _no_plan(text: Tensor) -> Tensor:
    return text.new_empty([0], dtype=torch.int32)


def _run_reference(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    options: Options,
    outputs: tuple[Tensor, ...],
) -> None:
    scores = reference.maxsim(
        text,
        image,
        text_mask=text_mask,
        image_mask=image_mask,
        mask_mode=options.mask_mode,
        directions=options.directions,
        reduction=options.reduction,
        return_argmax=outputs[2].numel() + outputs[3].numel() > 0,
    )
    fill(outputs, scores, image.shape[-2], text.shape[1])


def fill(
    outputs: Sequence[Tensor], scores: reference.MaxSimScores, n_patches: int, n_bags: int
) -> None:
    """Put what the reference found into the outputs that are wanted, which are not empty."""
    counts = (None, None, n_patches, n_bags)
    for score, output, count in zip(scores, outputs, counts, strict=True):
        if score is not None and output.numel():
            output.copy_(score if count is None else narrow_argmax(score, count))


def _fake(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    mask_mode: str,
    directions: str,
    reduction: str,
    argmax: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(text, image, Options(mask_mode, directions, reduction, precision), argmax)
    if _chosen(text, image, backend) == "triton":
        return *outputs, _maxsim_triton.new_plan(text, image, text_mask, image_mask, argmax)
    return *outputs, _no_plan(text)


def _run_backward(
    grad_text_to_image: Tensor | None,
    grad_image_to_text: Tensor | None,
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    text_argmax: Tensor,
    image_argmax: Tensor,
    mask_mode: str,
    reduction: str,
    precision: str,
    backend: str,
    wants_text: bool,
    wants_image: bool,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grads = grad_text_to_image, grad_image_to_text
    sides = text, image, text_mask, image_mask
    winners = text_argmax, image_argmax
    chosen = _chosen(text, image, backend)
    if chosen == "triton":
        options = Options(mask_mode, _directions(*grads) or "both", reduction, precision)
        wants = wants_text, wants_image
        return _maxsim_triton.backward(grads, *sides, winners, options, wants, False, plan)
    dtypes = (reference.accumulation_dtype(text.dtype),) * 2
    if chosen == "cpu":
        dtypes = _maxsim_cpu.gradient_dtypes(text, image, winners)
    grad_text = text.new_zeros(text.shape if wants_text else [0] * 3, dtype=dtypes[0])
    grad_image = image.new_zeros(image.shape if wants_image else [0] * image.dim(), dtype=dtypes[1])
    settings = mask_mode, reduction, precision
    accumulate_backward(grads, sides, winners, settings, backend, (grad_text, grad_image))
    return grad_text.to(text.dtype), grad_image.to(image.dtype)


def accumulate_backward(
    grads: tuple[Tensor | None, Tensor | None],
    sides: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    winners: tuple[Tensor, Tensor],
    settings: tuple[str, str, str],
    backend: str,
    totals: tuple[Tensor, Tensor],
) -> None:
    """Add the gradients to ``totals``, contiguous and wide, each empty where it is not wanted."""
    directions = _directions(*grads)
    if directions is None:
        return
    text, image = sides[:2]
    mask_mode, reduction, precision = settings
    chosen = _chosen(text, image, backend)
    options = Options(mask_mode, directions, reduction, precision)
    if chosen == "triton":
        wants = totals[0].numel() > 0, totals[1].numel() > 0
        found = _maxsim_triton.backward(grads, *sides, winners, options, wants, wide=True)
        for total, part in zip(totals, found, strict=True):
            total += part
        return
    run = _maxsim_cpu.backward if chosen == "cpu" else _maxsim_torch.backward
    run(grads, *sides, winners, options, *totals)


def _directions(grad_t2i: Tensor | None, grad_i2t: Tensor | None) -> str | None:
    if grad_t2i is None:
        return None if grad_i2t is None else "image_to_text"
    return "text_to_image" if grad_i2t is None else "both"


def _fake_backward(
    grad_text_to_image: Tensor | None,
    grad_image_to_text: Tensor | None,
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    text_argmax: Tensor,
    image_argmax: Tensor,
    mask_mode: str,
    reduction: str,
    precision: str,
    backend: str,
    wants_text: bool,
    wants_image: bool,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        text.new_empty(text.shape if wants_text else [0] * 3),
        image.new_empty(image.shape if wants_image else [0] * image.dim()),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    text, image, text_mask, image_mask, mask_mode, directions, reduction, _, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(text, image, text_mask, image_mask, *output[2:])
    ctx.directions = directions
    ctx.options = (mask_mode, reduction, *rest)


def _backward_of(name: str) -> Any:
    def backward(ctx: Any, grad_t2i: Tensor | None, grad_i2t: Tensor | None, *_: Any) -> tuple:
        wants = ctx.needs_input_grad[:2]
        # compiled graphs send zeros, not None, for an output that is empty
        grad_t2i = None if ctx.directions == "image_to_text" else grad_t2i
        grad_i2t = None if ctx.directions == "text_to_image" else grad_i2t
        op = getattr(torch.ops.bagformer, name + "_backward")
        *saved, plan = ctx.saved_tensors
        grads = op(grad_t2i, grad_i2t, *saved, *ctx.options, *wants, plan)
        kept = [grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)]
        return (*kept, *[None] * 8)

    return backward


def _pairs(text_shape: Any, image_shape: Any) -> int:
    return text_shape[0] * image_shape[-3]


def _flops(text_shape: Any, image_shape: Any, *_: Any, **__: Any) -> int:
    """One multiply and one add for each product; both directions share them."""
    return 2 * _pairs(text_shape, image_shape) * text_shape[1] * image_shape[-2] * text_shape[2]


def _backward_flops(
    grad_t2i: Any,
    grad_i2t: Any,
    text_shape: Any,
    image_shape: Any,
    text_mask: Any,
    image_mask: Any,
    text_argmax: Any,
    image_argmax: Any,
    mask_mode: str,
    reduction: str,
    precision: str,
    backend: str,
    wants_text: bool,
    wants_image: bool,
    *plan: Any,
    **_: Any,
) -> int:
    """A scaled row for each maximum and each side that wants a gradient, and the forward's
    products again where no argmax was saved."""
    maxima = (0 if grad_t2i is None else text_shape[1]) + (
        0 if grad_i2t is None else image_shape[-2]
    )
    wanted = int(wants_text) + int(wants_image)
    again = 0 if text_argmax[0] or image_argmax[0] else _flops(text_shape, image_shape)
    return again + 2 * wanted * maxima * _pairs(text_shape, image_shape) * text_shape[2]


for _name in ("maxsim", "maxsim_candidates"):
    define(f"{_name}({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", run, _fake, _flops)
    define(
        f"{_name}_backward({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor)",
        _run_backward,
        _fake_backward,
        _backward_flops,
    )
    differentiate(_name, _backward_of(_name), _setup_context)
