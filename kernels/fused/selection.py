"""Builds, in registers, the tile that says which bag and which patch chose one another.

``chosen`` holds, for each bag and patch of a tile, the gradient of the bag's choice where it chose
that patch, plus that of the patch's choice where it chose that bag. For 16-bit features two
neighbours share a 32-bit word from the comparison to the sum: half the instructions, which is what
keeps the matrix units fed. ``i`` is an image's place among those of a text, ``sizes`` are the
numbers of texts, images, bags, patches and features, and ``winners`` the two score gradients and
the two tables of indices.
"""
# ruff: noqa: N803, N806 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl


@triton.jit
def _pair(i, text, n_texts, n_images, CANDIDATES: tl.constexpr):
    """Where the pairs of image i lie in the image's direction, as a scalar and a vector part."""
    base, place = tl.cast(i, tl.int64), text * n_images
    if not CANDIDATES:
        base, place = base * n_texts, text
    return base, place


@triton.jit
def slopes_of_bags(
    winners, text, keep, count, i, scale, sizes, MEAN: tl.constexpr, TO_IMAGE: tl.constexpr
):  # fmt: skip
    """For each text the gradient of a choice that one of its bags makes in image i."""
    slope = tl.zeros_like(scale + text.to(tl.float32))
    if TO_IMAGE:
        place = tl.cast(i, tl.int64) + text * sizes[1]
        slope = tl.load(winners[0] + place, mask=keep, other=0.0) * scale
        if MEAN:
            slope = slope / tl.maximum(count, 1)
    return slope


