"""Indices of maxima that are NaN: the first NaN, as ``torch.max`` gives.

Keeping NaN in mind would cost the scoring loop two more comparisons for each similarity. A NaN
maximum shows in its pair's score, so a program that has all its scores reads them back, and where
one is NaN looks over all its pairs again.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl
from bagformer.kernels.primitives import places_in_class, similarity
from bagformer.kernels.reductions import NOWHERE

BLOCK = tl.constexpr(16)  # patches, and bags, of a tile
SCORES = tl.constexpr(128)  # that are read back at once


@triton.jit
def _places(n_texts, bounds, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, RANKS: tl.constexpr):
    """First place of this program's texts and the place after the last; none: both are 0."""
    program = tl.program_id(0)
    first, end = 0, 0
    if len(RANKS) == 0:
        first = program * (BLOCK_N[0] // SLOT[0])
        end = tl.minimum(first + BLOCK_N[0] // SLOT[0], n_texts)
    for c in tl.static_range(len(RANKS)):
        at, stop, programs = places_in_class(program, bounds, RANKS[c], BLOCK_N[c] // SLOT[c])
        mine = (program >= 0) & (program < programs)
        first = tl.where(mine, at, first)
        end = tl.where(mine, tl.minimum(at + BLOCK_N[c] // SLOT[c], stop), end)
        program -= programs
    return first, end


@triton.jit
def _pair(pair, first, order, start, span, ORDERED: tl.constexpr):
    """Text and image of a program's pair, or of several."""
    text = first + pair // span
    if ORDERED:
        text = tl.load(order + text)
    return tl.cast(text, tl.int64), tl.cast(start + pair % span, tl.int64)


@triton.jit
def _tokens(plan, item, first, length, MASKED: tl.constexpr):
    """Tokens that count, BLOCK of them from place ``first`` on, and which of them are there."""
    count = length
    if MASKED:
        count = tl.load(plan[1] + item)
    place = first + tl.arange(0, BLOCK)
    token = tl.maximum(tl.minimum(place, count - 1), 0)
    if MASKED:
        token = tl.load(plan[0] + item * length + token)
    return token, place < count


# A function of its own, with no argument that is worked out: inlined, what it shares with the
# scoring loop stays in registers through that loop, which then spills or computes more.
@triton.jit(noinline=True)
def mend_nan_winners(
    order, bounds, sides, plans, outputs, sizes, run, strides, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, SLOT: tl.constexpr, RANKS: tl.constexpr, TEXT_MASK: tl.constexpr,
    IMAGE_MASK: tl.constexpr, CANDIDATES: tl.constexpr, WANTS_TEXT: tl.constexpr,
    WANTS_IMAGE: tl.constexpr
):  # fmt: skip
    """Write the first NaN's index wherever a maximum of this program's pairs is NaN.

    A similarity that is NaN makes both scores of its pair NaN, so one of them is read. Tiles are
    taken from the last to the first: what stays written is the lowest index.
    """
    n_texts, n_images, n_bags, n_patches, width = sizes
    text_stride, bag_stride, list_stride, image_stride, patch_stride = strides
    first, end = _places(n_texts, bounds, BLOCK_N, SLOT, RANKS)
    start = tl.program_id(1) * run
    span = tl.minimum(run, n_images - start)
    pairs = (end - first) * span
    broken = tl.zeros((SCORES,), tl.int32)
    tl.debug_barrier()  # the program's own scores and indices are written
    for at in range(0, pairs, SCORES):
        pair = tl.minimum(at + tl.arange(0, SCORES), pairs - 1)
        t, i = _pair(pair, first, order, start, span, len(RANKS) > 0)
        if WANTS_TEXT:
            score = tl.load(outputs[0] + (t * n_images + i))
        elif CANDIDATES:
            score = tl.load(outputs[1] + (t * n_images + i))
        else:
            score = tl.load(outputs[1] + (i * n_texts + t))
        broken |= (score != score).to(tl.int32)
    wide = tl.cdiv(n_bags, BLOCK)
    tiles = wide * tl.cdiv(n_patches, BLOCK)
    left = tl.where(tl.max(broken, 0) > 0, pairs * tiles, 0)
    while left > 0:
        left -= 1
        t, i = _pair(left // tiles, first, order, start, span, len(RANKS) > 0)
        item, place, image = i, i * n_texts + t, sides[1] + i * (image_stride * UNIT)
        if CANDIDATES:
            item, place = t * n_images + i, t * n_images + i
            image += t * (list_stride * UNIT)
        row, col = left % tiles // wide * BLOCK, left % tiles % wide * BLOCK
        patch, patch_counts = _tokens(plans[1], item, row, n_patches, IMAGE_MASK)
        bag, bag_counts = _tokens(plans[0], t, col, n_bags, TEXT_MASK)
        text = sides[0] + t * (text_stride * UNIT), bag.to(tl.int64) * (bag_stride * UNIT)
        shape: tl.constexpr = (0, 0, 32, False, "ieee")
        patches = patch * (patch_stride * UNIT)
        tile = similarity(image, patches, text, width * UNIT, BLOCK, BLOCK, shape)
        nan = (tile != tile) & patch_counts[:, None] & bag_counts[None, :]
        if WANTS_TEXT:
            found = tl.min(tl.where(nan, patch[:, None], NOWHERE), 0)
            out = outputs[2] + (t * n_images + i) * n_bags + bag
            tl.store(out, found, mask=found != NOWHERE)
        if WANTS_IMAGE:
            found = tl.min(tl.where(nan, bag[None, :], NOWHERE), 1)
            tl.store(outputs[3] + place * n_patches + patch, found, mask=found != NOWHERE)
