"""The best k of each row of scores, a stripe of the collection at a time.

Scores of a stripe are computed, merged on the device into k running keys for each row, and
overwritten: no matrix of all scores exists. A key is one int64, the score's bits in an order-
keeping form above the complement of the index, so that comparing keys ranks by score and then by
the lower index, and a merge gives the same answer however the collection is cut.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

import torch
import triton
import triton.language as tl
from bagformer.kernels.scoring import maxsim_forward
from torch import Tensor

STRIPE_SCORES = 1 << 24  # scores held at a time: 64 MB
SMALLEST_STRIPE = 64
LONGEST_INDEX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys(score, index):
    """NaN ranks above every number, and the two zeros are equal, as in a stable torch.sort."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score == 0.0, 0, tl.where(bits < 0, bits ^ LONGEST_INDEX, bits))
    bits = tl.where(score != score, LONGEST_INDEX, bits)
    return (bits.to(tl.int64) << 32) | (index ^ LONGEST_INDEX).to(tl.int64)


@triton.jit(do_not_specialize=["width", "first", "k"])
def merge_kernel(scores, best, width, first, k, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """A program owns one row: replace its worst key while the stripe holds a better one.

    The stripe that starts at 0 finds keys that are distinct and below every real one, so that each
    is replaced once.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SPAN)
    lowest = tl.full((1,), 1, tl.int64) << 63
    kept = lowest + place
    if first > 0:
        kept = tl.load(best + row * SPAN + place)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < width
        key = _keys(tl.load(scores + row * width + col, mask=inside, other=0.0), first + col)
        key = tl.where(inside, key, lowest)
        worst = tl.min(tl.where(place < k, kept, ~lowest), 0)
        top = tl.max(key, 0)
        while top > worst:
            kept = tl.where(kept == worst, top, kept)
            key = tl.where(key == top, lowest, key)
            worst = tl.min(tl.where(place < k, kept, ~lowest), 0)
            top = tl.max(key, 0)
    tl.store(best + row * SPAN + place, kept)


@triton.jit(do_not_specialize=["k"])
def unpack_kernel(best, scores, indices, k, SPAN: tl.constexpr):
    """A program owns one row: its keys from the best down, as scores and indices."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SPAN)
    lowest = tl.full((1,), 1, tl.int64) << 63
    key = tl.where(place < k, tl.load(best + row * SPAN + place), lowest)
    for rank in range(k):
        top = tl.max(key, 0)
        bits = (top >> 32).to(tl.int32)
        bits = tl.where(bits < 0, bits ^ LONGEST_INDEX, bits)
        tl.store(scores + row * k + rank, bits.to(tl.float32, bitcast=True))
        tl.store(indices + row * k + rank, (top & LONGEST_INDEX) ^ LONGEST_INDEX)
        key = tl.where(key == top, lowest, key)


def maxsim_topk(
    text: Tensor,
    image: Tensor,
    k: int,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    to_image: bool = True,
    mean: bool = False,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Scores falling and int64 indices, ``[rows, min(k, columns)]``, ties by the lower index.

    ``to_image``: rows are texts ``[Nt, N, D]`` and columns images ``[Ni, P, D]``; else the reverse.
    """
    rows, columns = (text, image) if to_image else (image, text)
    n_rows, n_columns = rows.shape[0], columns.shape[0]
    k = min(k, n_columns)
    scores = torch.empty(n_rows, k, dtype=torch.float32, device=text.device)
    indices = torch.empty(n_rows, k, dtype=torch.int64, device=text.device)
    if scores.numel() == 0:
        return scores, indices
    span = triton.next_power_of_2(k)
    best = torch.empty(n_rows, span, dtype=torch.int64, device=text.device)
    stripe = max(SMALLEST_STRIPE, STRIPE_SCORES // n_rows)
    block = min(1024, triton.next_power_of_2(min(stripe, n_columns)))
    for first in range(0, n_columns, stripe):
        part = slice(first, first + stripe)
        words, pictures = (text, image[part]) if to_image else (text[part], image)
        word_mask = text_mask if to_image or text_mask is None else text_mask[part]
        picture_mask = image_mask[part] if to_image and image_mask is not None else image_mask
        found = maxsim_forward(
            words, pictures, word_mask, picture_mask, mask_mode, to_image, not to_image, mean,
            precision=precision,
        )[0 if to_image else 1]  # fmt: skip
        merge_kernel[(n_rows,)](
            found, best, found.shape[1], first, k,
            SPAN=span, BLOCK=block, num_warps=4,
        )  # fmt: skip
    unpack_kernel[(n_rows,)](best, scores, indices, k, SPAN=span, num_warps=4)
    return scores, indices
