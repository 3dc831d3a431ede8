"""Whose rows a tile of the backward has: bags and patches, their features, where their sums go."""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl


@triton.jit
def bags_of(
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
    place = tl.maximum(tl.minimum(place, end - 1), 0)
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
def patches_of(position, item, plan, length, n_patches, MASKED: tl.constexpr):
    """Patch at each position, the last one past the end, and whether it is there.

    An image of no patches has patch 0, which is not there.
    """
    patch = tl.maximum(tl.minimum(position, length - 1), 0)
    if MASKED:
        patch = tl.load(plan[0] + item * n_patches + patch)
    return patch, position < length


@triton.jit
def load_features(base, rows, keep, width, first, SPAN: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, SPAN] features; zeros where a row does not count, so that it is never read."""
    col = first + tl.arange(0, SPAN)
    inside = keep[:, None]
    if not WHOLE:
        inside = inside & (col < width)[None, :]
    return tl.load(base + (rows[:, None] + col[None, :]), mask=inside, other=0.0)


@triton.jit
def _store(
    rows, keep, total, unscale, first, width,
    ROWS: tl.constexpr, SPAN: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    col = first + tl.arange(0, SPAN)
    out = rows[:, None] + col[None, :]
    inside = keep[:, None] & (col < width)[None, :]
    value = total * unscale
    if ADD:
        value += tl.load(out, mask=inside, other=0.0)
    tl.store(out, value, mask=inside)


@triton.jit
def _halves(total, ROWS: tl.constexpr, HALF: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(total, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def _store_halves(
    rows, keep, total, unscale, first, width,
    ROWS: tl.constexpr, SPAN: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = SPAN // 2
    halves = _halves(total, ROWS, HALF)
    for half in tl.static_range(2):
        _store(rows, keep, halves[half], unscale, first + half * HALF, width, ROWS, HALF, ADD)


@triton.jit
def _store_quarters(
    rows, keep, total, unscale, first, width,
    ROWS: tl.constexpr, SPAN: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = SPAN // 2
    halves = _halves(total, ROWS, HALF)
    for half in tl.static_range(2):
        at = first + half * HALF
        _store_halves(rows, keep, halves[half], unscale, at, width, ROWS, HALF, ADD)


@triton.jit
def store_sums(
    rows, keep, total, unscale, span, width,
    ROWS: tl.constexpr, SPAN: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Write [ROWS, SPAN] sums, a part of the columns at a time: all need too many registers."""
    if SPAN > 128:
        HALF: tl.constexpr = SPAN // 2
        halves = _halves(total, ROWS, HALF)
        for half in tl.static_range(2):
            at = span + half * HALF
            _store_quarters(rows, keep, halves[half], unscale, at, width, ROWS, HALF, ADD)
    else:
        _store_quarters(rows, keep, total, unscale, span, width, ROWS, SPAN, ADD)


@triton.jit
def store_zeros(rows, empty, span, width, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """Write zeros into the rows of tokens that do not count."""
    col = span + tl.arange(0, SPAN)
    out = rows[:, None] + col[None, :]
    tl.store(out, tl.zeros((ROWS, SPAN), tl.float32), mask=empty[:, None] & (col < width)[None, :])
