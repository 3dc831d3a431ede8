"""Contrastive loss of two score matrices, and its gradient.

A program **owns** ROWS rows of one matrix and **streams** their columns, BLOCK at a time, twice in
a step: the forward leaves of each row its maximum, the logarithm of its sum and its share of the
loss, from which the backward makes every gradient again. One program adds the rows up, in a fixed
order. No matrix but the gradients is written.
"""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bagformer.kernels.primitives import nan_max, reduce_max
from torch import Tensor

ROWS = 8  # of the transposed positives, 8 bytes of a sector of 32 are then used
BLOCK = 256  # with 8 rows, 16 values a thread: 32 fill the registers
MOST_REGISTERS = 128  # without the cap ptxas aims at 64, with spills, for eight programs
FIELDS = tl.constexpr(6)  # of a row: maximum, log of the sum, positives, loss, two slopes
# compiled once for each form, whatever the sizes, strides and addresses
SIZES = [
    *("n_texts", "n_images", "above", "n_rows", "text_row", "text_column", "image_row"),
    *("image_column", "true_row", "true_column"),
]
ADDRESSES = [
    *("grad", "text_to_image", "image_to_text", "positives", "temperature", "bias", "rows"),
    *("loss", "slopes", "grad_text_to_image", "grad_image_to_text", "scaled"),
]
WIDEST_SUM = 1024  # rows that the last program adds at a time


@triton.jit
def _log_one_plus(x):
    """log(1 + x) for x in [0, 1], by its series in x / (2 + x).

    The hardware's logarithm is good to 2**-22 near 1: no digit of a good pair's loss.
    """
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))
    series = 1.0 / 5 + q * (1.0 / 7 + q * series)
    return 2.0 * s * (1.0 + q * (1.0 / 3 + q * series))


