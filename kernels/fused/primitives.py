"""Device functions that several kernels share."""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl


@triton.jit
def nan_max(left, right):
    """The larger of two, or NaN if either is NaN: one FMNMX.NAN, no dearer than a plain maximum."""
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reduce_max(values, axis: tl.constexpr):
    """``torch.amax`` over one axis: NaN propagates, which ``tl.max`` does not promise."""
    return tl.reduce(values, axis, nan_max)


@triton.jit
def load_rows(base, rows, first, width, SPAN: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, SPAN] features from column ``first`` on; columns past ``width`` are zeros.

    ``rows`` are offsets of rows: 32-bit within one image, 64-bit for texts, which lie anywhere.
    """
    col = first + tl.arange(0, SPAN)
    place = base + (rows[:, None] + col[None, :])
    if WHOLE:
        return tl.load(place)
    return tl.load(place, mask=(col < width)[None, :], other=0.0)


@triton.jit
def similarity(
    image, patches, features, width,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """Tile [BLOCK_P, BLOCK_N] of ``patches @ bags.T``, accumulated in float32.

    SHAPE is (HEAD, TAIL, STEP, WHOLE, PRECISION): resident features HEAD + TAIL wide, or, where
    STEP is not 0, both operands in steps of STEP; WHOLE where that is exactly the width.
    """
    HEAD: tl.constexpr = SHAPE[0]
    TAIL: tl.constexpr = SHAPE[1]
    STEP: tl.constexpr = SHAPE[2]
    WHOLE: tl.constexpr = SHAPE[3]
    PRECISION: tl.constexpr = SHAPE[4]
    if STEP > 0:
        text, bags = features
        tile = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for first in range(0, width, STEP):
            rows = load_rows(image, patches, first, width, STEP, WHOLE)
            cols = load_rows(text, bags, first, width, STEP, WHOLE)
            tile = tl.dot(rows, tl.trans(cols), tile, input_precision=PRECISION)
    else:
        head, tail = features
        rows = load_rows(image, patches, 0, width, HEAD, WHOLE)
        tile = tl.dot(rows, tl.trans(head), input_precision=PRECISION)
        if TAIL > 0:
            rows = load_rows(image, patches, HEAD, width, TAIL, WHOLE)
            tile = tl.dot(rows, tl.trans(tail), tile, input_precision=PRECISION)
    return tile


@triton.jit
def places_in_class(program, bounds, RANK: tl.constexpr, GROUP: tl.constexpr):
    """First place of a program's texts, the end of class RANK, and how many programs that takes."""
    start, end = tl.load(bounds + 4 * RANK), tl.load(bounds + 4 * RANK + 1)
    return start + program * GROUP, end, tl.cdiv(end - start, GROUP)
