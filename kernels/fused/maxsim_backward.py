"""Gradients of the scores: two kernels, each the sole owner of what it writes.

For one text and one image the winners form a sparse matrix over bags n and patches p::

    chosen[n, p] = grad_t2i * (bag n chose patch p) + grad_i2t * (patch p chose bag n)
    grad_text[n] = sum over images, p of chosen[n, p] * image[p]
    grad_image[p] = sum over texts, n of chosen[n, p] * text[n]

Both directions share one ``chosen`` tile, built in registers from the saved indices by comparison,
and a tile feeds the matrix units as if it were dense: that beats gathering rows, which would read
257 rows of features for each text and image.

- ``grad_text_kernel``: a program **owns** BLOCK_N rows of bags (GROUP texts) by SPAN columns and
  **streams** all images, BLOCK_P patches at a time.
- ``grad_image_kernel``: a program **owns** BLOCK_P patches of one image by SPAN columns and
  **streams** all texts, BLOCK_N bags at a time.
- Sums run in fp32 in a fixed order inside one program: no atomics, the same bits every time.
- ``chosen`` is rounded to the features' dtype before the product. float16 has little range, so
  there each program scales by a power of two that brings its largest gradient near 2**10, and
  unscales.
- A NaN or Inf among the streamed features that count reaches every row that the program owns
  (0 * NaN), also where it was not chosen.
"""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl
from bagformer.kernels.maxsim import SIZES
from bagformer.kernels.owners import bags_of, load_features, patches_of, store_sums, store_zeros
from bagformer.kernels.primitives import places_in_class
from bagformer.kernels.scales import SWEEP, scale_for_image, scale_for_texts
from bagformer.kernels.selection import (
    chosen_bags,
    chosen_by_image,
    chosen_by_rows,
    chosen_by_text,
    chosen_patches,
    slopes_of_bags,
    slopes_of_patches,
)


