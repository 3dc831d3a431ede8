"""The best images of each text, or texts of each image, without a score matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagformer.ops import _maxsim_ops, _maxsim_topk_triton
from bagformer.ops._checks import check_choice
from bagformer.ops._library import define, differentiate
from bagformer.ops.backend import choose_backend
from bagformer.ops.maxsim import check_options, check_sides
from bagformer.reference import TopK, accumulation_dtype

TOPK_DIRECTIONS = ("text_to_image", "image_to_text")
# Scores held at once, 8 MB of float32: long enough chunks for the kernels, small beside features.
ROWS, COLUMNS = 2048, 1024

_OPTIONS = "str mask_mode, str reduction, str precision, str backend"


def _swapped(direction: str, text: Any, image: Any) -> tuple[Any, Any]:
    """``(rows, columns)`` of the score matrix."""
    return (text, image) if direction == "text_to_image" else (image, text)


def _cut(tensor: Tensor | None, start: int, size: int) -> Tensor | None:
    return None if tensor is None else tensor[start : start + size]


def _merge(
    best: tuple[Tensor, Tensor], scores: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """Best first; the earlier column first among equals, because a stable sort keeps their order
    and everything in ``best`` has a lower index than the new columns."""
    columns = torch.arange(start, start + scores.shape[1], device=scores.device)
    values = torch.cat([best[0], scores], dim=1)
    indices = torch.cat([best[1], columns.expand(scores.shape)], dim=1)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values[:, :k], indices.gather(1, order[:, :k])


def _run(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    k: int,
    direction: str,
    mask_mode: str,
    reduction: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = choose_backend("maxsim_topk", text.device, text.dtype, backend).backend
    if chosen == "triton" and k <= _maxsim_topk_triton.LONGEST:
        to_image, mean = direction == "text_to_image", reduction == "mean"
        return _maxsim_topk_triton.forward(
            text, image, text_mask, image_mask, k, to_image, mask_mode, mean, precision
        )
    rows, columns = _swapped(direction, text, image)
    row_mask, column_mask = _swapped(direction, text_mask, image_mask)
    n_rows, n_columns = rows.shape[0], columns.shape[0]
    values, indices = _fake(text, image, None, None, k, direction)
    slot = TOPK_DIRECTIONS.index(direction)
    for row in range(0, n_rows, ROWS):
        some, some_mask = rows[row : row + ROWS], _cut(row_mask, row, ROWS)
        best = values.new_empty(len(some), 0), indices.new_empty(len(some), 0)
        for column in range(0, n_columns, COLUMNS):
            sides = _swapped(direction, some, _cut(columns, column, COLUMNS))
            masks = _swapped(direction, some_mask, _cut(column_mask, column, COLUMNS))
            scores = _maxsim_ops.run(
                *sides, *masks, mask_mode, direction, reduction, False, precision, backend
            )[slot]
            best = _merge(best, scores, column, k)
        values[row : row + ROWS], indices[row : row + ROWS] = best
    return values, indices


def _fake(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    k: int,
    direction: str,
    *options: str,
) -> tuple[Tensor, Tensor]:
    rows, _ = _swapped(direction, text, image)
    values = text.new_empty([rows.shape[0], k], dtype=accumulation_dtype(text.dtype))
    return values, text.new_empty([rows.shape[0], k], dtype=torch.int64)


def _run_backward(
    grad: Tensor,
    indices: Tensor,
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    direction: str,
    mask_mode: str,
    reduction: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Tile by tile of the score matrix, the gradient of its winners: costs about a forward, but
    needs neither a matrix nor atomics."""
    wide = accumulation_dtype(text.dtype)
    grads = text.new_zeros(text.shape, dtype=wide), image.new_zeros(image.shape, dtype=wide)
    rows, columns = _swapped(direction, text, image)
    row_mask, column_mask = _swapped(direction, text_mask, image_mask)
    row_grad, column_grad = _swapped(direction, *grads)
    empty = text.new_empty([0, 0, 0], dtype=torch.uint8)
    for row in range(0, rows.shape[0], ROWS):
        chosen, weight = indices[row : row + ROWS], grad[row : row + ROWS]
        for column in range(0, columns.shape[0], COLUMNS):
            width = min(COLUMNS, columns.shape[0] - column)
            inside = (chosen >= column) & (chosen < column + width)
            # one column more takes what lies outside of this tile
            tile = weight.new_zeros(weight.shape[0], width + 1)
            tile.scatter_(1, torch.where(inside, chosen - column, width), weight)
            tile = tile[:, :width]
            sides = _swapped(direction, _cut(rows, row, ROWS), _cut(columns, column, width))
            masks = _swapped(direction, _cut(row_mask, row, ROWS), _cut(column_mask, column, width))
            _maxsim_ops.accumulate_backward(
                (tile, None) if direction == "text_to_image" else (None, tile),
                (*sides, *masks),
                (empty, empty),
                (mask_mode, reduction, precision),
                backend,
                _swapped(direction, _cut(row_grad, row, ROWS), _cut(column_grad, column, width)),
            )
    return grads[0].to(text.dtype), grads[1].to(image.dtype)


