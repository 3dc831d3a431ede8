"""What a scoring kernel must know of masks, worked out on the device without a synchronisation.

One launch turns the masks of a call into lists of the tokens that count, sorts the texts by the
slot of columns that they need, and writes "none" where a masked token's winner would stand.
Kernels read only the rows that count, so a masked token is never touched, and repeat the last of
them to fill a tile: a repeated row changes no maximum, which is why no inner loop needs an
elementwise mask.

All of it lies in one tensor, so that the forward can leave it for the backward.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CLASSES = 8
SORTED_TOKENS = 4096  # that a sorting program looks at in a round
FILLED = tl.constexpr(32768)  # indices that a filling program writes
FILLED_AT_ONCE = tl.constexpr(4096)


class Tokens(NamedTuple):
    """One side's tokens. ``None`` everywhere: every token counts.

    ``rows [n * L]`` int32: for each item the tokens that count in rising order, then the others.
    ``counts [n]`` int32. ``holes [n]`` int32: the first masked token, ``L`` if there is none.
    """

    rows: Tensor | None = None
    counts: Tensor | None = None
    holes: Tensor | None = None


NOTHING = Tokens()


class Plan(NamedTuple):
    """Both sides' tokens and, where texts are sorted, their order.

    Class ``c`` of slots is ``order[start:end]``, texts of at most ``8 * 2**c`` counting bags, the
    last class the rest, equal ones as they came; ``start, end`` are ``bounds[4 * c : 4 * c + 2]``.
    """

    text: Tokens = NOTHING
    image: Tokens = NOTHING
    order: Tensor | None = None
    bounds: Tensor | None = None


@triton.jit
def _compact(mask, plan, length, item, SPAN: tl.constexpr):
    """A program owns one text or one image."""
    rows, counts, holes = plan
    token = tl.arange(0, SPAN)
    inside = token < length
    keep = tl.load(mask + item * length + token, mask=inside, other=0) != 0
    before = tl.cumsum(keep.to(tl.int32), 0)
    count = tl.sum(keep.to(tl.int32), 0)
    place = tl.where(keep, before - 1, count + token - before)
    tl.store(rows + item * length + place, token, mask=inside)
    tl.store(counts + item, count)
    tl.store(holes + item, tl.min(tl.where(inside & (keep == 0), token, length), 0))


@triton.jit
def _classes(mask, first, n_texts, n_bags, BLOCK: tl.constexpr, SPAN: tl.constexpr,
             CLASSES: tl.constexpr, ROOM: tl.constexpr):  # fmt: skip
    """[BLOCK, ROOM]: 1 where a text is in a class."""
    text, bag = first + tl.arange(0, BLOCK), tl.arange(0, SPAN)
    inside = (text < n_texts)[:, None] & (bag < n_bags)[None, :]
    at = mask + text.to(tl.int64)[:, None] * n_bags + bag[None, :]
    count = tl.sum((tl.load(at, mask=inside, other=0) != 0).to(tl.int32), 1)
    rank = tl.zeros((BLOCK,), tl.int32)
    for bound in tl.static_range(CLASSES - 1):
        rank += (count > (8 << bound)).to(tl.int32)
    found = (rank[:, None] == tl.arange(0, ROOM)[None, :]) & (text < n_texts)[:, None]
    return found.to(tl.int32)


@triton.jit
def _sort(
    mask, order, bounds, program, n_texts, n_bags,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, CLASSES: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    """A program owns the places of BLOCK texts, and counts all texts to know where they begin."""
    own = program * BLOCK
    total, before = tl.zeros((ROOM,), tl.int32), tl.zeros((ROOM,), tl.int32)
    for first in range(0, n_texts, BLOCK):
        here = tl.sum(_classes(mask, first, n_texts, n_bags, BLOCK, SPAN, CLASSES, ROOM), 0)
        total += here
        before += tl.where(first < own, here, 0)
    start = tl.cumsum(total, 0) - total
    mine = _classes(mask, own, n_texts, n_bags, BLOCK, SPAN, CLASSES, ROOM)
    place = tl.cumsum(mine, 0) - 1 + (start + before)[None, :]
    place = tl.sum(tl.where(mine > 0, place, 0), 1)
    text = own + tl.arange(0, BLOCK)
    tl.store(order + place, text, mask=text < n_texts)
    rank = tl.arange(0, ROOM)
    used = (rank < CLASSES) & (program == 0)
    tl.store(bounds + rank * 4, start, mask=used)
    tl.store(bounds + rank * 4 + 1, start + total, mask=used)


@triton.jit
def _fill_none(index, total, program):
    """A masked token's own index is none: -1, or 255 where that does not fit."""
    first = program.to(tl.int64) * FILLED
    none = tl.full((FILLED_AT_ONCE,), -1, tl.int32).to(index.dtype.element_ty)
    for part in range(0, FILLED, FILLED_AT_ONCE):
        place = first + part + tl.arange(0, FILLED_AT_ONCE)
        if first + FILLED <= total:
            tl.store(index + place, none)
        else:
            tl.store(index + place, none, mask=place < total)


