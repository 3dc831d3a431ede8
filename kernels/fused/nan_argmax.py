"""Indices of maxima that are NaN: the first NaN, as ``torch.max`` gives.

Keeping NaN in mind would cost the scoring kernel two more comparisons for each similarity. A NaN
maximum shows in its pair's score, so this kernel looks over the scores and works only where one is
NaN: one program owns PAIRS pairs, and leaves after reading their scores if they are sound.
"""
# ruff: noqa: N803 - Triton's constexpr parameters are written in capitals

import triton
import triton.language as tl
from bagformer.kernels.maxsim import SIZES, similarity
from bagformer.kernels.reductions import NOWHERE

BLOCK = tl.constexpr(16)


@triton.jit
def _real(plan, item, place, count, length, MASKED: tl.constexpr):
    """Token numbers at compacted places, those past the end being the last token's."""
    place = tl.maximum(tl.minimum(place, count - 1), 0)
    if MASKED:
        return tl.load(plan[0] + item * length + place)
    return place


@triton.jit
def _first_nans(
    out, own, own_plan, own_item, own_stride, n_own, other, other_plan, other_item, other_stride,
    n_other, width, OWN_MASK: tl.constexpr, OTHER_MASK: tl.constexpr
):  # fmt: skip
    """For each own token of one pair: write the first other token whose product with it is NaN."""
    own_count, other_count = n_own, n_other
    if OWN_MASK:
        own_count = tl.load(own_plan[1] + own_item)
    if OTHER_MASK:
        other_count = tl.load(other_plan[1] + other_item)
    for start in range(0, own_count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = _real(own_plan, own_item, place, own_count, n_own, OWN_MASK)
        found = tl.full((BLOCK,), NOWHERE, tl.int32)
        for first in range(0, other_count, BLOCK):
            rival = first + tl.arange(0, BLOCK)
            rival = _real(other_plan, other_item, rival, other_count, n_other, OTHER_MASK)
            features = other, rival.to(tl.int64) * other_stride
            shape: tl.constexpr = (0, 0, 32, False, "ieee")
            tile = similarity(own, token * own_stride, features, width, BLOCK, BLOCK, shape)
            here = tl.min(tl.where(tile != tile, rival[None, :], NOWHERE), 1)
            found = tl.minimum(found, here)
        tl.store(out + token, found, mask=(place < own_count) & (found != NOWHERE))


@triton.jit(do_not_specialize=SIZES)
def nan_argmax_kernel(
    text, image, text_plan, image_plan, text_to_image, image_to_text, text_argmax, image_argmax,
    n_texts, n_images, n_bags, n_patches, width,
    text_stride, bag_stride, list_stride, image_stride, patch_stride,
    PAIRS: tl.constexpr, TEXT_MASK: tl.constexpr, IMAGE_MASK: tl.constexpr,
    CANDIDATES: tl.constexpr, WANTS_TEXT: tl.constexpr, WANTS_IMAGE: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * PAIRS
    pair = start + tl.arange(0, PAIRS)
    inside = pair < n_texts.to(tl.int64) * n_images
    turned = pair if CANDIDATES else (pair % n_images) * n_texts + pair // n_images
    broken = tl.zeros((PAIRS,), tl.int32)
    if WANTS_TEXT:
        score = tl.load(text_to_image + pair, mask=inside, other=0.0)
        broken = broken | (score != score).to(tl.int32)
    if WANTS_IMAGE:
        score = tl.load(image_to_text + turned, mask=inside, other=0.0)
        broken = broken | (score != score).to(tl.int32)
    left = tl.sum(broken, 0)
    while left > 0:
        one = tl.min(tl.where(broken != 0, tl.arange(0, PAIRS), PAIRS), 0)
        broken = tl.where(tl.arange(0, PAIRS) == one, 0, broken)
        left -= 1
        t, i = (start + one) // n_images, (start + one) % n_images
        item, place = i, i * n_texts + t
        base = image + i * image_stride
        if CANDIDATES:
            item, place, base = start + one, start + one, base + t * list_stride
        words = text + t * text_stride
        if WANTS_TEXT:
            _first_nans(
                text_argmax + (start + one) * n_bags,
                words, text_plan, t, bag_stride, n_bags,
                base, image_plan, item, patch_stride, n_patches, width, TEXT_MASK, IMAGE_MASK,
            )  # fmt: skip
        if WANTS_IMAGE:
            _first_nans(
                image_argmax + place * n_patches,
                base, image_plan, item, patch_stride, n_patches,
                words, text_plan, t, bag_stride, n_bags, width, IMAGE_MASK, TEXT_MASK,
            )  # fmt: skip
