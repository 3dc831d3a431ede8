"""Maxima and sums of one tile of similarities, in registers: what the scoring kernels reduce with.

Patches are a tile's rows and bags its columns, SLOT columns a text. Rows r and r + 8 lie in one
thread, so they are folded first, elementwise.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl
from bagformer.kernels.primitives import nan_max, reduce_max

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def best_bags(
    tile, count,
    BLOCK_P: tl.constexpr, GROUP: tl.constexpr, SLOT: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """Maximum over each slot's bags [BLOCK_P, GROUP], and the slot's column that reached it."""
    cube = tl.reshape(tile, (BLOCK_P, GROUP, SLOT))
    best = reduce_max(cube, 2)
    pick = tl.zeros((BLOCK_P, GROUP), tl.int32)
    if ARGMAX:
        col = tl.arange(0, SLOT)[None, None, :]
        pick = tl.min(tl.where(cube == best[:, :, None], col, NOWHERE), 2)
        pick = tl.minimum(pick, tl.maximum(count - 1, 0)[None, :])
    return best, pick


@triton.jit
def fold_sums(best, keep, BLOCK_P: tl.constexpr, GROUP: tl.constexpr):
    """Sums of rows r and r + 8 that count [BLOCK_P / 16, 8, GROUP]."""
    best = tl.where(keep[:, None], best, 0.0)
    return tl.sum(tl.reshape(best, (BLOCK_P // 16, 2, 8, GROUP)), 1)


@triton.jit
def best_patches(
    tile, run, place, first,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """Fold rows r and r + 8 of the tile into the running maximum [BLOCK_P / 16, 8, BLOCK_N]."""
    pairs = tl.reshape(tile, (BLOCK_P // 16, 2, 8, BLOCK_N))
    if ARGMAX:
        upper, lower = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
        place = tl.where(upper > run, first, place)
        run = nan_max(run, upper)
        place = tl.where(lower > run, first + 8, place)
        run = nan_max(run, lower)
    else:
        run = nan_max(run, reduce_max(pairs, 1))
    return run, place


@triton.jit
def flush_patches(
    run, place, length, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ARGMAX: tl.constexpr
):
    """Reduce the running maximum across rows: [BLOCK_N] maxima, and the patch position of each."""
    rows = tl.reshape(run, (BLOCK_P // 2, BLOCK_N))
    best = reduce_max(rows, 0)
    pick = tl.zeros((BLOCK_N,), tl.int32)
    if ARGMAX:
        group = tl.arange(0, BLOCK_P // 16)[:, None, None] * 16
        place = place + (group + tl.arange(0, 8)[None, :, None])
        place = tl.reshape(place, (BLOCK_P // 2, BLOCK_N))
        pick = tl.min(tl.where(rows == best[None, :], place, NOWHERE), 0)
        pick = tl.minimum(pick, length - 1)
    return best, pick


@triton.jit
def with_hole(pick, best, hole, has_hole):
    """The winner's index where a masked token, ``hole`` the first, competes with similarity 0."""
    tied = tl.where(best == 0.0, tl.minimum(pick, hole), pick)
    return tl.where(has_hole, tl.where(best < 0.0, hole, tied), pick)


@triton.jit
def sum_over_bags(
    best, keep, count, length, n_patches,
    GROUP: tl.constexpr, SLOT: tl.constexpr, ZERO: tl.constexpr, MEAN: tl.constexpr
):  # fmt: skip
    """Each text's sum of its bags' maxima [GROUP]."""
    if ZERO:
        best = nan_max(best, tl.where(length < n_patches, 0.0, float("-inf")))
    best = tl.where(keep & (length > 0), best, 0.0)
    total = tl.sum(tl.reshape(best, (GROUP, SLOT)), 1)
    if MEAN:
        total = total / tl.maximum(count, 1)
    return total
