"""The scoring kernel against the reference: values, indices, masks, shapes past tile edges."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import scoring, tiles
from bagformer.kernels.scoring import maxsim_forward
from support.judging import judge

from bagformer import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# texts, bags, images, patches, width
SHAPES = [
    (1, 1, 1, 1, 8),
    (5, 8, 2, 17, 64),
    (5, 9, 3, 33, 96),
    (2, 17, 3, 65, 128),
    (3, 33, 2, 31, 72),
    (9, 25, 2, 50, 200),
    (2, 3, 2, 18, 37),
]


def make(shape, device, dtype, *, masked=False, whole=False, candidates=0, seed=0):
    """Random features and masks; ``whole``: small integers, exact and full of ties."""
    n_texts, n_bags, n_images, n_patches, width = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    lead = (n_texts, candidates) if candidates else (n_images,)

    def features(*size):
        if whole:
            return torch.randint(-1, 2, size, generator=generator).to(device, dtype)
        return torch.randn(size, generator=generator).to(device, dtype)

    text, image = features(n_texts, n_bags, width), features(*lead, n_patches, width)
    if not masked:
        return text, image, None, None
    text_mask = torch.rand(n_texts, n_bags, generator=generator) < 0.6
    image_mask = torch.rand(*lead, n_patches, generator=generator) < 0.6
    text_mask[-1], image_mask[-1] = False, True
    if n_texts > 2:
        text_mask[0] = True
    if len(lead) == 1 and n_images > 1:
        image_mask[0] = False
    return text, image, text_mask.to(device), image_mask.to(device)


def widen(index, n_other):
    wide = index.to(torch.int32)
    return wide.masked_fill(wide == 255, -1) if index.dtype == torch.uint8 else wide


def expected(text, image, text_mask, image_mask, **options):
    return reference.maxsim(text, image, text_mask=text_mask, image_mask=image_mask, **options)


def assert_same(got, want):
    """Scores and indices equal to the last bit (features are small integers)."""
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=0, equal_nan=True)
    for ours, theirs in zip(got[2:], want[2:], strict=True):
        if theirs is None:
            assert ours.numel() == 0
        else:
            assert torch.equal(widen(ours, 0), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_as_exact_as_the_reference(device, shape, dtype):
    operands = make(shape, device, dtype, masked=shape[0] > 2)
    got = maxsim_forward(*operands, "exclude")
    theirs = expected(*operands)
    truth = expected(operands[0].double(), operands[1].double(), *operands[2:])
    for ours, other, true in zip(got[:2], theirs[:2], truth[:2], strict=True):
        judge(ours, other, true, 1e-6)
    assert got[2].shape == (0, 0, 0) and got[3].shape == (0, 0, 0)


@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_ties_masks_and_indices_are_exact(device, shape, masked, mode):
    dtype = torch.bfloat16 if shape[1] % 2 else torch.float32
    operands = make(shape, device, dtype, masked=masked, whole=True)
    mean = shape[2] == 3
    got = maxsim_forward(*operands, mode, mean=mean, want_argmax=True)
    options = {"mask_mode": mode, "reduction": "mean" if mean else "sum", "return_argmax": True}
    assert_same(got, expected(*operands, **options))


@pytest.mark.parametrize("wants_text,wants_image", [(True, False), (False, True)])
def test_one_direction(device, wants_text, wants_image):
    operands = make((3, 10, 2, 35, 64), device, torch.float16, masked=True, whole=True)
    both = maxsim_forward(*operands, "zero", want_argmax=True)
    one = maxsim_forward(*operands, "zero", wants_text, wants_image, want_argmax=True)
    for place, wanted in enumerate([wants_text, wants_image] * 2):
        assert torch.equal(one[place], both[place]) if wanted else one[place].numel() == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("candidates", [1, 3])
def test_candidates_and_pairs(device, candidates, masked):
    shape = (4, 9, 0, 37, 96)
    operands = make(shape, device, torch.bfloat16, masked=masked, whole=True, candidates=candidates)
    got = maxsim_forward(*operands, "zero", mean=True, want_argmax=True)
    options = {"mask_mode": "zero", "reduction": "mean", "return_argmax": True}
    assert_same(got, expected(*operands, **options))


def test_strided_operands(device):
    text, image, text_mask, image_mask = make(
        (8, 13, 6, 40, 80), device, torch.bfloat16, masked=True, whole=True
    )
    views = text[::2, 1:, :64], image[1::2, 2:, 8:72], text_mask[::2, 1:], image_mask[1::2, 2:]
    got = maxsim_forward(*views, "exclude", want_argmax=True)
    assert_same(got, expected(*views, return_argmax=True))
    turned = (text.transpose(1, 2).contiguous().transpose(1, 2), *views[:0])
    torch.testing.assert_close(
        maxsim_forward(*turned, image)[0], expected(text, image, None, None)[0].float()
    )


@pytest.mark.parametrize("width", [192, 384, 512, 768])
def test_wide_features(device, width):
    operands = make((2, 6, 2, 34, width), device, torch.bfloat16, masked=True, whole=True)
    assert_same(
        maxsim_forward(*operands, "exclude", want_argmax=True),
        expected(*operands, return_argmax=True),
    )


def test_texts_are_sorted_into_slots(device, monkeypatch):
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0)
    text, image, _, image_mask = make((7, 30, 3, 20, 64), device, torch.bfloat16, whole=True)
    counts = torch.tensor([30, 3, 8, 0, 17, 16, 9], device=device)
    text_mask = torch.arange(30, device=device) < counts[:, None]
    for mode in reference.MASK_MODES:
        got = maxsim_forward(text, image, text_mask, image_mask, mode, want_argmax=True)
        want = expected(text, image, text_mask, image_mask, mask_mode=mode, return_argmax=True)
        assert_same(got, want)


@pytest.mark.parametrize("candidates", [0, 2])
def test_texts_longer_than_a_tile(device, candidates):
    operands = make(
        (2, 131, 2, 130, 32), device, torch.float16, masked=True, whole=True, candidates=candidates
    )
    got = maxsim_forward(*operands, "exclude", mean=True, want_argmax=True)
    assert_same(got, expected(*operands, reduction="mean", return_argmax=True))


@pytest.mark.parametrize("candidates", [0, 2])
def test_nan_and_infinity_propagate(device, candidates):
    shape = (4, 11, 3, 36, 64)
    operands = make(shape, device, torch.bfloat16, masked=True, whole=True, candidates=candidates)
    text, image, text_mask, image_mask = operands
    text_mask[1] = True
    text[1, 4], text[1, 7, 3] = float("nan"), float("nan")
    text[0, 2, 5] = float("inf")
    image_mask[1] = True
    image.view(-1, *image.shape[-2:])[2, 20, 1] = float("nan")
    want = expected(*operands, return_argmax=True)
    assert want[0].isnan().any() and not want[0].isnan().all()
    got = maxsim_forward(*operands, "exclude", want_argmax=True)
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
    for ours, theirs in zip(got[2:], want[2:], strict=True):
        assert torch.equal(widen(ours, 0), theirs)


def test_a_masked_token_is_never_read(device):
    text, image, text_mask, image_mask = make(
        (3, 9, 3, 20, 32), device, torch.bfloat16, masked=True, whole=True
    )
    for mode in reference.MASK_MODES:
        clean = maxsim_forward(text, image, text_mask, image_mask, mode, want_argmax=True)
        dirty = maxsim_forward(
            text.masked_fill(~text_mask[..., None], float("nan")),
            image.masked_fill(~image_mask[..., None], float("nan")),
            text_mask, image_mask, mode, want_argmax=True,
        )  # fmt: skip
        for left, right in zip(clean, dirty, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 4, 8), (2, 0, 2, 4, 8), (2, 3, 2, 0, 8), (2, 3, 0, 4, 8)]
)
def test_nothing_to_score(device, shape):
    operands = make(shape, device, torch.float32)
    got = maxsim_forward(*operands, want_argmax=True)
    assert_same(got, expected(*operands, return_argmax=True))


def test_lower_precision_on_request(device):
    operands = make((3, 5, 2, 18, 64), device, torch.float32)
    got = maxsim_forward(*operands, precision="bf16")
    rounded = [operand.bfloat16() for operand in operands[:2]]
    torch.testing.assert_close(got[0], expected(*rounded, None, None)[0], rtol=1e-5, atol=1e-4)
    assert maxsim_forward(*operands, precision="tf32")[0].shape == got[0].shape


def sharing(monkeypatch, run):
    """Programs own ``run`` images; gives the list of what each launch shares."""
    seen = []
    choose = tiles.leftovers

    def record(tile, n_patches, images):
        seen.append(choose(tile, n_patches, images))
        return seen[-1]

    monkeypatch.setattr(tiles, "images_per_program", lambda *_: run)
    monkeypatch.setattr(tiles, "leftovers", record)
    return seen


# tiles have 32 rows here: 4 leftover rows of 4 images fill one
@pytest.mark.parametrize("n_patches", [1, 2, 4, 5, 31, 32, 33, 35, 36, 37, 64, 65, 68, 97])
@pytest.mark.parametrize("run", [2, 3, 16])
def test_images_share_a_tile_for_their_leftover_rows(device, monkeypatch, n_patches, run):
    seen = sharing(monkeypatch, run)
    operands = make((3, 9, 7, n_patches, 32), device, torch.bfloat16, whole=True)
    assert_same(maxsim_forward(*operands), expected(*operands))
    left = n_patches % tiles.forward_tile(device, torch.bfloat16, 32, 16, 3, "ieee").block_p
    few = 0 < left <= 4
    if device.type == "cpu":
        assert seen == [(left, min(run, 16 // left)) if few else (0, run)]


@pytest.mark.parametrize("candidates", [0, 5])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
def test_ragged_images_share_what_they_have(device, monkeypatch, mode, candidates):
    """Lengths around the tile's border: with a leftover, with a longer one, whole, empty."""
    seen = sharing(monkeypatch, 4)
    shape = (3, 9, 9, 66, 32)
    operands = make(shape, device, torch.bfloat16, masked=True, whole=True, candidates=candidates)
    text, image, text_mask, image_mask = operands
    lengths = torch.tensor([66, 65, 64, 63, 35, 34, 33, 2, 0] * 2, device=device)
    rows = image_mask.view(-1, 66)
    rows[:] = torch.arange(66, device=device) < lengths[: len(rows), None]
    rows[0] = rows[0].roll(7)
    got = maxsim_forward(text, image, text_mask, image_mask, mode, mean=True)
    want = expected(text, image, text_mask, image_mask, mask_mode=mode, reduction="mean")
    assert_same(got, want)
    assert device.type != "cpu" or seen == [(2, 4)]


