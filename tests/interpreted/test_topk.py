"""maxsim_topk: order, ties, NaN, and answers that do not depend on how the collection is cut."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import topk
from bagformer.kernels.topk import maxsim_topk, merge_kernel, unpack_kernel

from bagformer import reference


def _operands(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(-1, 2, (5, 6, 16), generator=generator).to(device, torch.bfloat16)
    image = torch.randint(-1, 2, (23, 9, 16), generator=generator).to(device, torch.bfloat16)
    text_mask = (torch.rand(5, 6, generator=generator) < 0.7).to(device)
    image_mask = (torch.rand(23, 9, generator=generator) < 0.7).to(device)
    return text, image, text_mask, image_mask


@pytest.mark.parametrize("stripe", [3, 64])
@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_matches_a_stable_sort(device, monkeypatch, k, direction, stripe):
    monkeypatch.setattr(topk, "STRIPE_SCORES", 0)
    monkeypatch.setattr(topk, "SMALLEST_STRIPE", stripe)
    text, image, text_mask, image_mask = _operands(device)
    got = maxsim_topk(text, image, k, text_mask, image_mask, "zero", direction == "text_to_image")
    want = reference.maxsim_topk(
        text, image, k, direction=direction, text_mask=text_mask, image_mask=image_mask,
        mask_mode="zero",
    )  # fmt: skip
    assert torch.equal(got[0], want.scores) and torch.equal(got[1], want.indices)


@pytest.mark.parametrize("stripe", [4, 7, 64])
def test_ties_go_to_the_lower_index(device, monkeypatch, stripe):
    monkeypatch.setattr(topk, "STRIPE_SCORES", 0)
    monkeypatch.setattr(topk, "SMALLEST_STRIPE", stripe)
    text, image, *_ = _operands(device, 1)
    image[10:20] = image[2]
    for k in (1, 5, 23):
        got = maxsim_topk(text, image, k)
        want = reference.maxsim_topk(text, image, k)
        assert torch.equal(got[0], want.scores) and torch.equal(got[1], want.indices)


def test_every_kind_of_number_keeps_its_rank(device):
    nan, inf = float("nan"), float("inf")
    row = [0.0, -0.0, 1e-45, -1e-45, nan, inf, -inf, -nan, -2.5, 3.0, 3.0, 65504.0, -1e38]
    scores = torch.tensor([row, row[::-1]], device=device)
    best = torch.arange(16, device=device).repeat(2, 1) + torch.iinfo(torch.int64).min
    merge_kernel[(2,)](scores, best, 13, 0, 13, SPAN=16, BLOCK=4, num_warps=4)
    values = torch.empty(2, 13, device=device)
    indices = torch.empty(2, 13, dtype=torch.int64, device=device)
    unpack_kernel[(2,)](best, values, indices, 13, SPAN=16, num_warps=4)
    want, order = torch.sort(scores, dim=1, descending=True, stable=True)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, order)


def test_nothing_to_rank(device):
    text, image, *_ = _operands(device)
    for pair in ((text[:0], image), (text, image[:0])):
        scores, indices = maxsim_topk(*pair, 3)
        assert scores.shape == indices.shape == (pair[0].shape[0], min(3, pair[1].shape[0]))
