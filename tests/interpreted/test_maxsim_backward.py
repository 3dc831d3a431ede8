"""Gradients of the scores against autograd through the reference in float64."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import gradients, scoring, tiles
from bagformer.kernels.gradients import maxsim_backward
from bagformer.kernels.scoring import maxsim_forward
from support.judging import judge

from bagformer import reference

# texts, bags, images, patches, width
SHAPES = [
    (1, 1, 1, 1, 8),
    (5, 8, 3, 33, 64),
    (3, 9, 2, 31, 96),
    (2, 33, 3, 35, 136),
    (2, 5, 2, 18, 37),
]


def make(shape, device, dtype, masked=True, candidates=0, seed=0):
    n_texts, n_bags, n_images, n_patches, width = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    lead = (n_texts, candidates) if candidates else (n_images,)
    text = torch.randn(n_texts, n_bags, width, generator=generator).to(device, dtype)
    image = torch.randn(*lead, n_patches, width, generator=generator).to(device, dtype)
    turned = lead if candidates else (n_images, n_texts)
    slopes = tuple(
        torch.randn(size, generator=generator).to(device)
        for size in ((n_texts, candidates or n_images), turned)
    )
    if not masked:
        return text, image, None, None, slopes
    text_mask = torch.rand(n_texts, n_bags, generator=generator) < 0.7
    image_mask = torch.rand(*lead, n_patches, generator=generator) < 0.7
    text_mask[-1], image_mask.view(-1, n_patches)[0] = False, False
    return text, image, text_mask.to(device), image_mask.to(device), slopes


def autograd(text, image, text_mask, image_mask, slopes, mode, mean):
    leaves = text.clone().requires_grad_(), image.clone().requires_grad_()
    scores = reference.maxsim(
        *leaves, text_mask=text_mask, image_mask=image_mask, mask_mode=mode,
        reduction="mean" if mean else "sum",
    )  # fmt: skip
    total = sum(
        (score * slope.to(score.dtype)).sum()
        for score, slope in zip(scores[:2], slopes, strict=True)
        if slope is not None
    )
    return torch.autograd.grad(total, leaves)


def check(operands, mode="exclude", mean=False, slack=None, saved=True):
    text, image, text_mask, image_mask, slopes = operands
    argmax = (None, None)
    if saved:
        outputs = maxsim_forward(
            text, image, text_mask, image_mask, mode, slopes[0] is not None,
            slopes[1] is not None, mean, want_argmax=True,
        )  # fmt: skip
        argmax = outputs[2:]
    got = maxsim_backward(*slopes, text, image, text_mask, image_mask, *argmax, mode, mean)
    truth = autograd(text.double(), image.double(), text_mask, image_mask, slopes, mode, mean)
    theirs = autograd(*operands, mode, mean)
    slack = slack or {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[text.dtype]
    for ours, other, true in zip(got, theirs, truth, strict=True):
        assert ours.dtype == text.dtype
        judge(ours, other, true, slack)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_autograd(device, shape, dtype):
    check(make(shape, device, dtype, masked=shape[0] != 5))


# one past the owned rows, the streamed rows and the span of each table: 128 rows are 4 texts of 25
@pytest.mark.parametrize(
    "family,shape",
    [
        ("interpreter", (9, 8, 3, 65, 72)),
        ("sm_90", (5, 25, 2, 129, 136)),
        ("sm_100", (1, 9, 9, 33, 264)),
    ],
)
@pytest.mark.parametrize("dtype,masked", [(torch.bfloat16, False), (torch.float16, True)])
def test_one_past_each_edge_of_a_tile(device, monkeypatch, family, shape, dtype, masked):
    if device.type == "cpu":
        for table in (tiles.TEXT_GRADIENT, tiles.IMAGE_GRADIENT):
            monkeypatch.setitem(table, "interpreter", table[family])
    check(make(shape, device, dtype, masked=masked))


def shared(monkeypatch):
    """Records the leftover rows of each image that a launch of the image gradient shares."""
    found, run = [], gradients.grad_image_kernel

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **options):
                found.append(args[15] if options["SHARED"] else 0)
                return run[grid](*args, **options)

            return launch

    monkeypatch.setattr(gradients, "grad_image_kernel", Watched())
    return found


# whole tiles have 32 rows, the shared one 16: one image, as many as fit, one more; too many rows
@pytest.mark.parametrize(
    "images,patches,left",
    [(1, 33, 0), (16, 33, 1), (17, 33, 1), (9, 66, 2), (6, 35, 3), (5, 36, 4), (5, 37, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leftover_rows_that_images_share(device, monkeypatch, images, patches, left, dtype):
    found = shared(monkeypatch)
    if device.type == "cuda" and dtype != torch.float32:  # whole tiles have 128 rows
        patches += 96
        left = patches % 128 if images > 1 and patches % 128 <= 16 else 0
    check(make((3, 9, images, patches, 40), device, dtype, masked=False), mean=images == 9)
    assert found == [left]


@pytest.mark.parametrize("lost", [0, 1])
def test_leftover_rows_of_one_direction(device, lost):
    *sides, slopes = make((3, 9, 5, 34, 40), device, torch.float32, masked=False)
    slopes = tuple(None if side == lost else one for side, one in enumerate(slopes))
    check((*sides, slopes))


@pytest.mark.parametrize("sorts", [False, True])
def test_shared_rows_of_masked_and_sorted_texts_and_of_chunks(device, monkeypatch, sorts):
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0 if sorts else 1 << 40)
    found = shared(monkeypatch)
    text, image, text_mask, _, slopes = make((7, 20, 19, 33, 40), device, torch.float32)
    operands = text, image, text_mask, None, slopes
    check(operands)
    monkeypatch.setattr(gradients, "INDEX_BYTES", 4 * 19 * (20 + 33))
    check(operands, saved=False)
    assert len(found) > 2 and set(found) == {1}


def test_what_cannot_share_rows(device, monkeypatch):
    """A scale for each program, a mask of images, lists of images."""
    found = shared(monkeypatch)
    check(make((3, 9, 4, 33, 40), device, torch.float16, masked=False))
    check(make((3, 9, 4, 33, 40), device, torch.float32))
    check(make((3, 9, 4, 33, 40), device, torch.float32, masked=False, candidates=4))
    assert found == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_and_mutual_choices(device, dtype):
    text, image, *_, slopes = make((3, 9, 2, 20, 32), device, dtype, masked=False)
    text[:, 4], image[:, 11] = text[:, 2], image[:, 3]
    text[0, 6], text[1, 7] = image[0, 3], image[1, 8]
    check((text, image, None, None, slopes))
    # the lowest index wins a tie: nobody chose the other copy
    by_bags = maxsim_backward(slopes[0], None, text, image)[1]
    assert by_bags[:, 3].any() and not by_bags[:, 11].any()
    by_patches = maxsim_backward(None, slopes[1], text, image)[0]
    assert by_patches[:, 2].any() and not by_patches[:, 4].any()


def test_a_gradient_that_is_nan_or_infinite_stays_with_its_pair(device):
    operands = make((3, 9, 3, 20, 32), device, torch.bfloat16, masked=False)
    slopes = operands[4]
    slopes[0][1, 2], slopes[1][0, 2] = float("nan"), float("inf")
    text, image = maxsim_backward(*slopes, *operands[:4])
    assert text[0].isfinite().all() and image[1].isfinite().all()
    assert text[1].isnan().any() and not text[2].isfinite().all()


@pytest.mark.parametrize("bags,patches", [(256, 5), (255, 3), (3, 256), (3, 255)])
def test_indices_around_a_byte(device, bags, patches):
    check(make((2, bags, 2, patches, 16), device, torch.bfloat16, masked=False))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("candidates", [0, 2])
def test_masks_and_reductions(device, candidates, mode, mean):
    operands = make((4, 11, 3, 34, 64), device, torch.float32, candidates=candidates)
    got = check(operands, mode, mean)
    assert not got[0][~operands[2]].any() and not got[1][~operands[3]].any()


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("lost", [0, 1])
def test_one_direction(device, lost, saved):
    *operands, slopes = make((3, 9, 2, 20, 32), device, torch.float32)
    kept = tuple(None if place == lost else slope for place, slope in enumerate(slopes))
    check((*operands, kept), saved=saved)


@pytest.mark.parametrize("candidates", [0, 2])
def test_indices_are_recomputed_when_not_saved(device, monkeypatch, candidates):
    operands = make((5, 10, 2, 36, 32), device, torch.bfloat16, candidates=candidates)
    whole = check(operands)
    again = check(operands, saved=False)
    monkeypatch.setattr(gradients, "INDEX_BYTES", 1)
    for one, two, three in zip(whole, again, check(operands, saved=False), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=2**-7, atol=1e-6)


def test_recomputed_indices_stay_within_their_memory(device, monkeypatch):
    operands = make((5, 10, 2, 36, 32), device, torch.bfloat16)
    forward, held = scoring.maxsim_forward, []

    def watched(*given, **options):
        outputs = forward(*given, **options)
        held.append(sum(index.nbytes for index in outputs[2:]))
        return outputs

    monkeypatch.setattr(scoring, "maxsim_forward", watched)
    monkeypatch.setattr(gradients, "INDEX_BYTES", 2 * 2 * (10 + 36))
    runs = [maxsim_backward(*operands[4], *operands[:4]) for _ in range(3)]
    assert len(held) == 9 and max(held) <= gradients.INDEX_BYTES
    for run in runs[1:]:
        assert all(torch.equal(left, right) for left, right in zip(runs[0], run, strict=True))


def test_sorted_texts(device, monkeypatch):
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0)
    text, image, _, image_mask, slopes = make((7, 30, 3, 20, 32), device, torch.float32)
    counts = torch.tensor([30, 3, 8, 0, 17, 16, 9], device=device)
    text_mask = torch.arange(30, device=device) < counts[:, None]
    for mode in reference.MASK_MODES:
        check((text, image, text_mask, image_mask, slopes), mode)


@pytest.mark.parametrize("candidates", [0, 2])
def test_long_texts(device, candidates):
    check(make((2, 131, 2, 20, 32), device, torch.float32, candidates=candidates))


def test_tiny_gradients_survive_float16(device):
    *operands, slopes = make((4, 9, 3, 33, 64), device, torch.float16)
    tiny = tuple(slope * 2.0**-30 for slope in slopes)
    got = maxsim_backward(*tiny, *operands)
    want = maxsim_backward(*slopes, *operands)
    for ours, full in zip(got, want, strict=True):
        small = torch.finfo(torch.float16).smallest_normal * 2.0**-10
        torch.testing.assert_close(ours.float(), full.float() * 2.0**-30, rtol=1e-2, atol=small)


def test_unwanted_sides_and_absent_gradients(device):
    *operands, slopes = make((3, 9, 2, 20, 32), device, torch.float32)
    both = maxsim_backward(*slopes, *operands)
    text, none = maxsim_backward(*slopes, *operands, wants_image=False)
    assert torch.equal(text, both[0]) and none.shape == (0, 0, 0)
    none, image = maxsim_backward(*slopes, *operands, wants_text=False)
    assert torch.equal(image, both[1]) and none.shape == (0, 0, 0)
    assert not any(grad.any() for grad in maxsim_backward(None, None, *operands))


def test_strided_operands_and_empty_ones(device):
    text, image, text_mask, image_mask, slopes = make((4, 10, 4, 30, 40), device, torch.float32)
    views = text[::2, 1:, :32], image[1::2, 2:, 8:], text_mask[::2, 1:], image_mask[1::2, 2:]
    check((*views, tuple(slope[::2, ::2] for slope in slopes)))
    empty = maxsim_backward(*slopes, text[:, :0], image)
    assert empty[0].shape == (4, 0, 40) and not empty[1].any()


def test_a_masked_nan_has_no_effect(device):
    text, image, text_mask, image_mask, slopes = make((3, 9, 3, 20, 32), device, torch.float32)
    clean = maxsim_backward(*slopes, text, image, text_mask, image_mask, mask_mode="zero")
    dirty = maxsim_backward(
        *slopes, text.masked_fill(~text_mask[..., None], float("nan")),
        image.masked_fill(~image_mask[..., None], float("nan")),
        text_mask, image_mask, mask_mode="zero",
    )  # fmt: skip
    assert all(torch.equal(left, right) for left, right in zip(clean, dirty, strict=True))


def test_the_same_bits_every_time(device):
    operands = make((5, 9, 3, 33, 64), device, torch.bfloat16)
    first = maxsim_backward(*operands[4], *operands[:4])
    for _ in range(20 if device.type == "cuda" else 2):
        again = maxsim_backward(*operands[4], *operands[:4])
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
