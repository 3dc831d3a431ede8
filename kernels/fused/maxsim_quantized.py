"""Both score matrices from images of eight-bit numbers, one scale for each patch.

The pass is that of maxsim.py. What differs is the tile: values are loaded as they are stored, half
the bytes of bfloat16, widened in registers to the text's dtype, which holds every one of them
exactly, multiplied on the matrix units, and each row of the product takes its patch's scale::

    patches [BLOCK_P, D] int8 | fp8  ->  text's dtype  ->  product with bags [D, BLOCK_N], fp32
                                                                 |
    scales  [BLOCK_P] fp32  -------------------------------->  times, row by row  ->  maxima

Scores alone. Indices, and texts of more bags than a tile holds, take the kernel of maxsim.py on a
dequantized copy in float32.
"""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import torch
import triton
import triton.language as tl
from bagformer.kernels import plan as planning
from bagformer.kernels import scoring, tiles
from bagformer.kernels.maxsim import SIZES, claim_columns, claim_texts, resident
from bagformer.kernels.plan import NOTHING, Plan
from bagformer.kernels.primitives import load_rows, nan_max, places_in_class
from bagformer.kernels.reductions import best_bags, best_patches, flush_patches, sum_over_bags
from torch import Tensor

INT8, FP8_NATIVE, FP8_BITS = 0, 1, 2


@triton.jit
def exactly(stored, like, FORMAT: tl.constexpr):
    """Stored numbers in the dtype of ``like``. FORMAT: 0 int8, 1 fp8 by the GPU, 2 fp8 by hand."""
    if FORMAT == 1:
        return stored.to(tl.float8e4nv, bitcast=True).to(like.dtype)
    if FORMAT == 2:
        bits = stored.to(tl.int32)
        magnitude = bits & 0x7F
        number = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)
        # 2^120 moves the exponent's bias from 7 to 127 and makes subnormal numbers normal
        number = number * 1329227995784915872903807060280344576.0
        return tl.where(magnitude == 0x7F, float("nan"), number).to(like.dtype)
    return stored.to(like.dtype)


