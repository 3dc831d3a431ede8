"""What a scoring kernel must know of masks, worked out on the device without a synchronisation.

``compact`` turns a mask into a list of the tokens that count. Kernels then read only those rows, so
a masked token is never touched, and repeat the last one to fill a tile: a repeated row changes no
maximum, which is why no inner loop needs an elementwise mask. ``bucket`` sorts texts by the slot of
columns that they need.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BUCKET_BLOCK = 1024


class Tokens(NamedTuple):
    """One side's tokens. ``None`` everywhere: every token counts.

    ``rows [n, L]`` int32: the tokens that count in rising order, the last one repeated (0 if there
    is none). ``counts [n]`` int32. ``holes [n]`` int32: the first masked token, ``L`` if there is
    none.
    """

    rows: Tensor | None = None
    counts: Tensor | None = None
    holes: Tensor | None = None


NOTHING = Tokens()


@triton.jit(do_not_specialize=["length"])
def compact_kernel(mask, rows, counts, holes, length, SPAN: tl.constexpr):
    """A program owns one text or one image."""
    _compact(mask, rows, counts, holes, length, tl.program_id(0).to(tl.int64), SPAN)


@triton.jit(do_not_specialize=["n_texts", "n_bags", "n_patches"])
def compact_both_kernel(
    text_mask, text_plan, image_mask, image_plan, n_texts, n_bags, n_patches,
    BAG_SPAN: tl.constexpr, PATCH_SPAN: tl.constexpr
):  # fmt: skip
    """A program owns one text or, after them, one image."""
    item = tl.program_id(0).to(tl.int64)
    if item < n_texts:
        rows, counts, holes = text_plan
        _compact(text_mask, rows, counts, holes, n_bags, item, BAG_SPAN)
    else:
        rows, counts, holes = image_plan
        _compact(image_mask, rows, counts, holes, n_patches, item - n_texts, PATCH_SPAN)


@triton.jit
def _compact(mask, rows, counts, holes, length, item, SPAN: tl.constexpr):
    token = tl.arange(0, SPAN)
    inside = token < length
    keep = tl.load(mask + item * length + token, mask=inside, other=0) != 0
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    count = tl.sum(keep.to(tl.int32), 0)
    last = tl.maximum(tl.max(tl.where(keep, token, -1), 0), 0)
    tl.store(rows + item * length + place, token, mask=keep)
    tl.store(rows + item * length + token, last, mask=inside & (token >= count))
    tl.store(counts + item, count)
    tl.store(holes + item, tl.min(tl.where(inside & (keep == 0), token, length), 0))


@triton.jit(do_not_specialize=["n_texts"])
def bucket_kernel(counts, order, bounds, n_texts, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns the whole list: texts in order of their slot class, equal ones as they came.

    Class ``c`` holds texts of at most ``8 * 2**c`` counting bags, the last class the rest.
    """
    written = 0
    for rank in tl.static_range(CLASSES):
        tl.store(bounds + rank * 4, written)
        for first in range(0, n_texts, BLOCK):
            text = first + tl.arange(0, BLOCK)
            count = tl.load(counts + text, mask=text < n_texts, other=0)
            mine = text < n_texts
            if rank > 0:
                mine = mine & (count > (4 << rank))
            if rank < CLASSES - 1:
                mine = mine & (count <= (8 << rank))
            place = tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order + written + place, text, mask=mine)
            written += tl.sum(mine.to(tl.int32), 0)
        tl.store(bounds + rank * 4 + 1, written)


def compact(mask: Tensor | None) -> Tokens:
    """Plan of ``mask [..., L]`` bool, its leading axes flattened."""
    if mask is None:
        return NOTHING
    mask = mask.contiguous()
    plan = _unwritten(mask)
    length = mask.shape[-1]
    compact_kernel[(_items(mask),)](
        mask, *plan, length, SPAN=triton.next_power_of_2(length), num_warps=1
    )
    return plan


def compact_both(text_mask: Tensor | None, image_mask: Tensor | None) -> tuple[Tokens, Tokens]:
    """Plans of both sides, in one launch."""
    if text_mask is None or image_mask is None:
        return compact(text_mask), compact(image_mask)
    text_mask, image_mask = text_mask.contiguous(), image_mask.contiguous()
    plans = _unwritten(text_mask), _unwritten(image_mask)
    n_texts, n_images = _items(text_mask), _items(image_mask)
    lengths = text_mask.shape[-1], image_mask.shape[-1]
    spans = (triton.next_power_of_2(length) for length in lengths)
    compact_both_kernel[(n_texts + n_images,)](
        text_mask, tuple(plans[0]), image_mask, tuple(plans[1]), n_texts, *lengths,
        **dict(zip(("BAG_SPAN", "PATCH_SPAN"), spans, strict=True)), num_warps=1,
    )  # fmt: skip
    return plans


def _items(mask: Tensor) -> int:
    return mask.numel() // max(mask.shape[-1], 1)


def _unwritten(mask: Tensor) -> Tokens:
    items, length = _items(mask), mask.shape[-1]
    rows = torch.empty(items, length, dtype=torch.int32, device=mask.device)
    # both 16-byte aligned: kernels are compiled anew for pointers that are not
    both = torch.empty(2, items + -items % 4, dtype=torch.int32, device=mask.device)
    return Tokens(rows, both[0, :items], both[1, :items])


def bucket(counts: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """``order [n]`` and ``bounds [classes, 4]``, int32: class ``c`` is ``order[start:end]``.

    ``start, end`` are the first two of ``bounds[c]``; four to a row keep each row 16-byte aligned,
    so that a kernel that takes a row is compiled once.
    """
    order = torch.empty_like(counts)
    bounds = torch.empty(classes, 4, dtype=torch.int32, device=counts.device)
    bucket_kernel[(1,)](
        counts, order, bounds, counts.shape[0], CLASSES=classes, BLOCK=BUCKET_BLOCK, num_warps=4
    )
    return order, bounds
