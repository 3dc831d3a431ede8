"""The operator ``bagformer::maxsim_int8``: int8 texts with int8 images, exact integer sums."""

from __future__ import annotations

from torch import Tensor

from bagformer import reference
from bagformer.ops import _maxsim_cpu, _maxsim_ops
from bagformer.ops._library import define
from bagformer.ops._maxsim_torch import CHUNK_ELEMENTS, Options
from bagformer.ops.backend import choose_backend

MAX_FEATURES = 131_071  # csrc/cpu/maxsim_int8.h
_ARGUMENTS = (
    "Tensor text, Tensor values, Tensor text_scales, Tensor scales, Tensor? text_mask, "
    "Tensor? image_mask, str mask_mode, str directions, str reduction, bool argmax, str backend"
)


def run(
    text: Tensor,
    values: Tensor,
    text_scales: Tensor,
    scales: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    mask_mode: str,
    directions: str,
    reduction: str,
    argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # no Triton kernel takes an int8 text: choose_backend refuses it, or takes torch and says why
    chosen = choose_backend("maxsim_quantized", text.device, text.dtype, backend).backend
    options = Options(mask_mode, directions, reduction, "fp32")
    outputs = _maxsim_ops._outputs(text, values, options, argmax)
    masks = text_mask, image_mask
    if chosen == "cpu":
        _maxsim_cpu.forward(text, values, *masks, options, outputs, scales, text_scales)
    else:
        limit = CHUNK_ELEMENTS if chosen == "torch" else None
        run_in_chunks(text, values, text_scales, scales, masks, options, outputs, limit)
    return outputs


def run_in_chunks(
    text: Tensor,
    values: Tensor,
    text_scales: Tensor | None,
    scales: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    options: Options,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    limit: int | None,
) -> None:
    """The reference on blocks of at most ``limit`` similarities (or one pair); None: all at once.

    ``text_scales``: None for a text of floats. With int8 texts each similarity has one right answer
    to the bit, so that blocks change nothing.
    """
    (n_texts, n_bags), (n_images, n_patches) = text.shape[:2], values.shape[-3:-1]
    pair = max(1, n_bags * n_patches)
    width, height = max(1, n_images), max(1, n_texts)
    if limit is not None:
        width = max(1, min(width, limit // pair))
        height = max(1, min(height, limit // (pair * width)))
    t2i, i2t, text_argmax, image_argmax = outputs
    text_mask, image_mask = masks
    for row in range(0, n_texts, height):
        rows = slice(row, row + height)
        for column in range(0, n_images, width):
            columns = slice(column, column + width)
            pairs = rows, columns
            own = pairs if values.dim() == 4 else (columns,)
            turned = pairs if values.dim() == 4 else (columns, rows)
            scores = reference.maxsim_quantized(
                text[rows],
                values[own],
                scales[own],
                text_scales=None if text_scales is None else text_scales[rows],
                text_mask=None if text_mask is None else text_mask[rows],
                image_mask=None if image_mask is None else image_mask[own],
                mask_mode=options.mask_mode,
                directions=options.directions,
                reduction=options.reduction,
                return_argmax=text_argmax.numel() + image_argmax.numel() > 0,
            )
            # unwanted outputs are empty, and so are their parts
            parts = t2i[pairs], i2t[turned], text_argmax[pairs], image_argmax[turned]
            _maxsim_ops.fill(parts, scores, n_patches, n_bags)


def _fake(
    text: Tensor,
    values: Tensor,
    text_scales: Tensor,
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
    f"maxsim_int8({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    run,
    _fake,
    _maxsim_ops._flops,
)
