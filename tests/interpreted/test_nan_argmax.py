"""Winners of maxima that are NaN: the first NaN's index, and sound pairs' winners left alone."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import scoring, tiles
from bagformer.kernels.scoring import maxsim_forward

from bagformer import reference

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
NAN = float("nan")
# Bags, patches: one tile of either, and several, so that the lowest index must win across tiles.
LENGTHS = [(9, 20), (20, 35)]


def make(device, n_texts, n_bags, images, n_patches, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n_texts + n_bags + n_patches)
    text = torch.randint(-1, 2, (n_texts, n_bags, 8), generator=generator)
    image = torch.randint(-1, 2, (*images, n_patches, 8), generator=generator)
    return text.to(device, dtype), image.to(device, dtype)


def poison(text, image):
    """NaN in several tokens of text 1 and of the first list's image 2."""
    text[1, [3, text.shape[1] - 1], 0] = NAN
    image.view(-1, *image.shape[-2:])[2, [5, image.shape[-2] - 2], 1] = NAN


def check(text, image, *masks, mode="exclude", wants=(True, True), **options):
    want = reference.maxsim(
        text, image, text_mask=masks[0] if masks else None,
        image_mask=masks[1] if masks else None, mask_mode=mode, return_argmax=True, **options,
    )  # fmt: skip
    mean = options.get("reduction") == "mean"
    got = maxsim_forward(text, image, *masks or (None, None), mode, *wants, mean, want_argmax=True)
    assert want[0].isnan().any() and not want[0].isnan().all()
    for side in range(2):
        if wants[side]:
            assert torch.equal(got[side].isnan(), want[side].isnan())
            index = got[2 + side].to(torch.int32)
            assert torch.equal(torch.where(index == 255, -1, index), want[2 + side])


@pytest.mark.parametrize("images", [(5,), (3, 4)])
@pytest.mark.parametrize(
    "lengths,wants",
    [(LENGTHS[0], (True, True)), (LENGTHS[1], (True, False)), (LENGTHS[1], (False, True))],
)
def test_the_first_nan_wins(device, monkeypatch, lengths, images, wants):
    """Programs have three images and then the rest, and room for more texts than there are."""
    monkeypatch.setattr(tiles, "images_per_program", lambda *_: 3)
    text, image = make(device, 3, lengths[0], images, lengths[1])
    poison(text, image)
    check(text, image, wants=wants)


@pytest.mark.parametrize("images", [(5,), (3, 4)])
@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_one_broken_pair_is_found(device, monkeypatch, images, wants):
    """Neither side holds a NaN: Inf - Inf, once."""
    monkeypatch.setattr(tiles, "images_per_program", lambda *_: 3)
    text, image = make(device, 3, 9, images, 20)
    text[0, 4, 2:4] = torch.tensor([float("inf"), -float("inf")])
    other = image if len(images) == 1 else image[0]
    other[..., 2:4] = torch.tensor([1.0, -1.0])
    other[-1, 7, 3] = 1.0
    check(text, image, wants=wants)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(device, dtype):
    text, image = make(device, 3, 9, (4,), 20, dtype)
    poison(text, image)
    check(text, image, reduction="mean")


@pytest.mark.parametrize("images", [(5,), (3, 4)])
@pytest.mark.parametrize(
    "mode,masked",
    [
        ("exclude", (True, True)),
        ("zero", (True, True)),
        ("zero", (True, False)),
        ("exclude", (False, True)),
    ],
)
def test_masked_tokens_take_no_part(device, monkeypatch, images, mode, masked):
    """Programs hold broken pairs beside texts and images of which nothing counts."""
    monkeypatch.setattr(tiles, "images_per_program", lambda *_: 3)
    text, image = make(device, 3, 20, images, 35)
    text_mask = torch.ones(text.shape[:-1], dtype=torch.bool, device=device)
    image_mask = torch.ones(image.shape[:-1], dtype=torch.bool, device=device)
    text_mask[1, [0, 3]], text_mask[2] = False, False
    rows = image_mask.view(-1, 35)
    rows[2, [0, 5]], rows[1] = False, False
    poison(text, image)
    if masked[0]:
        text[~text_mask] = NAN
    if masked[1]:
        image[~image_mask] = NAN
    pair = text_mask if masked[0] else None, image_mask if masked[1] else None
    check(text, image, *pair, mode=mode)


def test_sorted_texts(device, monkeypatch):
    """A program asks for its slot class, and for its texts, once more; the last classes differ."""
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0)
    monkeypatch.setattr(tiles, "images_per_program", lambda *_: 2)
    text, image = make(device, 11, 33, (3,), 20)
    lengths = torch.tensor([33, 5, 17, 8, 0, 9, 16, 4, 30, 12, 33], device=device)
    text_mask = torch.arange(33, device=device) < lengths[:, None]
    text[[1, 2, 5, 10], 3, 0] = NAN
    image[2, 7, 1] = NAN
    check(text, image, text_mask, None)


@pytest.mark.parametrize("images", [(3,), (2, 2)])
def test_texts_cut_into_pieces(device, images):
    text, image = make(device, 2, 131, images, 20)
    text[1, [2, 129], 0] = NAN
    image.view(-1, 20, 8)[0, [4, 18], 1] = NAN
    check(text, image)


def test_more_pairs_than_are_read_at_once(device, monkeypatch):
    monkeypatch.setattr(tiles, "images_per_program", lambda *_: 40)
    text, image = make(device, 4, 8, (40,), 3)
    text[0, 2, 0] = NAN
    image[2, 1, 1] = NAN
    check(text, image)