@triton.jit
def scaled_similarity(
    image, patches, scale, features, width,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SHAPE: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Tile [BLOCK_P, BLOCK_N] of ``patches @ bags.T`` with rows scaled; SHAPE as in maxsim.py."""
    HEAD: tl.constexpr = SHAPE[0]
    TAIL: tl.constexpr = SHAPE[1]
    STEP: tl.constexpr = SHAPE[2]
    WHOLE: tl.constexpr = SHAPE[3]
    PRECISION: tl.constexpr = SHAPE[4]
    if STEP > 0:
        text, bags = features
        tile = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for first in range(0, width, STEP):
            cols = load_rows(text, bags, first, width, STEP, WHOLE)
            rows = exactly(load_rows(image, patches, first, width, STEP, WHOLE), cols, FORMAT)
            tile = tl.dot(rows, tl.trans(cols), tile, input_precision=PRECISION)
    else:
        head, tail = features
        rows = exactly(load_rows(image, patches, 0, width, HEAD, WHOLE), head, FORMAT)
        tile = tl.dot(rows, tl.trans(head), input_precision=PRECISION)
        if TAIL > 0:
            rows = exactly(load_rows(image, patches, HEAD, width, TAIL, WHOLE), tail, FORMAT)
            tile = tl.dot(rows, tl.trans(tail), tile, input_precision=PRECISION)
    return tile * scale[:, None]


@triton.jit
def stream_quantized(
    image, item, patch_stride, scales, plan, n_patches, width, features, count, floor,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, SHAPE: tl.constexpr,
    FORMAT: tl.constexpr, IMAGE_MASK: tl.constexpr, FLOOR: tl.constexpr,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr
):  # fmt: skip
    """All patches of one image: maximum over them [BLOCK_N], sum over them [GROUP], how many."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    length = n_patches
    if IMAGE_MASK:
        length = tl.load(plan[1] + item)
    run = tl.full((BLOCK_P // 16, 8, BLOCK_N), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_P // 16, 8, BLOCK_N), tl.int32)
    sums = tl.zeros((BLOCK_P, GROUP), tl.float32)
    for first in range(0, length, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        keep = row < length
        row = tl.minimum(row, length - 1)
        if IMAGE_MASK:
            row = tl.load(plan[0] + item * n_patches + row)
        scale = tl.load(scales + item * n_patches + row)
        tile = scaled_similarity(
            image, row * patch_stride, scale, features, width, BLOCK_P, BLOCK_N, SHAPE, FORMAT
        )
        if WANTS_IMAGE:
            best, _ = best_bags(tile, count, BLOCK_P, GROUP, SLOT, False)
            if FLOOR:
                best = nan_max(best, floor[None, :])
            sums += tl.where(keep[:, None], best, 0.0)
        if WANTS_TEXT:
            run, place = best_patches(tile, run, place, first, BLOCK_P, BLOCK_N, False)
    best, _ = flush_patches(run, place, length, BLOCK_P, BLOCK_N, False)
    return best, tl.sum(sums, 0), length


@triton.jit
def _score_quantized(
    first, end, order, sides, plans, outputs, sizes, run, strides,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SHAPE: tl.constexpr, FORMAT: tl.constexpr, ORDERED: tl.constexpr, TEXT_MASK: tl.constexpr,
    IMAGE_MASK: tl.constexpr, ZERO: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr
):  # fmt: skip
    """All that a program does: texts from place ``first`` on, before ``end``, and its images."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    text, image, scales = sides
    text_plan, image_plan = plans
    text_to_image, image_to_text = outputs
    n_texts, n_images, n_bags, n_patches, width = sizes
    text_stride, bag_stride, list_stride, image_stride, patch_stride = strides
    owner, live, count = claim_texts(
        first, end, order, text_plan[1], n_bags, GROUP, 1, ORDERED, TEXT_MASK)  # fmt: skip
    _, col_keep, _, bags = claim_columns(
        first, end, order, text_plan, n_bags, text_stride, bag_stride,
        BLOCK_N, SLOT, ORDERED, TEXT_MASK)  # fmt: skip
    width, patch_stride = width * UNIT, patch_stride * UNIT
    features = resident(text, bags * UNIT, width, SHAPE)
    floor = tl.where(count < n_bags, 0.0, float("-inf"))
    start = tl.program_id(1) * run
    for i in range(start, tl.minimum(start + run, n_images)):
        item, pair = tl.cast(i, tl.int64), tl.cast(i, tl.int64) * n_texts + owner
        base = image + item * (image_stride * UNIT)
        if CANDIDATES:
            item += tl.cast(first, tl.int64) * n_images
            pair = owner * n_images + i
            base += tl.cast(first, tl.int64) * (list_stride * UNIT)
        best, total, length = stream_quantized(
            base, item, patch_stride, scales, image_plan, n_patches, width, features, count, floor,
            BLOCK_P, BLOCK_N, SLOT, SHAPE, FORMAT, IMAGE_MASK, ZERO and TEXT_MASK,
            WANTS_TEXT, WANTS_IMAGE)  # fmt: skip
        if WANTS_IMAGE:
            total = tl.where(count > 0, total, 0.0)
            if MEAN:
                total = total / tl.maximum(length, 1)
            tl.store(image_to_text + pair, total, mask=live)
        if WANTS_TEXT:
            total = sum_over_bags(
                best, col_keep, count, length, n_patches, GROUP, SLOT, ZERO and IMAGE_MASK, MEAN
            )
            tl.store(text_to_image + owner * n_images + i, total, mask=live)


@triton.jit(do_not_specialize=[*SIZES, "images_per_program"])
def maxsim_quantized_kernel(
    text, image, scales, text_plan, image_plan, order, bounds, text_to_image, image_to_text,
    n_texts, n_images, n_bags, n_patches, width, images_per_program,
    text_stride, bag_stride, list_stride, image_stride, patch_stride,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr,
    SHAPE: tl.constexpr, FORMAT: tl.constexpr, RANKS: tl.constexpr, TEXT_MASK: tl.constexpr,
    IMAGE_MASK: tl.constexpr, ZERO: tl.constexpr, MEAN: tl.constexpr, CANDIDATES: tl.constexpr,
    WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr
):  # fmt: skip
    """As ``maxsim_forward_kernel``, without indices; ``scales`` are contiguous."""
    sides, plans = (text, image, scales), (text_plan, image_plan)
    outputs = text_to_image, image_to_text
    sizes = n_texts, n_images, n_bags, n_patches, width
    strides = text_stride, bag_stride, list_stride, image_stride, patch_stride
    program = tl.program_id(0)
    if len(RANKS) == 0:
        _score_quantized(
            program * (BLOCK_N[0] // SLOT[0]), n_texts, order, sides, plans, outputs, sizes,
            images_per_program, strides, UNIT, BLOCK_P, BLOCK_N[0], SLOT[0], SHAPE, FORMAT, False,
            TEXT_MASK, IMAGE_MASK, ZERO, MEAN, CANDIDATES, WANTS_TEXT, WANTS_IMAGE)  # fmt: skip
    for c in tl.static_range(len(RANKS)):
        first, end, programs = places_in_class(program, bounds, RANKS[c], BLOCK_N[c] // SLOT[c])
        if (program >= 0) & (program < programs):
            _score_quantized(
                first, end, order, sides, plans, outputs, sizes, images_per_program, strides,
                UNIT, BLOCK_P, BLOCK_N[c], SLOT[c], SHAPE, FORMAT, True,
                TEXT_MASK, IMAGE_MASK, ZERO, MEAN, CANDIDATES, WANTS_TEXT, WANTS_IMAGE)  # fmt: skip
        program -= programs


def maxsim_quantized_forward(
    text: Tensor,
    values: Tensor,
    scales: Tensor,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    wants_text: bool = True,
    wants_image: bool = True,
    mean: bool = False,
    want_argmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``scoring.maxsim_forward`` of ``text`` with ``values * scales[..., None]``.

    Args:
        text: ``[Nt, N, D]`` in bfloat16, float16 or float32.
        values: int8 or float8_e4m3fn ``[Ni, P, D]``, or ``[Nt, K, P, D]`` for candidates.
        scales: float32, as ``values`` without ``D``.
    """
    if want_argmax or text.shape[1] > scoring.LONGEST_SLOT:
        return scoring.maxsim_forward(
            text.float(), values.float() * scales[..., None], text_mask, image_mask, mask_mode,
            wants_text, wants_image, mean, want_argmax,
        )  # fmt: skip
    text, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (text, values))
    outputs = scoring._outputs(text, values, wants_text, wants_image, False)
    if text.numel() == 0 or values.numel() == 0:
        outputs.text_to_image.zero_()
        outputs.image_to_text.zero_()
        return outputs
    options = scoring.Options(mask_mode == "zero", mean, "ieee")
    classes = scoring.slot_classes(text, values, text_mask)
    plan = planning.make(text, values, (text_mask, image_mask), classes)
    slot, together = tiles.slot_of(text.shape[1]), text.shape[0]
    if values.dim() == 4:
        slot, together = max(slot, tiles.SMALLEST_BLOCK), 1
    sizes = text.device, text.dtype, text.shape[2]
    sides = text, values, scales.contiguous()
    for slots in scoring.launches(
        slot, text.shape[0], classes, lambda one: tiles.quantized_tile(*sizes, one, together)
    ):
        _launch(sides, plan, options, outputs, slots)
    return outputs


def _launch(
    sides: tuple[Tensor, Tensor, Tensor],
    plan: Plan,
    options: scoring.Options,
    outputs: scoring.Outputs,
    slots: scoring.Slots,
) -> None:
    text, values, scales = sides
    n_texts, n_bags, width = text.shape
    n_images, n_patches = values.shape[-3:-1]
    tile, stored = slots.tiles[0], INT8
    if values.dtype == torch.float8_e4m3fn:
        stored = FP8_NATIVE if tiles.converts_fp8(text.device) else FP8_BITS
        values = values.view(torch.uint8)
    strides = text.stride(0), text.stride(1), values.stride(0), values.stride(-3), values.stride(-2)
    unit = tiles.common_unit(width, *strides)
    run = tiles.images_per_program(text.device, slots.groups, n_images, scoring.LARGEST_GRID)
    maxsim_quantized_kernel[(slots.groups, triton.cdiv(n_images, run))](
        text, values, scales, tuple(plan.text), tuple(plan.image), plan.order, plan.bounds,
        *outputs[:2], n_texts, n_images, n_bags, n_patches, width // unit, run,
        *(stride // unit for stride in strides),
        UNIT=unit, BLOCK_P=tile.block_p, BLOCK_N=slots.columns, SLOT=slots.slots,
        SHAPE=(tile.head, tile.tail, tile.step, tile.covers(width), options.precision),
        FORMAT=stored, RANKS=slots.ranks, TEXT_MASK=plan.text is not NOTHING,
        IMAGE_MASK=plan.image is not NOTHING, ZERO=options.zero, MEAN=options.mean,
        CANDIDATES=values.dim() == 4, WANTS_TEXT=outputs.text_to_image.numel() > 0,
        WANTS_IMAGE=outputs.image_to_text.numel() > 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
