"""One pass over the similarities of texts and images gives both score matrices.

Patches are the rows (M) and bags the columns (N) of every matrix product::

                     text a          text b          text c          text d       <- resident:
                  [ SLOT columns | SLOT columns | SLOT columns | SLOT columns ]      one load for
                  bag bag bag ... bag bag bag pad ...                                all the images
    image i     +----------------------------------------------------------------+
    patch rows  |  tile [BLOCK_P, BLOCK_N] of text @ image, in fp32 registers    |
    0..63       |    along a row, per slot: max over bags  -> best [BLOCK_P, 4]  |--> sums += best
    64..127     |    down a column: elementwise max into run [BLOCK_P/2, BLOCK_N]|
    ...         +----------------------------------------------------------------+
                     once per image: max over run's rows, sum over a slot's columns

- A program **owns** BLOCK_N / SLOT texts and a run of ``images_per_program`` images, hence the
  scores of all those pairs, alone: nothing is combined between programs, nothing is atomic.
- It **keeps** its texts' features on chip (or, for wide features, re-reads them in steps of STEP)
  and **streams** the patches of its images, BLOCK_P rows at a time.
- The maximum over bags is **reduced** inside a tile (within threads, then two shuffles: a slot lies
  along the accumulator's columns). The maximum over patches is kept elementwise; rows r and r + 8
  of a tile, which one thread holds, are folded first. It is reduced across threads once per image.
- Rows and columns past the end repeat the last token that counts. That changes no maximum, so the
  inner loop has no elementwise mask; only the sum over patches asks which rows exist.
- A maximum is NaN if any value under it is (FMNMX.NAN). In mode "zero" a masked token competes with
  similarity 0: a floor under the reduced maxima, since masked rows themselves are never read.
- Indices (ARGMAX): the lowest position that reaches the maximum. Where a maximum is NaN,
  nan_argmax.py writes the first NaN's index once a program has all its scores.
"""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl
from bagformer.kernels.nan_argmax import mend_nan_winners
from bagformer.kernels.primitives import (
    load_rows,
    nan_max,
    places_in_class,
    reduce_max,
    similarity,
)
from bagformer.kernels.reductions import (
    best_bags,
    best_patches,
    flush_patches,
    fold_sums,
    sum_over_bags,
    with_hole,
)

SIZES = ["n_texts", "n_images", "n_bags", "n_patches"]


@triton.jit
def resident(text, bags, width, SHAPE: tl.constexpr):
    """What a program keeps of its texts: their features, or where to read them again (STEP > 0)."""
    HEAD: tl.constexpr = SHAPE[0]
    TAIL: tl.constexpr = SHAPE[1]
    head, tail = text, bags
    if SHAPE[2] == 0:
        head = load_rows(text, bags, 0, width, HEAD, SHAPE[3])
        if TAIL > 0:
            tail = load_rows(text, bags, HEAD, width, TAIL, SHAPE[3])
    return head, tail