@triton.jit
def slopes_of_patches(
    winners, text, keep, length, i, scale, sizes,
    MEAN: tl.constexpr, CANDIDATES: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    """For each text the gradient of a choice that a patch of image i makes in it."""
    slope = tl.zeros_like(scale + text.to(tl.float32))
    if TO_TEXT:
        base, place = _pair(i, text, sizes[0], sizes[1], CANDIDATES)
        slope = tl.load(winners[1] + base + place, mask=keep, other=0.0) * scale
        if MEAN:
            slope = slope / tl.maximum(length, 1)
    return slope


@triton.jit
def chosen_patches(winners, text, bag, i, sizes, TO_IMAGE: tl.constexpr):
    """The patch of image i that each bag chose."""
    choice = tl.zeros_like(bag)
    if TO_IMAGE:
        place = tl.cast(i, tl.int64) * sizes[2] + (text * sizes[1] * sizes[2] + bag)
        choice = tl.load(winners[2] + place).to(tl.int32)
    return choice


@triton.jit
def chosen_bags(
    winners, text, i, patch, sizes,
    AXIS: tl.constexpr, CANDIDATES: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    """The bag that each patch of image i chose, texts along AXIS and patches along the other."""
    base, text = _pair(i, text, sizes[0], sizes[1], CANDIDATES)
    if AXIS == 0:
        place = text[:, None] * sizes[3] + patch[None, :]
    else:
        place = text[None, :] * sizes[3] + patch[:, None]
    won = tl.zeros_like(place)
    if TO_TEXT:
        won = tl.load(winners[3] + base * sizes[3] + place)
    return won


@triton.jit
def chosen_by_rows(
    dtype: tl.constexpr, winners, owner, bag, group, keep, count, first, turn, patch, sizes,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, MEAN: tl.constexpr,
    TO_IMAGE: tl.constexpr, TO_TEXT: tl.constexpr
):  # fmt: skip
    """``chosen`` [BLOCK_P, BLOCK_N] where each row has an image of its own, ``first`` + ``turn``.

    Owner and bag are of the columns; group, keep and count of the texts. Offsets from what the
    first image has are 32-bit: 64-bit ones fill the registers.
    """
    GROUP: tl.constexpr = BLOCK_N // SLOT
    n_texts, n_images, n_bags, n_patches, _ = sizes
    chosen = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if TO_IMAGE:
        place = turn[:, None] * n_bags + (owner * n_images * n_bags + bag)[None, :]
        choice = tl.load(winners[2] + first * n_bags + place).to(tl.int32)
        place = turn[:, None] + (group * n_images)[None, :]
        slope = tl.load(winners[0] + first + place, mask=keep[None, :], other=0.0)
        if MEAN:
            slope *= (1.0 / tl.maximum(count, 1))[None, :]
        slope = _to_columns(slope, BLOCK_P, GROUP, SLOT)
        chosen = tl.where(choice == patch[:, None], slope, 0.0)
    if TO_TEXT:
        pair = turn[:, None] * n_texts + group[None, :]
        base = first * n_texts
        won = tl.load(winners[3] + base * n_patches + (pair * n_patches + patch[:, None]))
        back = tl.load(winners[1] + base + pair, mask=keep[None, :], other=0.0)
        if MEAN:
            back *= 1.0 / n_patches
        won = _to_columns(won.to(tl.int32), BLOCK_P, GROUP, SLOT)
        back = _to_columns(back, BLOCK_P, GROUP, SLOT)
        chosen += tl.where(won == bag[None, :], back, 0.0)
    return chosen.to(dtype)


@triton.jit
def _pattern(value, dtype: tl.constexpr):
    """``value`` rounded to a 16-bit dtype, its bits in the low half of a word."""
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _packed(index, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """[ROWS, PAIRS] words of two neighbours each; the index of none becomes one that nobody has."""
    left, right = tl.split(tl.reshape(index.to(tl.uint32) & 0x7FFF, [ROWS, PAIRS, 2]))
    return left | (right << 16)


@triton.jit
def _evens(value, PAIRS: tl.constexpr):
    """[1, PAIRS]: of each two neighbours the first."""
    left, _ = tl.split(tl.reshape(value, [1, PAIRS, 2]))
    return left


@triton.jit
def _twice(index):
    """The same index in both halves of a word."""
    return (index.to(tl.uint32) & 0x7FFF) * 0x00010001


@triton.jit
def _where_equal(left, right, weight):
    """``weight``, 16 bits, in each half of a word in which both have the same 15-bit number."""
    differs = (left ^ right) + 0x7FFF7FFF
    return (((differs >> 15) & 0x00010001) ^ 0x00010001) * weight


@triton.jit
def _sum_of(one, other, dtype: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Sum of two tiles of packed pairs: [ROWS, 2 * PAIRS] numbers."""
    left = (one & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    left += (other & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    right = (one >> 16).to(tl.uint16).to(dtype, bitcast=True)
    right += (other >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(left, right), [ROWS, 2 * PAIRS])


@triton.jit
def _to_rows(value, GROUP: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr):
    """[GROUP, WIDTH], a row for each text, repeated for the SLOT bags of each."""
    value = tl.broadcast_to(value[:, None, :], [GROUP, SLOT, WIDTH])
    return tl.reshape(value, [GROUP * SLOT, WIDTH])


@triton.jit
def _to_columns(value, ROWS: tl.constexpr, GROUP: tl.constexpr, SLOT: tl.constexpr):
    """[ROWS, GROUP], a column for each text, repeated SLOT times each."""
    value = tl.broadcast_to(value[:, :, None], [ROWS, GROUP, SLOT])
    return tl.reshape(value, [ROWS, GROUP * SLOT])


@triton.jit
def _pairs_by_text(
    dtype: tl.constexpr, start, patch, bag, slope, choice, back, won,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, TO_IMAGE: tl.constexpr,
    TO_TEXT: tl.constexpr, ADJACENT: tl.constexpr
):  # fmt: skip
    """``chosen_by_text`` for 16-bit features and 15-bit indices, two patches to a word."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    PAIRS: tl.constexpr = BLOCK_P // 2
    one = tl.zeros((BLOCK_N, PAIRS), tl.uint32)
    other = one
    if TO_IMAGE and ADJACENT:
        place = choice - start
        weight = _pattern(slope, dtype) << ((place & 1) * 16).to(tl.uint32)
        match = (place >> 1)[:, None] == tl.arange(0, PAIRS)[None, :]
        one = tl.where(match, weight[:, None], one)
    elif TO_IMAGE:
        weight, pairs = _pattern(slope, dtype)[:, None], _packed(patch, 1, PAIRS)
        one = _where_equal(_twice(choice)[:, None], pairs, weight)
    if TO_TEXT:
        won = _to_rows(_packed(won, GROUP, PAIRS), GROUP, SLOT, PAIRS)
        other = _where_equal(won, _twice(bag)[:, None], _pattern(back, dtype)[:, None])
    return _sum_of(one, other, dtype, BLOCK_N, PAIRS)


@triton.jit
def _pairs_by_image(
    dtype: tl.constexpr, patch, bag, slope, choice, back, won,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, TO_IMAGE: tl.constexpr,
    TO_TEXT: tl.constexpr, ADJACENT: tl.constexpr
):  # fmt: skip
    """``chosen_by_image`` for 16-bit features and 15-bit indices, two bags to a word."""
    GROUP: tl.constexpr = BLOCK_N // SLOT
    PAIRS: tl.constexpr = BLOCK_N // 2
    one = tl.zeros((BLOCK_P, PAIRS), tl.uint32)
    other = one
    if TO_IMAGE:
        weight = _to_columns(_pattern(slope, dtype)[None, :], 1, GROUP, SLOT // 2)
        pairs = _packed(choice, 1, PAIRS)
        one = _where_equal(_twice(patch)[:, None], pairs, weight)
    weight = _pattern(back, dtype)[None, :]
    if TO_TEXT and ADJACENT:
        won = won.to(tl.int32)
        weight = _to_columns(weight << ((won & 1) * 16).to(tl.uint32), BLOCK_P, GROUP, SLOT // 2)
        match = _to_columns(won >> 1, BLOCK_P, GROUP, SLOT // 2) == _evens(bag >> 1, PAIRS)
        other = tl.where(match, weight, other)
    elif TO_TEXT:
        won = _to_columns(_twice(won), BLOCK_P, GROUP, SLOT // 2)
        weight = _to_columns(weight, 1, GROUP, SLOT // 2)
        other = _where_equal(won, _packed(bag, 1, PAIRS), weight)
    return _sum_of(one, other, dtype, BLOCK_P, PAIRS)


@triton.jit
def chosen_by_text(
    dtype: tl.constexpr, start, patch, bag, slope, choice, back, won,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, TO_IMAGE: tl.constexpr,
    TO_TEXT: tl.constexpr, PACKED: tl.constexpr, ADJACENT: tl.constexpr
):  # fmt: skip
    """``chosen`` [BLOCK_N, BLOCK_P]: bags by patches.

    For each bag: its number, the ``slope`` of its ``choice``, and that of being chosen, ``back``.
    ``won`` [GROUP, BLOCK_P] is what patches chose. ADJACENT: ``patch`` is ``start``, start + 1 ...
    """
    if PACKED:
        chosen = _pairs_by_text(
            dtype, start, patch, bag, slope, choice, back, won, BLOCK_P, BLOCK_N, SLOT,
            TO_IMAGE, TO_TEXT, ADJACENT)  # fmt: skip
    else:
        chosen = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        if TO_IMAGE:
            chosen = tl.where(choice[:, None] == patch[None, :], slope[:, None], 0.0)
        if TO_TEXT:
            won = _to_rows(won.to(tl.int32), BLOCK_N // SLOT, SLOT, BLOCK_P)
            chosen += tl.where(won == bag[:, None], back[:, None], 0.0)
        chosen = chosen.to(dtype)
    return chosen


@triton.jit
def chosen_by_image(
    dtype: tl.constexpr, patch, bag, slope, choice, back, won,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLOT: tl.constexpr, TO_IMAGE: tl.constexpr,
    TO_TEXT: tl.constexpr, PACKED: tl.constexpr, ADJACENT: tl.constexpr
):  # fmt: skip
    """``chosen`` [BLOCK_P, BLOCK_N]: patches by bags.

    ``slope`` and ``back`` are given for each text. ``won`` [BLOCK_P, GROUP] is what patches chose.
    ADJACENT: the bags of a slot are 0, 1, 2 ... or go on from an even number.
    """
    if PACKED:
        chosen = _pairs_by_image(
            dtype, patch, bag, slope, choice, back, won, BLOCK_P, BLOCK_N, SLOT,
            TO_IMAGE, TO_TEXT, ADJACENT)  # fmt: skip
    else:
        GROUP: tl.constexpr = BLOCK_N // SLOT
        chosen = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        if TO_IMAGE:
            slope = _to_columns(slope[None, :], 1, GROUP, SLOT)
            chosen = tl.where(choice[None, :] == patch[:, None], slope, 0.0)
        if TO_TEXT:
            won = _to_columns(won.to(tl.int32), BLOCK_P, GROUP, SLOT)
            back = _to_columns(back[None, :], 1, GROUP, SLOT)
            chosen += tl.where(won == bag[None, :], back, 0.0)
        chosen = chosen.to(dtype)
    return chosen
