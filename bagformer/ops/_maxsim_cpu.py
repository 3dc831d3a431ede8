"""MaxSim through the C++ kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bagformer.ops import _native
from bagformer.ops._maxsim_torch import Options, argmax_dtype
from bagformer.reference import accumulation_dtype

# Winners held at once where the backward computes them again.
RECOMPUTE_BYTES = 1 << 24


def forward(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    options: Options,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    image_scales: Tensor | None = None,
    text_scales: Tensor | None = None,
) -> None:
    """Fill ``outputs``; one that is empty is not wanted, and not computed.

    ``image_scales``: of int8 and float8 images, which then need not have the text's dtype.
    ``text_scales``: of int8 texts, which take int8 images.
    """
    wanted = [_native.view(output) if output.numel() else None for output in outputs]
    _native.load().maxsim_forward(
        _native.view(text),
        _native.view(image),
        _native.optional_view(text_scales),
        _native.optional_view(image_scales),
        _native.optional_view(text_mask),
        _native.optional_view(image_mask),
        *wanted,
        options.mask_mode == "zero",
        options.reduction == "mean",
        _native.threads(),
    )


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    winners: tuple[Tensor, Tensor],
    options: Options,
    grad_text: Tensor,
    grad_image: Tensor,
) -> None:
    """Add to ``grad_text`` and ``grad_image`` (skipped where empty), text by text in index order,
    so that saved and recomputed winners give the same bits.

    They are wide, or of :func:`gradient_dtypes`; narrow ones are written, not added to.
    """
    if text.numel() == 0 or image.numel() == 0:
        return
    # the kernel runs along features with stride 1
    text, image = _dense_rows(text), _dense_rows(image)
    candidates = image.dim() == 4
    saved = _saved(winners)
    for rows in [slice(None)] if saved else _text_blocks(text, image):
        part = image[rows] if candidates else image
        part_mask = image_mask[rows] if candidates and image_mask is not None else image_mask
        text_part = text[rows]
        text_mask_part = None if text_mask is None else text_mask[rows]
        sides = (text_part, part, text_mask_part, part_mask)
        chosen = winners if saved else _recompute(*sides, options)
        turn = (slice(None), rows)
        views = (
            None if grads[0] is None else grads[0][rows],
            None if grads[1] is None else grads[1][rows if candidates else turn],
        )
        _native.load().maxsim_backward(
            *(_native.optional_view(grad) for grad in views),
            *(_native.optional_view(side) for side in sides),
            *(
                None if grad is None else _native.view(winner)
                for grad, winner in zip(views, chosen, strict=True)
            ),
            _native.view(grad_text[rows]) if grad_text.numel() else None,
            _native.view(grad_image[rows] if candidates else grad_image)
            if grad_image.numel()
            else None,
            options.reduction == "mean",
            _native.threads(),
        )


def gradient_dtypes(
    text: Tensor, image: Tensor, winners: tuple[Tensor, Tensor]
) -> tuple[torch.dtype, torch.dtype]:
    """What the gradients can be written in, sums staying in one image's or text's scratch: the
    features' dtype, unless an image's sums grow from one block of texts to the next."""
    whole = image.dim() == 4 or _saved(winners)
    return text.dtype, image.dtype if whole else accumulation_dtype(image.dtype)


def _saved(winners: tuple[Tensor, Tensor]) -> bool:
    return winners[0].numel() + winners[1].numel() > 0


def _dense_rows(features: Tensor) -> Tensor:
    return features if features.stride(-1) == 1 else features.contiguous()


def _text_blocks(text: Tensor, image: Tensor) -> Iterator[slice]:
    bags, patches = text.shape[1], image.shape[-2]
    each = image.shape[-3] * (
        bags * argmax_dtype(patches).itemsize + patches * argmax_dtype(bags).itemsize
    )
    height = max(1, RECOMPUTE_BYTES // max(1, each))
    for row in range(0, text.shape[0], height):
        yield slice(row, min(row + height, text.shape[0]))


def _recompute(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    (texts, bags, _), (images, patches) = text.shape, image.shape[-3:-1]
    turned = (texts, images) if image.dim() == 4 else (images, texts)
    none = text.new_empty(0)
    text_argmax = image_argmax = none
    if options.wants_text:
        text_argmax = text.new_empty((texts, images, bags), dtype=argmax_dtype(patches))
    if options.wants_image:
        image_argmax = text.new_empty((*turned, patches), dtype=argmax_dtype(bags))
    outputs = (none, none, text_argmax, image_argmax)
    forward(text, image, text_mask, image_mask, options, outputs)
    return text_argmax, image_argmax