@triton.jit
def claim_texts(
    first, end, order, counts, n_bags,
    WIDTH: tl.constexpr, SLOT: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """For WIDTH columns of SLOT a text, from ``first`` on: text, whether it is there, its bags."""
    place = first + tl.arange(0, WIDTH) // SLOT
    live = place < end
    text = tl.minimum(place, end - 1)
    if ORDERED:
        text = tl.load(order + text)
    count = tl.full((WIDTH,), n_bags, tl.int32)
    if MASKED:
        count = tl.load(counts + text)
    return text.to(tl.int64), live, count


@triton.jit
def claim_columns(
    first, end, order, plan, n_bags, text_stride, bag_stride,
    BLOCK_N: tl.constexpr, SLOT: tl.constexpr, ORDERED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """For each column: its text, whether its bag counts, that bag, and where its features lie."""
    owner, keep, count = claim_texts(
        first, end, order, plan[1], n_bags, BLOCK_N, SLOT, ORDERED, MASKED
    )
    bag = tl.arange(0, BLOCK_N) % SLOT
    keep = keep & (bag < count)
    bag = tl.maximum(tl.minimum(bag, count - 1), 0)
    if MASKED:
        bag = tl.load(plan[0] + owner * n_bags + bag)
    return owner, keep, bag, owner * text_stride + bag.to(tl.int64) * bag_stride


@triton.jit
def store_bag_choice(
    out, pick, best, plan, owner, live, count, n_bags, keep,
    MASKED: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    """Write the bag that each patch of a tile chose, as its number in the text; -1 for no bags."""
    if MASKED:
        real = tl.load(plan[0] + owner[None, :] * n_bags + pick)
        if ZERO:
            hole = tl.load(plan[2] + owner)[None, :]
            real = with_hole(real, best, hole, hole < n_bags)
        pick = tl.where((count > 0)[None, :], real, -1)
    tl.store(out, pick, mask=keep[:, None] & live[None, :])


@triton.jit
def store_patch_choice(
    out, pick, best, plan, item, length, n_patches, keep,
    MASKED: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    """Write the patch that each bag chose, as its number in the image; -1 for no patches."""
    if MASKED:
        real = tl.load(plan[0] + item * n_patches + tl.maximum(pick, 0))
        if ZERO:
            hole = tl.load(plan[2] + item)
            real = with_hole(real, best, hole, hole < n_patches)
        pick = tl.where(length > 0, real, -1)
    tl.store(out, pick, mask=keep)


@triton.jit
def gather_leftovers(
    image, item, start, stop, n_patches, left, image_stride, patch_stride, plan, width,
    count, floor, features,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SHAPE: tl.constexpr,
    IMAGE_MASK: tl.constexpr, FLOOR: tl.constexpr, WANTS_IMAGE: tl.constexpr
):  # fmt: skip
    """One tile of the rows that the whole tiles of each image of the run leave over.

    Rows r and r + 8 repeat one patch, as ``best_patches`` folds them; pair q of rows is leftover
    ``q % left`` of image ``start + q // left``. Gives the folded tile [BLOCK_P / 16, 8, BLOCK_N],
    -inf in idle pairs, and the patches' maxima over bags [BLOCK_P, GROUP], 0 in idle rows.
    """
    GROUP: tl.constexpr = BLOCK_N // SLOT
    line = tl.arange(0, BLOCK_P)
    pair = line // 16 * 8 + line % 8
    member = start + pair // left
    keep = member < stop
    member = tl.minimum(member, stop - 1).to(tl.int64)
    length = tl.full((BLOCK_P,), n_patches, tl.int32)
    if IMAGE_MASK:
        length = tl.load(plan[1] + item + member)
    rest = length % BLOCK_P
    keep = keep & (rest <= left) & (pair % left < rest)
    row = tl.maximum(tl.minimum(length - rest + pair % left, length - 1), 0)
    if IMAGE_MASK:
        row = tl.load(plan[0] + (item + member) * n_patches + row)
    patches = member * image_stride + row * patch_stride
    tile = similarity(image, patches, features, width, BLOCK_P, BLOCK_N, SHAPE)
    run = reduce_max(tl.reshape(tile, (BLOCK_P // 16, 2, 8, BLOCK_N)), 1)
    used = tl.reshape(keep.to(tl.int32), (BLOCK_P // 16, 2, 8))
    run = tl.where((tl.max(used, 1) > 0)[:, :, None], run, float("-inf"))
    sums = tl.zeros((BLOCK_P // 16, 8, GROUP), tl.float32)
    if WANTS_IMAGE:
        keep = keep & (line % 16 < 8)
        best, _ = best_bags(tile, count, BLOCK_P, GROUP, SLOT, False)
        if FLOOR:
            best = nan_max(best, floor[None, :])
        sums = fold_sums(best, keep, BLOCK_P, GROUP)
    return run, sums


@triton.jit
def add_leftovers(run, sums, leftovers, rank, left, BLOCK_P: tl.constexpr):
    """Fold the leftover rows of image ``rank`` of the run into that image's maxima and sums."""
    pair = tl.arange(0, BLOCK_P // 16)[:, None, None] * 8 + tl.arange(0, 8)[None, :, None]
    mine = pair // left == rank
    run = nan_max(run, tl.where(mine, leftovers[0], float("-inf")))
    return run, sums + tl.where(mine, leftovers[1], 0.0)


@triton.jit
def stream_image(
    image, item, patch_stride, plan, n_patches, width, texts, features, choice,
    leftovers, rank, left,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SHAPE: tl.constexpr,
    TEXT_MASK: tl.constexpr, IMAGE_MASK: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """All patches of one image, number ``rank`` of the run, against the resident texts.

    Gives the maximum over patches [BLOCK_N], the position that reached it, the sum over patches
    [GROUP] and the number of patches that count.
    """
    GROUP: tl.constexpr = BLOCK_N // SLOT
    owner, live, count, floor, n_bags, text_plan = texts
    length = n_patches
    if IMAGE_MASK:
        length = tl.load(plan[1] + item)
    run = tl.full((BLOCK_P // 16, 8, BLOCK_N), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_P // 16, 8, BLOCK_N), tl.int32)
    sums = tl.zeros((BLOCK_P // 16, 8, GROUP), tl.float32)
    end = length
    if SHARED:
        end = tl.where(length % BLOCK_P <= left, length - length % BLOCK_P, length)
    for first in range(0, end, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        keep = row < length
        row = tl.minimum(row, length - 1)
        if IMAGE_MASK:
            row = tl.load(plan[0] + item * n_patches + row)
        tile = similarity(image, row * patch_stride, features, width, BLOCK_P, BLOCK_N, SHAPE)
        if WANTS_IMAGE:
            best, pick = best_bags(tile, count, BLOCK_P, GROUP, SLOT, ARGMAX)
            if ARGMAX:
                store_bag_choice(
                    choice[None, :] + row[:, None], pick, best, text_plan, owner, live, count,
                    n_bags, keep, TEXT_MASK, ZERO)  # fmt: skip
            if ZERO and TEXT_MASK:
                best = nan_max(best, floor[None, :])
            sums += fold_sums(best, keep, BLOCK_P, GROUP)
        if WANTS_TEXT:
            run, place = best_patches(tile, run, place, first, BLOCK_P, BLOCK_N, ARGMAX)
    if SHARED:
        run, sums = add_leftovers(run, sums, leftovers, rank, left, BLOCK_P)
    best, pick = flush_patches(run, place, length, BLOCK_P, BLOCK_N, ARGMAX)
    return best, pick, tl.sum(tl.reshape(sums, (BLOCK_P // 2, GROUP)), 0), length


@triton.jit
def _score_texts(
    first, end, order, sides, plans, outputs, sizes, run, left, strides,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SHAPE: tl.constexpr, ORDERED: tl.constexpr, TEXT_MASK: tl.constexpr, IMAGE_MASK: tl.constexpr,
    ZERO: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr, SHARED: tl.constexpr,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """All that a program does: texts from place ``first`` on, before ``end``, and its images."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    text, image = sides
    text_plan, image_plan = plans
    text_to_image, image_to_text, text_argmax, image_argmax = outputs
    n_texts, n_images, n_bags, n_patches, width = sizes
    text_stride, bag_stride, list_stride, image_stride, patch_stride = strides
    owner, live, count = claim_texts(
        first, end, order, text_plan[1], n_bags, GROUP, 1, ORDERED, TEXT_MASK)  # fmt: skip
    col_owner, col_keep, bag, bags = claim_columns(
        first, end, order, text_plan, n_bags, text_stride, bag_stride,
        BLOCK_N, SLOT, ORDERED, TEXT_MASK)  # fmt: skip
    width, image_stride, patch_stride = width * UNIT, image_stride * UNIT, patch_stride * UNIT
    features = resident(text, bags * UNIT, width, SHAPE)
    floor = tl.where(count < n_bags, 0.0, float("-inf"))
    texts = owner, live, count, floor, n_bags, text_plan
    list_item = tl.zeros((), tl.int64)
    if CANDIDATES:
        list_item = tl.cast(first, tl.int64) * n_images
        image += tl.cast(first, tl.int64) * (list_stride * UNIT)
    start = tl.program_id(1) * run
    stop = tl.minimum(start + run, n_images)
    leftovers = (0, 0)
    if SHARED:
        leftovers = gather_leftovers(
            image, list_item, start, stop, n_patches, left, image_stride, patch_stride, image_plan,
            width, count, floor, features, BLOCK_P, BLOCK_N, SLOT, SHAPE,
            IMAGE_MASK, ZERO and TEXT_MASK, WANTS_IMAGE)  # fmt: skip
    for i in range(start, stop):
        item, pair = list_item + i, tl.cast(i, tl.int64) * n_texts + owner
        if CANDIDATES:
            pair = owner * n_images + i
        best, pick, total, length = stream_image(
            image + tl.cast(i, tl.int64) * image_stride, item, patch_stride, image_plan, n_patches,
            width, texts, features, image_argmax + pair * n_patches, leftovers, i - start, left,
            BLOCK_P, BLOCK_N, SLOT, SHAPE, TEXT_MASK, IMAGE_MASK, ZERO, SHARED,
            WANTS_TEXT, WANTS_IMAGE, ARGMAX)  # fmt: skip
        if WANTS_IMAGE:
            total = tl.where(count > 0, total, 0.0)
            if MEAN:
                total = total / tl.maximum(length, 1)
            tl.store(image_to_text + pair, total, mask=live)
        if WANTS_TEXT:
            if ARGMAX:
                out = text_argmax + (col_owner * n_images + i) * n_bags + bag
                store_patch_choice(
                    out, pick, best, image_plan, item, length, n_patches, col_keep,
                    IMAGE_MASK, ZERO)  # fmt: skip
            total = sum_over_bags(
                best, col_keep, count, length, n_patches, GROUP, SLOT, ZERO and IMAGE_MASK, MEAN
            )
            tl.store(text_to_image + owner * n_images + i, total, mask=live)


# a kernel is compiled for a width and its strides, never again for another batch
@triton.jit(do_not_specialize=[*SIZES, "images_per_program", "left"])
def maxsim_forward_kernel(
    text, image, text_plan, image_plan, order, bounds,
    text_to_image, image_to_text, text_argmax, image_argmax,
    n_texts, n_images, n_bags, n_patches, width, images_per_program, left,
    text_stride, bag_stride, list_stride, image_stride, patch_stride,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SHAPE: tl.constexpr, RANKS: tl.constexpr, TEXT_MASK: tl.constexpr, IMAGE_MASK: tl.constexpr,
    ZERO: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr, SHARED: tl.constexpr,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """Scores of the texts of axis 0 with the images of axis 1; ``width`` and strides in UNITs.

    BLOCK_N, SLOT, SHARED: one of each for every slot class in RANKS, the classes whose texts this
    launch scores; without RANKS one for all texts. CANDIDATES: the one text of axis 0 has a list of
    images of its own, ``list_stride`` apart.
    """
    sides, plans = (text, image), (text_plan, image_plan)
    outputs = text_to_image, image_to_text, text_argmax, image_argmax
    sizes = n_texts, n_images, n_bags, n_patches, width
    strides = text_stride, bag_stride, list_stride, image_stride, patch_stride
    program = tl.program_id(0)
    if len(RANKS) == 0:
        _score_texts(
            program * (BLOCK_N[0] // SLOT[0]), n_texts, order, sides, plans, outputs, sizes,
            images_per_program, left, strides, UNIT, BLOCK_P, BLOCK_N[0], SLOT[0], SHAPE, False,
            TEXT_MASK, IMAGE_MASK, ZERO, MEAN, CANDIDATES, SHARED[0], WANTS_TEXT, WANTS_IMAGE,
            ARGMAX)  # fmt: skip
    for c in tl.static_range(len(RANKS)):
        first, end, programs = places_in_class(program, bounds, RANKS[c], BLOCK_N[c] // SLOT[c])
        if (program >= 0) & (program < programs):
            _score_texts(
                first, end, order, sides, plans, outputs, sizes,
                images_per_program, left, strides, UNIT, BLOCK_P, BLOCK_N[c], SLOT[c], SHAPE, True,
                TEXT_MASK, IMAGE_MASK, ZERO, MEAN, CANDIDATES, SHARED[c], WANTS_TEXT, WANTS_IMAGE,
                ARGMAX)  # fmt: skip
        program -= programs
    if ARGMAX:
        mend_nan_winners(
            order, bounds, sides, plans, outputs, sizes, images_per_program, strides, UNIT,
            BLOCK_N, SLOT, RANKS, TEXT_MASK, IMAGE_MASK, CANDIDATES, WANTS_TEXT,
            WANTS_IMAGE)  # fmt: skip
