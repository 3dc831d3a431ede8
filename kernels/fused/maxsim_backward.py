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

SWEEP = tl.constexpr(256)


@triton.jit
def _power_of_two(largest):
    """Scale that brings ``largest`` to about 2**10, and its inverse; both powers of two."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    field = tl.minimum(tl.maximum(264 - exponent, 1), 253)
    scale = (field << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(grad, base, stride, n, COUNT: tl.constexpr):
    """Largest absolute value over COUNT rows of n values each, ``stride`` apart."""
    most = tl.zeros((COUNT, SWEEP), tl.float32)
    for first in range(0, n, SWEEP):
        place = first + tl.arange(0, SWEEP)
        at = grad + base[:, None] + place.to(tl.int64)[None, :] * stride
        most = tl.maximum(most, tl.abs(tl.load(at, mask=(place < n)[None, :], other=0.0)))
    return tl.max(tl.max(most, 1), 0)


@triton.jit
def _bags_of(
    place, end, plan, order, n_bags, pieces, WIDTH: tl.constexpr, SLOT: tl.constexpr,
    CUT: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """For WIDTH columns of SLOT a piece of text: text, bag, whether that bag is there and counts.

    A text of more than SLOT bags lies in ``pieces`` places one after the other. WIDE: texts are
    numbered in 64 bits, because offsets among scores, indices or features may pass 2**31.
    """
    rows, counts, _ = plan
    col = tl.arange(0, WIDTH)
    place = place + col // SLOT
    live = place < end
    place = tl.minimum(place, end - 1)
    text, position = place, col % SLOT
    if CUT:
        text = place // pieces
        position += (place % pieces) * SLOT
    if ORDERED:
        text = tl.load(order + text)
    count = tl.full((WIDTH,), n_bags, tl.int32)
    if MASKED:
        count = tl.load(counts + text)
    if WIDE:
        text = text.to(tl.int64)
    keep = live & (position < count)
    bag = tl.maximum(tl.minimum(position, count - 1), 0)
    if MASKED:
        bag = tl.load(rows + text * n_bags + bag)
    return text, bag, keep, count


@triton.jit
def _patches_of(position, item, plan, length, n_patches, MASKED: tl.constexpr):
    """Patch at each position, the last one past the end, and whether it is there."""
    patch = tl.minimum(position, length - 1)
    if MASKED:
        patch = tl.load(plan[0] + item * n_patches + patch)
    return patch, position < length


@triton.jit
def _features(base, rows, keep, width, first, SPAN: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, SPAN] features; zeros where a row does not count, so that it is never read."""
    col = first + tl.arange(0, SPAN)
    inside = keep[:, None]
    if not WHOLE:
        inside = inside & (col < width)[None, :]
    return tl.load(base + (rows[:, None] + col[None, :]), mask=inside, other=0.0)


