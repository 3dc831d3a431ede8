"""Late interaction of texts with image features that are stored in eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops import (
    _maxsim_cpu,
    _maxsim_int8,
    _maxsim_ops,
    _maxsim_quantized_triton,
    _maxsim_torch,
)
from bagformer.ops._checks import check_choice, check_features, check_flag, check_mask
from bagformer.ops._library import define, dims, wants_grad
from bagformer.ops._maxsim_torch import Options, widen_argmax
from bagformer.ops._nested import pad_nested
from bagformer.ops.backend import choose_backend
from bagformer.ops.maxsim import check_options
from bagformer.ops.quantize import QuantizedFeatures
from bagformer.reference import DIRECTIONS, MaxSimScores

# Dequantized features that the plain PyTorch form holds at once.
CHUNK_ELEMENTS = 1 << 22
_ARGUMENTS = (
    "Tensor text, Tensor values, Tensor scales, Tensor? text_mask, Tensor? image_mask, "
    "str mask_mode, str directions, str reduction, bool argmax, str backend"
)


def maxsim_quantized(
    text: Tensor | QuantizedFeatures,
    image: QuantizedFeatures,
    *,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    directions: str = "both",
    reduction: str = "sum",
    return_argmax: bool = False,
    backend: str = "auto",
) -> MaxSimScores:
    """:func:`maxsim` on images, or texts and images, that ``quantize_features`` stored.

    The scores are those of ``maxsim(text, image.dequantize())`` without the dequantized copy. What
    is stored is multiplied as it is, exactly; a patch's scale is applied to its similarities.
    The only error beside that of ``maxsim`` is the one of storing.

    With a text in int8, sums over ``D`` are exact integers, and a similarity is
    ``float32(sum) * (text_scale * image_scale)``: the same bits on every backend and processor.

    Args:
        text: ``[Nt, N, D]``, float32, bfloat16, float16 or float64; or jagged ``[Nt, j, D]``.
            Products run in this dtype, as in ``maxsim`` at ``precision="fp32"``. Or
            ``QuantizedFeatures`` in int8, for images in int8, with ``D`` at most 131,071: the
            C++ kernels multiply them as they are (VNNI where there is). There is no Triton kernel
            for these: CUDA tensors run in plain PyTorch, and ``backend="triton"`` is an error.
        image: features ``[Ni, P, D]`` for all pairs, ``[Nt, K, P, D]`` for K candidates of each
            text, on the device of ``text``.
        text_mask, image_mask, mask_mode, directions, reduction, return_argmax, backend: as in
            :func:`maxsim`. On a GPU, ``return_argmax`` and texts of more than 128 bags make a
            dequantized copy of the images in float32.

    Returns:
        As :func:`maxsim`. Not differentiable.

    Raises:
        TypeError, ValueError: as :func:`maxsim`.
        RuntimeError: ``text`` or a scale requires a gradient while gradients are recorded.

    Example:
        >>> from bagformer import quantize_features
        >>> image = quantize_features(torch.tensor([[[0.5, 0.0], [0.0, 0.25], [0.0, 0.0]]]))
        >>> maxsim_quantized(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), image).text_to_image
        tensor([[0.7500]])
    """
    check_options(mask_mode, reduction, "fp32", backend)
    check_choice("directions", directions, DIRECTIONS)
    check_flag("return_argmax", return_argmax)
    settings = mask_mode, directions, reduction, return_argmax, backend
    if isinstance(text, QuantizedFeatures):
        _check_text(text.values)
        _check_image(text.values, image)
        _check_int8(text, image)
        stored = text.values, image.values, text.scales, image.scales
        _check_masks(text.values, image, text_mask, image_mask)
        _check_no_grad("text.scales", text.scales)
        _check_no_grad("image.scales", image.scales)
        found = torch.ops.bagformer.maxsim_int8(*stored, text_mask, image_mask, *settings)
    else:
        text, text_mask = pad_nested("text", text, "text_mask", text_mask)
        check_features("text", text, ("[Nt, N, D]",))
        _check_image(text, image)
        _check_masks(text, image, text_mask, image_mask)
        _check_no_grad("text", text)
        _check_no_grad("image.scales", image.scales)
        masks = text_mask, image_mask
        found = torch.ops.bagformer.maxsim_quantized(
            text, image.values, image.scales, *masks, *settings
        )
    t2i, i2t, text_argmax, image_argmax = found
    wants_text, wants_image = directions != "image_to_text", directions != "text_to_image"
    return MaxSimScores(
        t2i if wants_text else None,
        i2t if wants_image else None,
        widen_argmax(text_argmax) if return_argmax and wants_text else None,
        widen_argmax(image_argmax) if return_argmax and wants_image else None,
    )


def _check_no_grad(name: str, value: Tensor) -> None:
    if wants_grad(value):
        raise RuntimeError(
            f"maxsim_quantized gives no gradient, but {name} requires one: call it under "
            "torch.no_grad(), or train with maxsim"
        )


def _check_image(text: Tensor, image: Any) -> None:
    if not isinstance(image, QuantizedFeatures):
        raise TypeError(
            f"image must be QuantizedFeatures (see quantize_features), got {type(image).__name__}"
        )
    shape = image.values.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"image must have shape [Ni, P, D] or [Nt, K, P, D], got {dims(shape)}")
    if image.values.device != text.device:
        raise ValueError(
            f"image must be on the device of text ({text.device}), got {image.values.device}"
        )
    if shape[-1] != text.shape[-1]:
        raise ValueError(
            f"image must have the feature size D of text ({text.shape[-1]}), got {shape[-1]}"
        )
    if len(shape) == 4 and shape[0] != text.shape[0]:
        raise ValueError(
            f"image [Nt, K, P, D] must have Nt = {text.shape[0]} as text, got {dims(shape)}"
        )


def _check_masks(
    text: Tensor, image: QuantizedFeatures, text_mask: Tensor | None, image_mask: Tensor | None
) -> None:
    check_mask("text_mask", text_mask, "text", text)
    check_mask("image_mask", image_mask, "image", image.values)


def _check_text(values: Tensor) -> None:
    if values.dim() != 3:
        raise ValueError(f"text must have shape [Nt, N, D], got {dims(values.shape)}")
    if values.shape[-1] > _maxsim_int8.MAX_FEATURES:
        raise ValueError(
            f"text in int8 must have at most {_maxsim_int8.MAX_FEATURES:,} features D, so that "
            f"sums fit in 32 bits, got {values.shape[-1]:,}"
        )


def _check_int8(text: QuantizedFeatures, image: QuantizedFeatures) -> None:
    for name, side in (("text", text), ("image", image)):
        if side.values.dtype != torch.int8:
            raise TypeError(
                f"{name} must be stored as int8 where text is quantized, got {side.values.dtype}; "
                "pass text.dequantize() to score fp8"
            )


def _run(
    text: Tensor,
    values: Tensor,
    scales: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    mask_mode: str,
    directions: str,
    reduction: str,
    argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = choose_backend("maxsim_quantized", text.device, text.dtype, backend).backend
    options = Options(mask_mode, directions, reduction, "fp32")
    masks = text_mask, image_mask
    if chosen == "triton":
        return _maxsim_quantized_triton.forward(text, values, scales, *masks, options, argmax)
    outputs = _maxsim_ops._outputs(text, values, options, argmax)
    if chosen == "cpu":
        _maxsim_cpu.forward(text, values, *masks, options, outputs, scales)
    elif chosen == "torch":
        _run_torch(text, values, scales, masks, options, outputs)
    else:
        _maxsim_int8.run_in_chunks(text, values, None, scales, masks, options, outputs, None)
    return outputs


def _run_torch(
    text: Tensor,
    values: Tensor,
    scales: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    options: Options,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """A few images at a time, dequantized in the dtype of scores."""
    wide = reference.accumulation_dtype(text.dtype)
    candidates = values.dim() == 4
    lead = values.shape[0] if candidates else 1
    each = max(1, lead * values.shape[-2] * values.shape[-1])
    step = max(1, CHUNK_ELEMENTS // each)
    text, (text_mask, image_mask) = text.to(wide), masks
    for first in range(0, values.shape[-3], step):
        part = slice(first, first + step)
        rows, columns = (slice(None), part), (part,)
        own = rows if candidates else columns
        features = reference.dequantize_features(values[own], scales[own], wide)
        mask = None if image_mask is None else image_mask[own]
        # unwanted outputs are empty, and so are their parts
        t2i, i2t, text_argmax, image_argmax = outputs
        parts = t2i[rows], i2t[own], text_argmax[rows], image_argmax[own]
        _maxsim_torch.forward(text, features, text_mask, mask, options, parts)


def _fake(
    text: Tensor,
    values: Tensor,
    scales: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    mask_mode: str,
    directions: str,
    reduction: str,
    argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(mask_mode, directions, reduction, "fp32")
    return _maxsim_ops._outputs(text, values, options, argmax)


define(
    f"maxsim_quantized({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _maxsim_ops._flops,
)