@triton.jit
def _tile(
    matrix, first, start, n_rows, n_columns, strides, true_strides, positives, temperature, divisor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Scores over the temperature [ROWS, BLOCK], who is a positive, and which are there."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (start + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (row < n_rows) & (col < n_columns)
    value = tl.load(matrix + row * strides[0] + col * strides[1], mask=inside, other=0.0)
    if temperature is not None:
        divisor = tl.load(temperature).to(tl.float32)
    value = tl.div_rn(value.to(tl.float32), tl.full((ROWS, BLOCK), 1.0, tl.float32) * divisor)
    if positives is None:
        true = row == col
    else:
        place = row * true_strides[0] + col * true_strides[1]
        true = tl.load(positives + place, mask=inside, other=0) != 0
    return value, true, inside


@triton.jit
def _softmax_rows(
    matrix, first, n_rows, n_columns, strides, true_strides, positives, temperature, divisor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The fields of ROWS rows, a running maximum and sums rescaled when it grows."""
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    picked = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n_columns, BLOCK):
        value, true, inside = _tile(
            matrix, first, start, n_rows, n_columns, strides, true_strides, positives, temperature,
            divisor, ROWS, BLOCK)  # fmt: skip
        peak = nan_max(best, reduce_max(tl.where(inside, value, float("-inf")), 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        grown = tl.exp(best - shift)
        power = tl.where(inside, tl.exp(value - shift[:, None]), 0.0)
        total = total * grown + tl.sum(power, 1)
        weighted = weighted * grown + tl.sum(tl.where(inside, power * value, 0.0), 1)
        picked += tl.sum(tl.where(true, value, 0.0), 1)
        count += tl.sum(true.to(tl.float32), 1)
        best = peak
    # exactly 1 and more: the maximum's own power
    log_total = tl.where(total < 2.0, _log_one_plus(total - 1.0), tl.log(total))
    mean = picked / count
    return best, log_total, count, (best - mean) + log_total, weighted / total - mean, total * 0.0


@triton.jit
def _sigmoid_rows(
    matrix, first, n_rows, n_columns, strides, true_strides, positives, temperature, divisor, bias,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The fields of ROWS rows; the first three are not asked for."""
    loss = tl.zeros((ROWS,), tl.float32)
    slope = tl.zeros((ROWS,), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n_columns, BLOCK):
        value, true, inside = _tile(
            matrix, first, start, n_rows, n_columns, strides, true_strides, positives, temperature,
            divisor, ROWS, BLOCK)  # fmt: skip
        logit = value + bias
        wrong = tl.where(true, -logit, logit)
        power = tl.exp(-tl.abs(logit))
        each = tl.maximum(wrong, 0.0) + _log_one_plus(power)
        rise = _logistic(wrong, power)
        rise = tl.where(inside, tl.where(true, -rise, rise), 0.0)
        loss += tl.sum(tl.where(inside, each, 0.0), 1)
        slope += tl.sum(tl.where(inside, rise * value, 0.0), 1)
        shift += tl.sum(rise, 1)
    return loss, loss, loss, loss, slope, shift


@triton.jit
def _logistic(x, power):
    """1 / (1 + exp(-x)), given exp(-|x|): no overflow on either side."""
    return tl.where(x >= 0.0, 1.0, power) / (1.0 + power)


@triton.jit
def _own_rows(
    side, first, rows, n_all, positives, temperature, divisor, bias, place: tl.constexpr,
    SOFTMAX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Fields of ROWS rows of one matrix; ``rows`` begins with its first row's."""
    matrix, strides, true_strides, n_rows, n_columns = side
    if SOFTMAX:
        fields = _softmax_rows(
            matrix, first, n_rows, n_columns, strides, true_strides, positives, temperature,
            divisor, ROWS, BLOCK)  # fmt: skip
    else:
        shift = 0.0
        if bias is not None:
            shift = tl.load(bias + place).to(tl.float32)
        fields = _sigmoid_rows(
            matrix, first, n_rows, n_columns, strides, true_strides, positives, temperature,
            divisor, shift, ROWS, BLOCK)  # fmt: skip
    row = first + tl.arange(0, ROWS)
    for field in tl.static_range(FIELDS):
        tl.store(rows + field * n_all + row, fields[field], mask=row < n_rows)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ADDRESSES)
def contrastive_rows_kernel(
    text_to_image, image_to_text, positives, temperature, bias, rows, divisor,
    n_texts, n_images, above, n_rows, text_row, text_column, image_row, image_column,
    true_row, true_column,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr, SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Fields of ROWS rows of axis 0 of the matrix of axis 1: text_to_image's if wanted, then the
    other's, whose rows come after ``above`` of the ``n_rows``. ``positives`` is ``[Nt, Ni]``."""
    first, place = tl.program_id(0) * ROWS, tl.program_id(1)
    if WANTS_TEXT:
        # the smaller matrix has fewer rows than there are programs
        if (place == 0) & (first < n_texts):
            strides, true_strides = (text_row, text_column), (true_row, true_column)
            side = text_to_image, strides, true_strides, n_texts, n_images
            _own_rows(
                side, first, rows, n_rows, positives, temperature, divisor, bias, 0, SOFTMAX,
                ROWS, BLOCK)  # fmt: skip
        place -= 1
    if WANTS_IMAGE and (place == 0) & (first < n_images):
        strides, true_strides = (image_row, image_column), (true_column, true_row)
        side = image_to_text, strides, true_strides, n_images, n_texts
        _own_rows(
            side, first, rows + above, n_rows, positives, temperature, divisor, bias, 1, SOFTMAX,
            ROWS, BLOCK)  # fmt: skip


@triton.jit
def _mean(values, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(values + place, mask=place < count, other=0.0)
    return tl.sum(total, 0) / count


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ADDRESSES)
def contrastive_sum_kernel(
    rows, temperature, loss, slopes, divisor, n_texts, n_images, above, n_rows,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: the loss, and its slopes by temperature, first bias and second bias."""
    SHARE: tl.constexpr = 0.5 if WANTS_TEXT and WANTS_IMAGE else 1.0
    for field in tl.static_range(3):
        at = rows + (field + 3) * n_rows
        text, image = 0.0, 0.0
        if WANTS_TEXT:
            text = SHARE * _mean(at, n_texts, BLOCK)
        if WANTS_IMAGE:
            image = SHARE * _mean(at + above, n_images, BLOCK)
        if field == 0:
            tl.store(loss, text + image)
        elif field == 1:
            if temperature is not None:
                divisor = tl.load(temperature).to(tl.float32)
            tl.store(slopes, -(text + image) / divisor)
        else:
            tl.store(slopes + 1, text)
            tl.store(slopes + 2, image)


@triton.jit
def _gradient_of_rows(
    side, first, out, rows, n_all, positives, temperature, divisor, bias, weight,
    place: tl.constexpr, SOFTMAX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    matrix, strides, true_strides, n_rows, n_columns = side
    weight /= n_rows
    row = first + tl.arange(0, ROWS)
    best = tl.load(rows + row, mask=row < n_rows, other=0.0)[:, None]
    log_total = tl.load(rows + n_all + row, mask=row < n_rows, other=0.0)[:, None]
    count = tl.load(rows + 2 * n_all + row, mask=row < n_rows, other=1.0)[:, None]
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + place).to(tl.float32)
    if temperature is not None:
        divisor = tl.load(temperature).to(tl.float32)
    for start in range(0, n_columns, BLOCK):
        value, true, inside = _tile(
            matrix, first, start, n_rows, n_columns, strides, true_strides, positives, None,
            divisor, ROWS, BLOCK)  # fmt: skip
        if SOFTMAX:
            # without a positive NaN, as the loss is
            slope = tl.exp((value - best) - log_total) - tl.where(true, 1.0 / count, 0.0 / count)
        else:
            logit = value + shift
            wrong = tl.where(true, -logit, logit)
            slope = _logistic(wrong, tl.exp(-tl.abs(logit)))
            slope = tl.where(true, -slope, slope)
        col = (start + tl.arange(0, BLOCK))[None, :]
        at = out + row.to(tl.int64)[:, None] * n_columns + col
        tl.store(at, slope * (weight / divisor), mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ADDRESSES)
def contrastive_gradient_kernel(
    grad, text_to_image, image_to_text, positives, temperature, bias, rows, slopes,
    grad_text_to_image, grad_image_to_text, scaled, divisor,
    n_texts, n_images, above, n_rows, text_row, text_column, image_row, image_column,
    true_row, true_column,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr, SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of the rows as in ``contrastive_rows_kernel``; the first program scales slopes."""
    first, place = tl.program_id(0) * ROWS, tl.program_id(1)
    weight = tl.load(grad).to(tl.float32)
    if (first == 0) & (place == 0):
        field = tl.arange(0, 4)
        value = tl.load(slopes + field, mask=field < 3, other=0.0)
        tl.store(scaled + field, weight * value, mask=field < 3)
    if WANTS_TEXT and WANTS_IMAGE:
        weight *= 0.5
    if WANTS_TEXT:
        # the smaller matrix has fewer rows than there are programs
        if (place == 0) & (first < n_texts):
            strides, true_strides = (text_row, text_column), (true_row, true_column)
            side = text_to_image, strides, true_strides, n_texts, n_images
            _gradient_of_rows(
                side, first, grad_text_to_image, rows, n_rows, positives, temperature, divisor,
                bias, weight, 0, SOFTMAX, ROWS, BLOCK)  # fmt: skip
        place -= 1
    if WANTS_IMAGE and (place == 0) & (first < n_images):
        strides, true_strides = (image_row, image_column), (true_column, true_row)
        side = image_to_text, strides, true_strides, n_images, n_texts
        _gradient_of_rows(
            side, first, grad_image_to_text, rows + above, n_rows, positives, temperature, divisor,
            bias, weight, 1, SOFTMAX, ROWS, BLOCK)  # fmt: skip


class _Layout(NamedTuple):
    """Numbers of texts and images, and where rows of image_to_text begin among all rows."""

    n_texts: int
    n_images: int
    above: int
    n_rows: int
    grid: tuple[int, int]


def _layout(text_to_image: Tensor | None, image_to_text: Tensor | None) -> _Layout:
    if text_to_image is not None:
        n_texts, n_images = text_to_image.shape
    else:
        assert image_to_text is not None
        n_images, n_texts = image_to_text.shape
    counts = n_texts * (text_to_image is not None), n_images * (image_to_text is not None)
    grid = triton.cdiv(max(counts), ROWS), sum(count > 0 for count in counts)
    return _Layout(n_texts, n_images, counts[0], sum(counts), grid)


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.stride(0), matrix.stride(1))


def contrastive_loss_forward(
    text_to_image: Tensor | None,
    image_to_text: Tensor | None,
    positives: Tensor | None = None,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    divisor: float = 1.0,
    softmax: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss ``[]``, what the backward needs of each row, and slopes ``[3]``, all float32.

    Args:
        text_to_image: ``[Nt, Ni]`` of any strides, or None; ``image_to_text`` ``[Ni, Nt]``.
        positives: bool ``[Nt, Ni]``; None: the diagonal.
        temperature: one number on the device; None: ``divisor``.
        bias: ``[2]``, added to the logits where ``softmax`` is False.
    """
    scores = (text_to_image, image_to_text)
    *sizes, grid = _layout(*scores)
    given = next(one for one in scores if one is not None)
    rows = torch.empty(FIELDS.value, sizes[3], dtype=torch.float32, device=given.device)
    loss = torch.empty((), dtype=torch.float32, device=given.device)
    slopes = torch.empty(3, dtype=torch.float32, device=given.device)
    wants = {"WANTS_TEXT": text_to_image is not None, "WANTS_IMAGE": image_to_text is not None}
    contrastive_rows_kernel[grid](
        *scores, positives, temperature, bias, rows, divisor, *sizes,
        *_strides(scores[0]), *_strides(scores[1]), *_strides(positives),
        **wants, SOFTMAX=softmax, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    contrastive_sum_kernel[(1,)](
        rows, temperature, loss, slopes, divisor, *sizes, **wants, BLOCK=WIDEST_SUM, num_warps=4,
    )  # fmt: skip
    return loss, rows, slopes


def contrastive_loss_backward(
    grad: Tensor,
    text_to_image: Tensor | None,
    image_to_text: Tensor | None,
    rows: Tensor,
    slopes: Tensor,
    positives: Tensor | None = None,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    divisor: float = 1.0,
    softmax: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of the matrices in their dtype, and ``slopes`` times ``grad``."""
    scores = (text_to_image, image_to_text)
    *sizes, grid = _layout(*scores)
    found = [
        None if one is None else torch.empty(one.shape, dtype=one.dtype, device=one.device)
        for one in scores
    ]
    scaled = torch.empty_like(slopes)
    contrastive_gradient_kernel[grid](
        grad, *scores, positives, temperature, bias, rows, slopes, *found, scaled, divisor, *sizes,
        *_strides(scores[0]), *_strides(scores[1]), *_strides(positives),
        WANTS_TEXT=text_to_image is not None, WANTS_IMAGE=image_to_text is not None,
        SOFTMAX=softmax, ROWS=ROWS, BLOCK=BLOCK,
        num_warps=4, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return found[0], found[1], scaled
