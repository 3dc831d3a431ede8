"""The turned kernel: a pair scored where its image meets few texts, which leaves the image where it
lies, has the bits that it has in a batch, where the image is packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.makers import features, instruction_sets, mask, same_bits
from torch import Tensor

from bagformer import (
    maxsim,
    maxsim_pairs,
    maxsim_quantized,
    maxsim_topk,
    quantize_features,
    reference,
)
from bagformer.reference import MASK_MODES

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MANY = 9  # texts beside those of a test, so that the batch packs its images


@pytest.fixture(params=instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", request.param)
    return request.param


def check(text: Tensor, image: Tensor, text_mask=None, image_mask=None, **call) -> None:
    """Texts one by one, as candidates and as pairs against the same texts in a large batch."""
    filler = features(MANY, *text.shape[1:], seed=99, dtype=text.dtype)
    all_texts = torch.cat([text, filler])
    all_masks = None
    if text_mask is not None:
        all_masks = torch.cat([text_mask, mask(MANY, text.shape[1], seed=98)])
    for argmax in (False, True):
        call["return_argmax"] = argmax
        batch = maxsim(all_texts, image, text_mask=all_masks, image_mask=image_mask, **call)
        for i in range(len(text)):
            one = text[i : i + 1]
            one_mask = None if text_mask is None else text_mask[i : i + 1]
            alone = maxsim(one, image, text_mask=one_mask, image_mask=image_mask, **call)
            candidates = maxsim(
                one,
                image[None],
                text_mask=one_mask,
                image_mask=None if image_mask is None else image_mask[None],
                **call,
            )
            pairs = maxsim_pairs(
                one.expand(len(image), -1, -1),
                image,
                text_mask=None if one_mask is None else one_mask.expand(len(image), -1),
                image_mask=image_mask,
                **call,
            )
            for field in batch._fields:
                whole = getattr(batch, field)
                if whole is None:
                    continue
                whole = whole[i] if field.startswith("text") else whole[:, i]
                turned = getattr(alone, field)
                turned = turned[0] if field.startswith("text") else turned[:, 0]
                assert same_bits(turned, whole), (field, argmax, "alone")
                assert same_bits(getattr(candidates, field)[0], whole), (field, argmax)
                assert same_bits(getattr(pairs, field), whole), (field, argmax, "pairs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3, 16, 33, 63, 65])
def test_every_depth(isa, dtype, depth):
    check(features(2, 9, depth, dtype=dtype), features(2, 29, depth, seed=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bags", [1, 4, 5, 8, 9, 16, 17, 25, 32, 33, 70])
def test_every_width_of_a_text(isa, dtype, bags):
    check(features(1, bags, 20, dtype=dtype), features(2, 15, 20, seed=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patches", [1, 4, 5, 6, 7, 12, 13, 14, 26, 27, 33, 257])
def test_every_height_of_an_image(isa, dtype, patches):
    check(features(1, 7, 18, dtype=dtype), features(2, patches, 18, seed=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_masks(isa, dtype, mode, reduction):
    text, image = features(3, 19, 24, dtype=dtype), features(3, 31, 24, seed=1, dtype=dtype)
    text_mask, image_mask = mask(3, 19), mask(3, 31, seed=1)
    text_mask[1], image_mask[2] = False, False
    text[~text_mask], image[~image_mask] = NAN, INF  # never read
    check(text, image, text_mask, image_mask, mask_mode=mode, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(isa, dtype):
    text, image = torch.ones(1, 40, 6, dtype=dtype), torch.ones(2, 30, 6, dtype=dtype)
    image[0, :4], text[0, :2] = -1, -1
    text[0, 5] = image[1, 20] = 0
    text_mask, image_mask = torch.ones(1, 40, dtype=torch.bool), mask(2, 30)
    text_mask[0, 3] = False
    check(text, image)
    check(text, image, text_mask, image_mask, mask_mode="zero")
    check(-text, image, text_mask, image_mask, mask_mode="zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("bags", [3, 20, 40])
def test_nan_and_inf(isa, dtype, poison, bags):
    text, image = features(2, bags, 8, dtype=dtype), features(4, 30, 8, seed=1, dtype=dtype)
    text[0, bags - 1, 2] = text[0, bags // 2, 0] = poison
    image[1, [7, 13, 29], 3] = poison
    image[2, 0, 2] = 0  # 0 times Inf
    image[3] = -INF
    check(text, image)
    image_mask = mask(4, 30)
    check(text, image, None, image_mask, mask_mode="zero")
    call = {"image_mask": image_mask, "mask_mode": "zero", "return_argmax": True}
    truth = reference.maxsim(text[:1], image, **call)
    for mine, true in zip(maxsim(text[:1], image, **call), truth, strict=True):
        torch.testing.assert_close(mine, true, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_stay_where_they_are(isa, dtype):
    """Strides along D, odd distances of rows, addresses that are no multiple of a vector's."""
    text = features(1, 9, 22, dtype=dtype)
    plain = features(2, 17, 22, seed=1, dtype=dtype)
    wanted = maxsim(text, plain)
    for columns in (23, 25, 44):
        roomy = plain.new_full((2, 17, columns), NAN)
        views = [roomy[..., 1:23]] if columns < 44 else [roomy[..., ::2], roomy[..., 1::2]]
        for view in views:
            view.copy_(plain)
            assert all(map(same_bits, maxsim(text, view), wanted))
    turned = plain.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(map(same_bits, maxsim(text, turned), wanted))
    flipped = plain.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(same_bits, maxsim(text, flipped), wanted))
    once = maxsim(text, plain[:1].expand(3, -1, -1))
    assert all(same_bits(score, once[0][:, :1]) for score in once[0].split(1, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("texts", [2, 3, 4, 5])
def test_a_few_texts_at_once(isa, dtype, texts):
    text, image = features(MANY, 16, 130, dtype=dtype), features(3, 30, 130, seed=1, dtype=dtype)
    text_mask, image_mask = mask(MANY, 16), mask(3, 30, seed=1)
    call = {"image_mask": image_mask, "return_argmax": True}
    many = maxsim(text, image, text_mask=text_mask, **call)
    few = maxsim(text[:texts], image, text_mask=text_mask[:texts], **call)
    assert same_bits(few.text_to_image, many.text_to_image[:texts])
    assert same_bits(few.image_to_text, many.image_to_text[:, :texts])
    assert same_bits(few.text_argmax, many.text_argmax[:texts])
    assert same_bits(few.image_argmax, many.image_argmax[:, :texts])


def test_threads_and_directions(isa):
    text, image = features(1, 11, 32), features(5, 40, 32, seed=1)
    wanted = maxsim(text, image)
    before = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(map(same_bits, maxsim(text, image), wanted))
    finally:
        torch.set_num_threads(before)
    to_image = maxsim(text, image, directions="text_to_image")
    to_text = maxsim(text, image, directions="image_to_text")
    assert same_bits(to_image.text_to_image, wanted.text_to_image)
    assert same_bits(to_text.image_to_text, wanted.image_to_text)


def test_topk_of_one_text(isa):
    text, image = features(MANY, 11, 32), features(30, 20, 32, seed=1)
    many, one = maxsim_topk(text, image, 5), maxsim_topk(text[:1], image, 5)
    assert all(same_bits(first[:1], second) for first, second in zip(many, one, strict=True))


def test_gradients_through_the_winners_of_few_texts(isa):
    text, image = features(MANY, 11, 32), features(3, 20, 32, seed=1)

    def gradient(texts: Tensor) -> Tensor:
        leaf = texts.clone().requires_grad_()
        scores = maxsim(leaf, image)
        (scores.text_to_image.sum() + scores.image_to_text.sum()).backward()
        return leaf.grad

    assert same_bits(gradient(text)[:1], gradient(text[:1]))


def test_no_bags_or_no_patches(isa):
    for text, image in (
        (features(1, 0, 8), features(2, 5, 8)),
        (features(1, 4, 8), features(2, 0, 8)),
    ):
        scores = maxsim(text, image, return_argmax=True)
        assert scores.text_to_image.tolist() == [[0.0, 0.0]]
        assert (scores.text_argmax == -1).all() and (scores.image_argmax == -1).all()
    flat = maxsim(features(1, 4, 0), features(2, 5, 0))
    assert flat.text_to_image.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", list(reference.QUANTIZED_DTYPES))
@pytest.mark.parametrize(
    "bags,patches,depth", [(1, 1, 1), (16, 13, 33), (17, 14, 64), (35, 29, 130)]
)
def test_eight_bit_images(isa, dtype, stored, bags, patches, depth):
    text = features(MANY, bags, depth, dtype=dtype)
    image = features(3, patches, depth, seed=1)
    image[1] = -text[0, 0].float()  # a spare row that lost its scale would win by its 0
    image[2, 0, 0] = NAN
    packed = quantize_features(image, dtype=stored)
    text_mask, image_mask = mask(MANY, bags), mask(3, patches, seed=3)
    text_mask[0, 0] = image_mask[0] = True
    for argmax in (False, True):
        call = {"image_mask": image_mask, "return_argmax": argmax}
        batch = maxsim_quantized(text, packed, text_mask=text_mask, **call)
        alone = maxsim_quantized(text[:1], packed, text_mask=text_mask[:1], **call)
        for field, whole in batch._asdict().items():
            if whole is not None:
                first = whole[:1] if field.startswith("text") else whole[:, :1]
                assert same_bits(getattr(alone, field), first), (field, argmax)
    truth = reference.maxsim_quantized(
        text[:1].double(), packed.values, packed.scales, text_mask=text_mask[:1], **call
    )
    for mine, true in zip(alone[:2], truth[:2], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_eight_bit_images_are_read_where_they_lie(isa):
    """Strided, expanded and cut from the middle of a larger tensor."""
    text = features(1, 9, 24)
    plain = quantize_features(features(2, 17, 24, seed=1))
    wanted = maxsim_quantized(text, plain)
    roomy = torch.full((2, 17, 25), 77, dtype=torch.int8)
    roomy[..., 1:] = plain.values
    for values in (roomy[..., 1:], plain.values.transpose(1, 2).contiguous().transpose(1, 2)):
        found = maxsim_quantized(text, replace(plain, values=values))
        assert all(map(same_bits, found, wanted))
    scales = plain.scales.t().contiguous().t()
    assert all(map(same_bits, maxsim_quantized(text, replace(plain, scales=scales)), wanted))