def test_nan_in_a_shared_tile_stays_in_its_image(device, monkeypatch):
    sharing(monkeypatch, 5)
    text, image, *_ = make((3, 9, 5, 33, 32), device, torch.bfloat16, whole=True)
    image[2, 32, 3] = float("nan")  # the leftover row of image 2
    image[4, 5, 3] = float("nan")
    want = expected(text, image, None, None)
    assert want[0].isnan().any(0).tolist() == [False, False, True, False, True]
    assert_same(maxsim_forward(text, image), want)


@pytest.mark.parametrize("wants_text,wants_image", [(True, False), (False, True)])
def test_one_direction_of_shared_tiles(device, monkeypatch, wants_text, wants_image):
    sharing(monkeypatch, 3)
    operands = make((3, 9, 7, 33, 32), device, torch.bfloat16, masked=True, whole=True)
    both = expected(*operands, mask_mode="zero")
    one = maxsim_forward(*operands, "zero", wants_text, wants_image)
    for place, wanted in enumerate([wants_text, wants_image]):
        if wanted:
            torch.testing.assert_close(one[place], both[place].float(), rtol=1e-6, atol=0)


# 15, 16, 17, 63, 64, 65, 72 and 257 are on and past the borders of tiles of 64 rows
@pytest.mark.parametrize("n_patches", [1, 15, 16, 17, 63, 64, 65, 72, 257])
def test_indices_at_borders(device, n_patches):
    """Every row ties with its neighbours, so that the lowest index must win across a border."""
    operands = make((2, 5, 3, n_patches, 8), device, torch.bfloat16, whole=True)
    operands[1][0] = operands[1][0, :1]
    got = maxsim_forward(*operands, want_argmax=True)
    assert_same(got, expected(*operands, return_argmax=True))