@triton.jit(
    do_not_specialize=["n_texts", "n_bags", "n_images", "n_patches", "text_total", "image_total"]
)
def plan_kernel(
    text_mask, image_mask, text_plan, image_plan, order, bounds, text_index, image_index,
    n_texts, n_bags, n_images, n_patches, text_total, image_total,
    BAG_SPAN: tl.constexpr, PATCH_SPAN: tl.constexpr, CLASSES: tl.constexpr, ROOM: tl.constexpr,
    BLOCK: tl.constexpr, FILL_TEXT: tl.constexpr, FILL_IMAGE: tl.constexpr
):  # fmt: skip
    """Programs sort texts, then list the tokens of texts, then of images, then fill indices.

    A side without a mask has a SPAN of 0; without CLASSES nothing is sorted.
    """
    program = tl.program_id(0)
    if CLASSES > 0:
        sorters = tl.cdiv(n_texts, BLOCK)
        if program < sorters:
            _sort(
                text_mask, order, bounds, program, n_texts, n_bags,
                BLOCK, BAG_SPAN, CLASSES, ROOM)  # fmt: skip
        program -= sorters
    if BAG_SPAN > 0:
        if (program >= 0) & (program < n_texts):
            _compact(text_mask, text_plan, n_bags, program.to(tl.int64), BAG_SPAN)
        program -= n_texts
    if PATCH_SPAN > 0:
        if (program >= 0) & (program < n_images):
            _compact(image_mask, image_plan, n_patches, program.to(tl.int64), PATCH_SPAN)
        program -= n_images
    if FILL_TEXT:
        fillers = tl.cdiv(tl.cast(text_total, tl.int64), FILLED).to(tl.int32)
        if (program >= 0) & (program < fillers):
            _fill_none(text_index, text_total, program)
        program -= fillers
    if FILL_IMAGE:
        fillers = tl.cdiv(tl.cast(image_total, tl.int64), FILLED).to(tl.int32)
        if (program >= 0) & (program < fillers):
            _fill_none(image_index, image_total, program)


def _up(count: Any) -> Any:
    """Kernels are compiled anew for pointers that are not 16-byte aligned."""
    return count + -count % 4


def _sections(lead: Any, length: Any, sorts: bool) -> list[Any]:
    made = [_up(lead * length), _up(lead), _up(lead)]
    return [*made, _up(lead), 4 * MOST_CLASSES] if sorts else made


def _items(shape: Sequence[Any]) -> Any:
    """Items of features ``[..., L, D]``."""
    return shape[0] if len(shape) == 3 else shape[0] * shape[1]


def size(text: Tensor, image: Tensor, masked: tuple[bool, bool]) -> Any:
    """Elements of the tensor that holds a plan for these features; shapes may be symbols."""
    shapes = text.shape, image.shape
    return sum(
        sum(_sections(_items(shape), shape[-2], side == 0))
        for side, shape in enumerate(shapes)
        if masked[side]
    )


def read(held: Tensor, text: Tensor, image: Tensor, masked: tuple[bool, bool], sorts: bool) -> Plan:
    """The parts of a plan that lie in ``held``."""
    sections = []
    for side, shape in enumerate((text.shape, image.shape)):
        if masked[side]:
            sections += _sections(_items(shape), shape[-2], side == 0)
    parts = list(held.split_with_sizes(sections))
    words, order, bounds = NOTHING, None, None
    if masked[0]:
        words, (order, bounds), parts = Tokens(*parts[:3]), parts[3:5], parts[5:]
    pictures = Tokens(*parts) if parts else NOTHING
    return Plan(words, pictures, order, bounds) if sorts else Plan(words, pictures)


def make(
    text: Tensor,
    image: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    classes: int = 0,
    indices: tuple[Tensor | None, Tensor | None] = (None, None),
    held: Tensor | None = None,
) -> Plan:
    """The plan of ``masks``, in one launch, or in none without masks.

    ``classes``: into how many slot classes texts are sorted, 0 for not at all. ``indices``: the
    winners of each side's tokens, which are filled with "none" where that side has a mask.
    ``held``: int32 of ``size``, where to put it.
    """
    masked = masks[0] is not None, masks[1] is not None
    if not any(masked):
        return Plan()
    if held is None:
        held = torch.empty(size(text, image, masked), dtype=torch.int32, device=text.device)
    plan = read(held, text, image, masked, classes > 0)
    whole = tuple(None if mask is None else mask.contiguous() for mask in masks)
    filled = [
        index if mask is not None and index is not None and index.numel() else None
        for index, mask in zip(indices, masks, strict=True)
    ]
    totals = [0 if index is None else index.numel() for index in filled]
    items, lengths = (_items(text.shape), _items(image.shape)), (text.shape[1], image.shape[-2])
    spans = [
        triton.next_power_of_2(length) if has else 0
        for length, has in zip(lengths, masked, strict=True)
    ]
    block = max(16, SORTED_TOKENS // max(spans[0], 1))
    programs = triton.cdiv(items[0], block) if classes else 0
    programs += sum(count for count, has in zip(items, masked, strict=True) if has)
    programs += sum(triton.cdiv(total, FILLED.value) for total in totals)
    plan_kernel[(programs,)](
        *whole, tuple(plan.text), tuple(plan.image), plan.order, plan.bounds, *filled,
        items[0], lengths[0], items[1], lengths[1], *totals,
        BAG_SPAN=spans[0], PATCH_SPAN=spans[1], CLASSES=classes, ROOM=MOST_CLASSES, BLOCK=block,
        FILL_TEXT=filled[0] is not None, FILL_IMAGE=filled[1] is not None, num_warps=4,
    )  # fmt: skip
    return plan
