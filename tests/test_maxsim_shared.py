"""Short texts share tiles: each has the bits that it has alone, whatever its neighbours hold."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, instruction_sets, mask, same_bits

from bagformer import maxsim, reference
from bagformer.reference import MASK_MODES

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", request.param)
    return request.param


def ragged(counts: list[int], depth: int, dtype=torch.float32):
    """Texts of so many bags in one padded tensor, and its mask."""
    text = features(len(counts), max(counts), depth, dtype=dtype)
    return text, torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def check(text, image, text_mask, **call) -> None:
    """All texts at once against one text at a time, which shares nothing."""
    for argmax in (False, True):
        call["return_argmax"] = argmax
        whole = maxsim(text, image, text_mask=text_mask, **call)
        for i in range(len(text)):
            alone = maxsim(text[i : i + 1], image, text_mask=text_mask[i : i + 1], **call)
            for field, found in alone._asdict().items():
                if found is not None:
                    turn = getattr(whole, field)
                    turn = turn[i] if field.startswith("text") else turn[:, i]
                    found = found[0] if field.startswith("text") else found[:, 0]
                    assert same_bits(found, turn), (field, i, argmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 31, 64])
def test_lengths_that_cut_texts_between_tiles(isa, dtype, depth):
    counts = [3, 4, 5, 6, 7, 8, 9, 10, 1, 1, 14, 2, 25, 5, 5, 13, 27, 3]
    text, text_mask = ragged(counts, depth, dtype)
    check(text, features(2, 41, depth, seed=1, dtype=dtype), text_mask)


@pytest.mark.parametrize("bags", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("patches", [1, 9, 33, 70])
def test_many_texts_of_one_length(isa, bags, patches):
    text, text_mask = ragged([bags] * 23, 12)
    check(text, features(2, patches, 12, seed=1), text_mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MASK_MODES)
def test_scattered_masks_and_empty_texts(isa, dtype, mode):
    text, image = features(30, 9, 16, dtype=dtype), features(3, 37, 16, seed=1, dtype=dtype)
    text_mask, image_mask = mask(30, 9, keep=0.4), mask(3, 37, seed=1)
    text_mask[[0, 5, 6, 7, 29]], image_mask[2] = False, False
    text[~text_mask], image[~image_mask] = NAN, INF  # never read
    check(text, image, text_mask, image_mask=image_mask, mask_mode=mode, reduction="mean")


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_inf_stay_in_their_own_text(isa, dtype, poison):
    counts = [4, 5, 3, 6, 2, 7, 4, 5, 3, 6]
    text, text_mask = ragged(counts, 10, dtype)
    image = features(2, 37, 10, seed=1, dtype=dtype)
    clean = maxsim(text, image, text_mask=text_mask)
    image[1, 5, 3] = 0
    text[3, 1, 3] = text[8, 2, 3] = poison
    check(text, image, text_mask)
    check(text, image, text_mask, mask_mode="zero")
    found = maxsim(text, image, text_mask=text_mask)
    rest = [i for i in range(len(counts)) if i not in (3, 8)]
    assert same_bits(found.text_to_image[rest, 0], clean.text_to_image[rest, 0])
    assert same_bits(found.image_to_text[0, rest], clean.image_to_text[0, rest])
    call = {"text_mask": text_mask, "return_argmax": True}
    truth = reference.maxsim(text, image, **call)
    for mine, true in zip(maxsim(text, image, **call), truth, strict=True):
        torch.testing.assert_close(mine, true, equal_nan=True, check_dtype=False)


def test_ties_in_a_shared_tile(isa):
    text, text_mask = ragged([3, 5, 4, 6, 2, 7, 3], 4)
    text[:], image = 1, torch.ones(2, 40, 4)
    text[2, 0], image[:, :3] = -1, -1
    check(text, image, text_mask)
    scores = maxsim(text, image, text_mask=text_mask, return_argmax=True)
    first = torch.zeros(2, 7, 40)
    first[:, 2, 3:], first[:, 2, :3] = 1, 0
    assert torch.equal(scores.image_argmax.float(), first)
    assert scores.text_argmax[0, 0].tolist()[:3] == [3, 3, 3]


def test_threads_cut_the_texts_elsewhere(isa):
    text, text_mask = ragged([3, 4, 5, 6, 7, 8, 9, 10] * 6, 24)
    image = features(1, 50, 24, seed=1)
    wanted = maxsim(text, image, text_mask=text_mask, return_argmax=True)
    before = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            found = maxsim(text, image, text_mask=text_mask, return_argmax=True)
            assert all(map(same_bits, found, wanted))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_texts_than_are_packed_at_once(isa, dtype):
    """Texts go by in groups of 32 MB of packed features; some are short, some masked."""
    rows, bags, depth = 33, 70, 4096
    rows *= 4 // torch.empty(0, dtype=dtype).element_size() or 1
    text = features(1, bags, depth, dtype=dtype).repeat(rows, 1, 1)
    text[:, 0, 0] = torch.arange(rows).to(dtype)  # no two are alike
    keep = torch.arange(bags) < torch.tensor([70, 3, 25, 7])[torch.arange(rows) % 4, None]
    image = features(2, 3, depth, seed=1, dtype=dtype)
    whole = maxsim(text, image, text_mask=keep)
    for i in (0, 1, rows // 2, rows - 3, rows - 2, rows - 1):
        alone = maxsim(text[[i]], image, text_mask=keep[[i]])
        assert same_bits(alone.text_to_image, whole.text_to_image[[i]])
        assert same_bits(alone.image_to_text, whole.image_to_text[:, [i]])