@triton.jit
def _grad_of_texts(
    first, end, sides, plans, order, grads, winners, grad_text, sizes, pieces, strides,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, CUT: tl.constexpr, ORDERED: tl.constexpr,
    TEXT_MASK: tl.constexpr, IMAGE_MASK: tl.constexpr, MEAN: tl.constexpr,
    CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """All that a program does for the pieces of texts from place ``first`` on, before ``end``."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    text_plan, image_plan = plans
    n_texts, n_images, n_bags, _, width = sizes
    list_stride, image_stride, patch_stride = strides
    texts = bags_of(
        first, end, text_plan, order, n_bags, pieces, BLOCK_N, SLOT, CUT,
        ORDERED, TEXT_MASK, WIDE)  # fmt: skip
    group, _, _, _ = bags_of(
        first, end, text_plan, order, n_bags, pieces, GROUP, 1, CUT,
        ORDERED, TEXT_MASK, WIDE)  # fmt: skip
    scale, unscale = 1.0, 1.0
    if SCALED:
        scale, unscale = scale_for_texts(
            grads, group, n_texts, n_images, GROUP, CANDIDATES, TO_IMAGE, TO_TEXT)  # fmt: skip
    span = tl.program_id(1) * SPAN
    alone = tl.cast(0, tl.int64)
    if CANDIDATES:
        alone = tl.cast(first // pieces, tl.int64)
    images = sides + alone * list_stride, image_plan, alone * n_images
    total = tl.zeros((BLOCK_N, SPAN), tl.float32)
    total = _stream_images(
        total, images, (image_stride, patch_stride), winners, texts, group, scale, span, sizes,
        BLOCK_P, BLOCK_N, SLOT, SPAN, WHOLE, IMAGE_MASK, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT,
        PACKED, PRECISION)  # fmt: skip
    owner, bag, keep, count = texts
    base = grad_text + owner.to(tl.int64) * n_bags * width
    store_sums(
        base + bag.to(tl.int64) * width, keep, total, unscale, span, width, BLOCK_N, SPAN, False
    )
    if TEXT_MASK:
        _zero_masked_bags(
            base, first, end, text_plan, owner, count, n_bags, pieces, span, width,
            BLOCK_N, SLOT, SPAN, CUT)  # fmt: skip


@triton.jit
def _zero_masked_bags(
    base, first, end, plan, owner, count, n_bags, pieces, span, width,
    BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SPAN: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """Zeros for the masked bags of a program's texts, which stand in the plan after the others.

    A piece of a text has its own; a text of a class of slots may have more than its slot.
    """
    col = tl.arange(0, BLOCK_N)
    place, position = first + col // SLOT, col % SLOT
    rounds = tl.cdiv(n_bags, SLOT)
    if CUT:
        position += (place % pieces) * SLOT
        rounds = 1
    for _ in range(rounds):
        empty = (place < end) & (position >= count) & (position < n_bags)
        bag = tl.load(plan[0] + owner * n_bags + position, mask=empty, other=0)
        store_zeros(base + bag.to(tl.int64) * width, empty, span, width, BLOCK_N, SPAN)
        position += SLOT


@triton.jit(do_not_specialize=SIZES)
def grad_text_kernel(
    image, text_plan, image_plan, order, bounds, grads, text_argmax, image_argmax, grad_text,
    n_texts, n_images, n_bags, n_patches, width, pieces, list_stride, image_stride, patch_stride,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, CUT: tl.constexpr, RANKS: tl.constexpr,
    TEXT_MASK: tl.constexpr, IMAGE_MASK: tl.constexpr, MEAN: tl.constexpr,
    CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Gradient of the texts of program axis 0, features of axis 1; see the module's docstring.

    BLOCK_N and SLOT: as in ``maxsim_forward_kernel`` one for each class in RANKS.
    """
    plans, winners = (text_plan, image_plan), (grads[0], grads[1], text_argmax, image_argmax)
    sizes = n_texts, n_images, n_bags, n_patches, width * UNIT
    strides = list_stride * UNIT, image_stride * UNIT, patch_stride * UNIT
    program = tl.program_id(0)
    if len(RANKS) == 0:
        _grad_of_texts(
            program * (BLOCK_N[0] // SLOT[0]), n_texts * pieces, image, plans, order, grads,
            winners, grad_text, sizes, pieces, strides, BLOCK_P, BLOCK_N[0], SLOT[0], SPAN, WHOLE,
            CUT, False, TEXT_MASK, IMAGE_MASK, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT, SCALED,
            PRECISION, WIDE, PACKED)  # fmt: skip
    for c in tl.static_range(len(RANKS)):
        first, end, programs = places_in_class(program, bounds, RANKS[c], BLOCK_N[c] // SLOT[c])
        if (program >= 0) & (program < programs):
            _grad_of_texts(
                first, end, image, plans, order, grads, winners, grad_text, sizes, pieces, strides,
                BLOCK_P, BLOCK_N[c], SLOT[c], SPAN, WHOLE, CUT, True, TEXT_MASK, IMAGE_MASK, MEAN,
                CANDIDATES, TO_IMAGE, TO_TEXT, SCALED, PRECISION, WIDE, PACKED)  # fmt: skip
        program -= programs


@triton.jit
def _rounds_of(images, n_images, n_patches, BLOCK_P: tl.constexpr, MASKED: tl.constexpr):
    """Tiles of all images; an image of no patches takes one, all zeros."""
    if MASKED:
        rounds = tl.zeros((SWEEP,), tl.int32)
        for first in range(0, n_images, SWEEP):
            item = first + tl.arange(0, SWEEP)
            length = tl.load(images[1][1] + images[2] + item, mask=item < n_images, other=0)
            rounds += tl.where(item < n_images, tl.maximum(tl.cdiv(length, BLOCK_P), 1), 0)
        total = tl.sum(rounds, 0)
    else:
        total = n_images * tl.cdiv(n_patches, BLOCK_P)
    return total


@triton.jit
def _stream_images(
    total, images, strides, winners, texts, group, scale, span, sizes,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr,
    TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add what all images owe to the texts.

    One loop over the tiles of all images, so that loads run ahead from one image into the next;
    what a round compares is loaded during the round before.
    """
    owner, bag, keep, count = texts
    n_images, n_patches, width = sizes[1], sizes[3], sizes[4]
    i, start, length = tl.cast(0, tl.int32), tl.cast(0, tl.int32), n_patches
    if MASKED:
        length = tl.load(images[1][1] + images[2])
    patch, there = patches_of(
        tl.arange(0, BLOCK_P), images[2], images[1], length, n_patches, MASKED
    )
    slope = slopes_of_bags(winners, owner, keep, count, i, scale, sizes, MEAN, TO_IMAGE)
    choice = chosen_patches(winners, owner, bag, i, sizes, TO_IMAGE)
    back = slopes_of_patches(
        winners, owner, keep, length, i, scale, sizes, MEAN, CANDIDATES, TO_TEXT
    )
    won = chosen_bags(winners, group, i, patch, sizes, 0, CANDIDATES, TO_TEXT)
    for _ in range(_rounds_of(images, n_images, n_patches, BLOCK_P, MASKED)):
        rows = load_features(
            images[0] + tl.cast(i, tl.int64) * strides[0], patch * strides[1], there, width, span,
            SPAN, WHOLE)  # fmt: skip
        chosen = chosen_by_text(
            images[0].dtype.element_ty, start, patch, bag, slope, choice, back, won,
            BLOCK_P, BLOCK_N, SLOT, TO_IMAGE, TO_TEXT, PACKED, not MASKED)  # fmt: skip
        start += BLOCK_P
        done = start >= length
        start = tl.where(done, 0, start)
        i = tl.minimum(i + done.to(tl.int32), n_images - 1)
        if MASKED:
            length = tl.load(images[1][1] + images[2] + i)
        patch, there = patches_of(
            start + tl.arange(0, BLOCK_P), images[2] + i, images[1], length, n_patches, MASKED
        )
        slope = slopes_of_bags(winners, owner, keep, count, i, scale, sizes, MEAN, TO_IMAGE)
        choice = chosen_patches(winners, owner, bag, i, sizes, TO_IMAGE)
        back = slopes_of_patches(
            winners, owner, keep, length, i, scale, sizes, MEAN, CANDIDATES, TO_TEXT
        )
        won = chosen_bags(winners, group, i, patch, sizes, 0, CANDIDATES, TO_TEXT)
        total = tl.dot(chosen, rows, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=[*SIZES, "left"])
def grad_image_kernel(
    text, text_plan, image_plan, order, bounds, grads, text_argmax, image_argmax, grad_image,
    n_texts, n_images, n_bags, n_patches, width, pieces, left, text_stride, bag_stride,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    CLASSES: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
    CUT: tl.constexpr, TEXT_MASK: tl.constexpr,
    IMAGE_MASK: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr, ADD: tl.constexpr,
    TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Gradient of BLOCK_P patches of program axis 0 (image) and 1 (patches), features of axis 2.

    With CLASSES > 0 the texts come sorted into that many classes of slots, from SLOT on; ADD adds
    to what ``grad_image`` holds. SHARED: the first programs of axis 0 own the ``left`` rows that
    whole tiles leave over of each image, those of many images in one tile. It has half as many
    rows as others, since each has winners of its own.
    """
    width, text_stride, bag_stride = width * UNIT, text_stride * UNIT, bag_stride * UNIT
    sizes = n_texts, n_images, n_bags, n_patches, width
    texts = text, text_plan, order, pieces, text_stride, bag_stride
    winners = grads[0], grads[1], text_argmax, image_argmax
    span = tl.program_id(2) * SPAN
    item = tl.program_id(0).to(tl.int64)
    if SHARED:
        HALF: tl.constexpr = BLOCK_P // 2
        together = HALF // left
        gathered = tl.cdiv(n_images, together)
        if (item < gathered) & (tl.program_id(1) == 0):
            _own_leftovers(
                item * together, together, left, texts, bounds, winners, grad_image, span, sizes,
                HALF, BLOCK_N, SLOT, CLASSES, SPAN, WHOLE, CUT, TEXT_MASK, MEAN, ADD,
                TO_IMAGE, TO_TEXT, PRECISION)  # fmt: skip
        if item < gathered:
            return
        item -= gathered
    length = tl.load(image_plan[1] + item) if IMAGE_MASK else n_patches
    position = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    if IMAGE_MASK and not ADD:
        empty = (position >= length) & (position < n_patches)
        patch = tl.load(image_plan[0] + item * n_patches + position, mask=empty, other=0)
        rows = grad_image + (item * n_patches + patch) * width
        store_zeros(rows, empty, span, width, BLOCK_P, SPAN)
    if tl.program_id(1) * BLOCK_P >= length:
        return
    patch, there = patches_of(position, item, image_plan, length, n_patches, IMAGE_MASK)
    scale, unscale = 1.0, 1.0
    if SCALED:
        scale, unscale = scale_for_image(
            grads, item, n_texts, n_images, CANDIDATES, TO_IMAGE, TO_TEXT)  # fmt: skip
    total = tl.zeros((BLOCK_P, SPAN), tl.float32)
    i = item % n_images if CANDIDATES else item
    if CLASSES == 0:
        ends = (0, n_texts * pieces)
        if CANDIDATES:
            alone = (tl.program_id(0) // n_images) * pieces
            ends = (alone, alone + pieces)
        total = _stream_texts(
            total, texts, ends, winners, i, patch, length, scale, span, sizes, BLOCK_P, BLOCK_N,
            SLOT, SPAN, WHOLE, CUT, False, TEXT_MASK, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT, PACKED,
            PRECISION, WIDE)  # fmt: skip
    for rank in tl.static_range(CLASSES):
        ends = (tl.load(bounds + rank * 4), tl.load(bounds + rank * 4 + 1))
        total = _stream_texts(
            total, texts, ends, winners, i, patch, length, scale, span, sizes, BLOCK_P, BLOCK_N,
            SLOT << rank, SPAN, WHOLE, CUT, True, TEXT_MASK, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT,
            PACKED, PRECISION, WIDE)  # fmt: skip
    rows = grad_image + (item * n_patches + patch) * width
    store_sums(rows, there, total, unscale, span, width, BLOCK_P, SPAN, ADD)


@triton.jit
def _own_leftovers(
    first, together, left, texts, bounds, winners, grad_image, span, sizes,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, CLASSES: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, CUT: tl.constexpr, MASKED: tl.constexpr,
    MEAN: tl.constexpr, ADD: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """The last ``left`` patches of ``together`` images from ``first`` on, all texts."""
    n_images, n_patches, width = sizes[1], sizes[3], sizes[4]
    row = tl.arange(0, BLOCK_P)
    there = (row < together * left) & (first + row // left < n_images)
    turn = tl.minimum(row // left, n_images - 1 - first.to(tl.int32))
    patch = n_patches - left + row % left
    total = tl.zeros((BLOCK_P, SPAN), tl.float32)
    if CLASSES == 0:
        total = _stream_to_rows(
            total, texts, (0, sizes[0] * texts[3]), winners, first, turn, patch, span, sizes,
            BLOCK_P, BLOCK_N, SLOT, SPAN, WHOLE, CUT, False, MASKED, MEAN, TO_IMAGE, TO_TEXT,
            PRECISION)  # fmt: skip
    for rank in tl.static_range(CLASSES):
        ends = (tl.load(bounds + rank * 4), tl.load(bounds + rank * 4 + 1))
        total = _stream_to_rows(
            total, texts, ends, winners, first, turn, patch, span, sizes, BLOCK_P, BLOCK_N,
            SLOT << rank, SPAN, WHOLE, CUT, True, MASKED, MEAN, TO_IMAGE, TO_TEXT,
            PRECISION)  # fmt: skip
    rows = grad_image + ((first + turn) * n_patches + patch) * width
    store_sums(rows, there, total, 1.0, span, width, BLOCK_P, SPAN, ADD)


@triton.jit
def _stream_to_rows(
    total, texts, ends, winners, item, turn, patch, span, sizes,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, CUT: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr,
    MEAN: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add what the texts of places ``ends`` owe to rows of many images."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    text, plan, order, pieces, text_stride, bag_stride = texts
    # one stage: what would be loaded ahead has no room in registers
    for first in tl.range(ends[0], ends[1], GROUP, num_stages=1):
        owner, bag, keep, _ = bags_of(
            first, ends[1], plan, order, sizes[2], pieces, BLOCK_N, SLOT, CUT, ORDERED, MASKED,
            False)  # fmt: skip
        group, _, live, count = bags_of(
            first, ends[1], plan, order, sizes[2], pieces, GROUP, 1, CUT, ORDERED, MASKED, False
        )
        chosen = chosen_by_rows(
            text.dtype.element_ty, winners, owner, bag, group, live, count, item, turn, patch,
            sizes, BLOCK_P, BLOCK_N, SLOT, MEAN, TO_IMAGE, TO_TEXT)  # fmt: skip
        rows = owner * text_stride + bag * bag_stride
        rows = load_features(text, rows, keep, sizes[4], span, SPAN, WHOLE)
        total = tl.dot(chosen, rows, total, input_precision=PRECISION)
    return total


@triton.jit
def _winners_of(
    first, end, texts, winners, i, patch, length, scale, sizes,
    BLOCK_N: tl.constexpr, SLOT: tl.constexpr, CUT: tl.constexpr, ORDERED: tl.constexpr,
    MASKED: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr,
    TO_TEXT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """What a tile of the texts from ``first`` on compares: choices of bags and of patches."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    _, plan, order, pieces, _, _ = texts
    owner, bag, _, _ = bags_of(
        first, end, plan, order, sizes[2], pieces, BLOCK_N, SLOT, CUT, ORDERED, MASKED, WIDE
    )
    group, _, keep, count = bags_of(
        first, end, plan, order, sizes[2], pieces, GROUP, 1, CUT, ORDERED, MASKED, WIDE
    )
    slope = slopes_of_bags(winners, group, keep, count, i, scale, sizes, MEAN, TO_IMAGE)
    choice = chosen_patches(winners, owner, bag, i, sizes, TO_IMAGE)
    back = slopes_of_patches(
        winners, group, keep, length, i, scale, sizes, MEAN, CANDIDATES, TO_TEXT
    )
    won = chosen_bags(winners, group, i, patch, sizes, 1, CANDIDATES, TO_TEXT)
    return slope, choice, back, won


@triton.jit
def _stream_texts(
    total, texts, ends, winners, i, patch, length, scale, span, sizes,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, CUT: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr,
    MEAN: tl.constexpr, CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Add what the texts of places ``ends`` owe to one tile of patches.

    What a round compares is loaded during the round before.
    """
    GROUP: tl.constexpr = BLOCK_N // SLOT
    text, plan, order, pieces, text_stride, bag_stride = texts
    slope, choice, back, won = _winners_of(
        ends[0], ends[1], texts, winners, i, patch, length, scale, sizes, BLOCK_N, SLOT, CUT,
        ORDERED, MASKED, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT, WIDE)  # fmt: skip
    for first in range(ends[0], ends[1], GROUP):
        owner, bag, keep, _ = bags_of(
            first, ends[1], plan, order, sizes[2], pieces, BLOCK_N, SLOT, CUT, ORDERED, MASKED, WIDE
        )
        rows = owner * text_stride + bag * bag_stride
        rows = load_features(text, rows, keep, sizes[4], span, SPAN, WHOLE)
        chosen = chosen_by_image(
            text.dtype.element_ty, patch, bag, slope, choice, back, won,
            BLOCK_P, BLOCK_N, SLOT, TO_IMAGE, TO_TEXT, PACKED, not MASKED)  # fmt: skip
        slope, choice, back, won = _winners_of(
            first + GROUP, ends[1], texts, winners, i, patch, length, scale, sizes, BLOCK_N, SLOT,
            CUT, ORDERED, MASKED, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT, WIDE)  # fmt: skip
        total = tl.dot(chosen, rows, total, input_precision=PRECISION)
    return total