def _fake_backward(
    grad: Tensor, indices: Tensor, text: Tensor, image: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return text.new_empty(text.shape), image.new_empty(image.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    text, image, text_mask, image_mask, _, direction, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], text, image, text_mask, image_mask)
    ctx.options = (direction, *options)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    grads = torch.ops.bagformer.maxsim_topk_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 8)


def _flops(text_shape: Any, image_shape: Any, *_: Any, **__: Any) -> int:
    pairs = text_shape[0] * image_shape[0]
    return 2 * pairs * text_shape[1] * image_shape[1] * text_shape[2]


def _backward_flops(grad_shape: Any, indices_shape: Any, *args: Any, **_: Any) -> int:
    return _flops(*args)


define(
    "maxsim_topk(Tensor text, Tensor image, Tensor? text_mask, Tensor? image_mask, int k, "
    f"str direction, {_OPTIONS}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _flops,
)
define(
    "maxsim_topk_backward(Tensor grad, Tensor indices, Tensor text, Tensor image, "
    f"Tensor? text_mask, Tensor? image_mask, str direction, {_OPTIONS}) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _backward_flops,
)
differentiate("maxsim_topk", _backward, _setup_context)


def maxsim_topk(
    text: Tensor,
    image: Tensor,
    k: int,
    *,
    direction: str = "text_to_image",
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    reduction: str = "sum",
    precision: str = "fp32",
    backend: str = "auto",
) -> TopK:
    """The ``k`` best images of each text, or texts of each image, best first.

    Never holds a matrix of all scores. Equal scores are ordered by the lower index and NaN ranks
    above every number, so the answer does not depend on how the collection is cut.

    Args:
        text: ``[Nt, N, D]``, image: ``[Ni, P, D]``, masks and options as in ``maxsim``.
        k: how many, at least 1 and at most the number of columns (``Ni`` for
            ``"text_to_image"``, ``Nt`` for ``"image_to_text"``).
        direction: ``"text_to_image"`` or ``"image_to_text"``.

    Returns:
        ``TopK(scores [rows, k] float32, indices [rows, k] int64)``. Differentiable once in the
        features; its backward computes every score again.

    Raises:
        TypeError: as ``maxsim``, or ``k`` is not an int.
        ValueError: as ``maxsim``, or ``k`` is out of range.
    """
    check_options(mask_mode, reduction, precision, backend)
    check_choice("direction", direction, TOPK_DIRECTIONS)
    text, image, text_mask, image_mask = check_sides(
        text, image, text_mask, image_mask, ("[Ni, P, D]",)
    )
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    columns = _swapped(direction, text, image)[1].shape[0]
    if k < 1 or k > columns:
        name = "Ni" if direction == "text_to_image" else "Nt"
        raise ValueError(f"k must be at least 1 and at most {name} = {columns}, got {k}")
    return TopK(
        *torch.ops.bagformer.maxsim_topk(
            text,
            image,
            text_mask,
            image_mask,
            k,
            direction,
            mask_mode,
            reduction,
            precision,
            backend,
        )
    )