@triton.jit
def _bag_side(
    grads, text_argmax, owner, bag, keep, count, image, pairs, length, n_images, n_bags, scale,
    MEAN: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    """For each bag: gradient of its own choice, the patch that it chose, gradient of being chosen.

    ``pairs`` is the place of the pair in the image's direction, as a scalar and a vector part.
    """
    forth = tl.zeros_like(scale + count)
    back, choice = forth, tl.zeros_like(count)
    if TO_IMAGE:
        forth = tl.load(grads[0] + image + owner * n_images, mask=keep, other=0.0) * scale
        if MEAN:
            forth = forth / tl.maximum(count, 1)
        choice = tl.load(text_argmax + image * n_bags + (owner * n_images * n_bags + bag))
    if TO_TEXT:
        back = tl.load(grads[1] + pairs[0] + pairs[1], mask=keep, other=0.0) * scale
        if MEAN:
            back = back / tl.maximum(length, 1)
    return forth, choice.to(tl.int32), back


@triton.jit
def _choose(
    patch, bag, bag_side, image_argmax, pairs, n_patches,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    """The tile ``chosen`` [BLOCK_P, BLOCK_N] of the module's docstring, both directions merged.

    Rows past the image's end repeat its last patch: their owner stores no such row, and who streams
    them reads zeros there. Columns of no bag have no gradient.
    """
    GROUP: tl.constexpr = BLOCK_N // SLOT
    forth, choice, back = bag_side
    chosen = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if TO_IMAGE:
        chosen = tl.where(choice[None, :] == patch[:, None], forth[None, :], 0.0)
    if TO_TEXT:
        place = pairs[1][None, :] * n_patches + patch[:, None]
        won = tl.load(image_argmax + pairs[0] * n_patches + place)
        won = tl.broadcast_to(won.to(tl.int32)[:, :, None], (BLOCK_P, GROUP, SLOT))
        won = tl.reshape(won, (BLOCK_P, BLOCK_N))
        chosen += tl.where(won == bag[None, :], back[None, :], 0.0)
    return chosen


@triton.jit(do_not_specialize=SIZES)
def grad_text_kernel(
    image, text_plan, image_plan, order, bounds, grads, text_argmax, image_argmax, grad_text,
    n_texts, n_images, n_bags, n_patches, width, pieces, list_stride, image_stride, patch_stride,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, CUT: tl.constexpr,
    ORDERED: tl.constexpr, TEXT_MASK: tl.constexpr,
    IMAGE_MASK: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr,
    TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Gradient of the texts of program axis 0, features of axis 1; see the module's docstring."""
    width, patch_stride = width * UNIT, patch_stride * UNIT
    GROUP: tl.constexpr = BLOCK_N // SLOT
    first, end = tl.program_id(0) * GROUP, n_texts * pieces
    if ORDERED:
        first, end = first + tl.load(bounds), tl.load(bounds + 1)
    if first >= end:
        return
    owner, bag, keep, count = _bags_of(
        first, end, text_plan, order, n_bags, pieces, BLOCK_N, SLOT, CUT,
        ORDERED, TEXT_MASK, WIDE)  # fmt: skip
    group, _, _, _ = _bags_of(
        first, end, text_plan, order, n_bags, pieces, GROUP, 1, CUT,
        ORDERED, TEXT_MASK, WIDE)  # fmt: skip
    alone = tl.cast(first // pieces, tl.int64)
    scale, unscale = 1.0, 1.0
    if SCALED:
        scale, unscale = _scale_for_texts(
            grads, group, n_texts, n_images, GROUP, CANDIDATES, TO_IMAGE, TO_TEXT)  # fmt: skip
    total = tl.zeros((BLOCK_N, SPAN), tl.float32)
    for i in range(n_images):
        item, base = tl.cast(i, tl.int64), image + tl.cast(i, tl.int64) * (image_stride * UNIT)
        pair, pairs = (item * n_texts, owner), (item * n_texts, group)
        if CANDIDATES:
            base += alone * (list_stride * UNIT)
            pair, pairs = (item, owner * n_images), (item, group * n_images)
            item += alone * n_images
        length = tl.load(image_plan[1] + item) if IMAGE_MASK else n_patches
        bag_side = _bag_side(
            grads, text_argmax, owner, bag, keep, count, tl.cast(i, tl.int64), pair, length,
            n_images, n_bags, scale, MEAN, TO_IMAGE, TO_TEXT)  # fmt: skip
        for start in range(0, length, BLOCK_P):
            patch, there = _patches_of(
                start + tl.arange(0, BLOCK_P), item, image_plan, length, n_patches, IMAGE_MASK
            )
            chosen = _choose(
                patch, bag, bag_side, image_argmax, pairs, n_patches, BLOCK_P, BLOCK_N, SLOT,
                TO_IMAGE, TO_TEXT)  # fmt: skip
            rows = _features(
                base, patch * patch_stride, there, width, tl.program_id(1) * SPAN,
                SPAN, WHOLE)  # fmt: skip
            total = tl.dot(tl.trans(chosen.to(rows.dtype)), rows, total, input_precision=PRECISION)
    col = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    out = grad_text + ((owner.to(tl.int64) * n_bags + bag) * width)[:, None] + col[None, :]
    tl.store(out, total * unscale, mask=keep[:, None] & (col < width)[None, :])


@triton.jit(do_not_specialize=SIZES)
def grad_image_kernel(
    text, text_plan, image_plan, order, bounds, grads, text_argmax, image_argmax, grad_image,
    n_texts, n_images, n_bags, n_patches, width, pieces, text_stride, bag_stride,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    CLASSES: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
    CUT: tl.constexpr, TEXT_MASK: tl.constexpr,
    IMAGE_MASK: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr, ADD: tl.constexpr,
    TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Gradient of BLOCK_P patches of program axis 0 (image) and 1 (patches), features of axis 2.

    With CLASSES > 0 the texts come sorted into that many classes of slots, from SLOT on; ADD adds
    to what ``grad_image`` holds.
    """
    width, text_stride, bag_stride = width * UNIT, text_stride * UNIT, bag_stride * UNIT
    item = tl.program_id(0).to(tl.int64)
    length = tl.load(image_plan[1] + item) if IMAGE_MASK else n_patches
    position = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    if tl.program_id(1) * BLOCK_P >= length:
        return
    patch, there = _patches_of(position, item, image_plan, length, n_patches, IMAGE_MASK)
    scale, unscale = 1.0, 1.0
    if SCALED:
        scale, unscale = _scale_for_image(
            grads, item, n_texts, n_images, CANDIDATES, TO_IMAGE, TO_TEXT)  # fmt: skip
    total = tl.zeros((BLOCK_P, SPAN), tl.float32)
    span = tl.program_id(2) * SPAN
    sizes = n_texts, n_images, n_bags, n_patches, width, pieces, text_stride, bag_stride
    if CLASSES == 0:
        ends = (0, n_texts * pieces)
        if CANDIDATES:
            alone = (tl.program_id(0) // n_images) * pieces
            ends = (alone, alone + pieces)
        total = _stream_texts(
            total, text, text_plan, order, ends, grads, text_argmax, image_argmax, item, patch,
            length, scale, span, sizes, BLOCK_P, BLOCK_N, SLOT, SPAN, WHOLE, CUT, False,
            TEXT_MASK, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT, PRECISION, WIDE)  # fmt: skip
    for rank in tl.static_range(CLASSES):
        ends = (tl.load(bounds + rank * 4), tl.load(bounds + rank * 4 + 1))
        total = _stream_texts(
            total, text, text_plan, order, ends, grads, text_argmax, image_argmax, item, patch,
            length, scale, span, sizes, BLOCK_P, BLOCK_N, SLOT << rank, SPAN, WHOLE, CUT,
            True,
            TEXT_MASK, MEAN, CANDIDATES, TO_IMAGE, TO_TEXT, PRECISION, WIDE)  # fmt: skip
    col = span + tl.arange(0, SPAN)
    out = grad_image + ((item * n_patches + patch) * width)[:, None] + col[None, :]
    inside = there[:, None] & (col < width)[None, :]
    total = total * unscale
    if ADD:
        total += tl.load(out, mask=inside, other=0.0)
    tl.store(out, total, mask=inside)


@triton.jit
def _stream_texts(
    total, text, plan, order, ends, grads, text_argmax, image_argmax, item, patch, length,
    scale, span, sizes,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, CUT: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr,
    MEAN: tl.constexpr, CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Add what the texts of places ``ends`` owe to one tile of patches."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    n_texts, n_images, n_bags, n_patches, width, pieces, text_stride, bag_stride = sizes
    image = item % n_images if CANDIDATES else item
    for first in range(ends[0], ends[1], GROUP):
        owner, bag, keep, count = _bags_of(
            first, ends[1], plan, order, n_bags, pieces, BLOCK_N, SLOT, CUT, ORDERED, MASKED, WIDE
        )
        group, _, _, _ = _bags_of(
            first, ends[1], plan, order, n_bags, pieces, GROUP, 1, CUT,
            ORDERED, MASKED, WIDE)  # fmt: skip
        pair, pairs = (item * n_texts, owner), (item * n_texts, group)
        if CANDIDATES:
            pair, pairs = (image, owner * n_images), (image, group * n_images)
        bag_side = _bag_side(
            grads, text_argmax, owner, bag, keep, count, image, pair, length, n_images, n_bags,
            scale, MEAN, TO_IMAGE, TO_TEXT)  # fmt: skip
        chosen = _choose(
            patch, bag, bag_side, image_argmax, pairs, n_patches, BLOCK_P, BLOCK_N, SLOT,
            TO_IMAGE, TO_TEXT)  # fmt: skip
        rows = owner * text_stride + bag * bag_stride
        rows = _features(text, rows, keep, width, span, SPAN, WHOLE)
        total = tl.dot(chosen.to(rows.dtype), rows, total, input_precision=PRECISION)
    return total


@triton.jit
def _scale_for_texts(
    grads, group, n_texts, n_images,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    largest = 0.0
    if TO_IMAGE:
        largest = _largest(grads[0], group.to(tl.int64) * n_images, 1, n_images, GROUP)
    if TO_TEXT and CANDIDATES:
        base = group.to(tl.int64) * n_images
        largest = tl.maximum(largest, _largest(grads[1], base, 1, n_images, GROUP))
    elif TO_TEXT:
        largest = tl.maximum(largest, _largest(grads[1], group, n_texts, n_images, GROUP))
    return _power_of_two(largest)


@triton.jit
def _scale_for_image(
    grads, item, n_texts, n_images,
    CANDIDATES: tl.constexpr, TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    largest = 0.0
    base = item + tl.zeros((1,), tl.int64)
    if CANDIDATES:
        if TO_IMAGE:
            largest = _largest(grads[0], base, 1, 1, 1)
        if TO_TEXT:
            largest = tl.maximum(largest, _largest(grads[1], base, 1, 1, 1))
    else:
        if TO_IMAGE:
            largest = _largest(grads[0], base, n_images, n_texts, 1)
        if TO_TEXT:
            largest = tl.maximum(largest, _largest(grads[1], base * n_texts, 1, n_texts, 1))
    return _power_of_two(largest)
