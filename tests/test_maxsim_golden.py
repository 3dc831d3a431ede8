"""The original's loss data through maxsim(mask_mode="zero"), and the same on data of our own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.makers import features, mask

from bagformer import maxsim, maxsim_pairs
from bagformer.ops.l2_normalize import l2_normalize


def paper_loss(scores):
    """Symmetric cross-entropy over raw scores, text b with image b."""
    target = torch.arange(scores.text_to_image.shape[0])
    cross_entropy = torch.nn.functional.cross_entropy
    return (
        cross_entropy(scores.image_to_text, target) + cross_entropy(scores.text_to_image, target)
    ) / 2


def original_similarity(text, image, keep):
    """The original's rule written out: masked texts are multiplied by 0 and still compete."""
    similarity = torch.einsum("tnd,ipd->tinp", text * keep[..., None], image)
    return similarity.amax(3).sum(2), similarity.amax(2).sum(2).t()


@pytest.fixture(scope="module")
def cases(golden):
    names = json.loads((golden / "loss_cases.json").read_text())
    arrays = np.load(golden / "loss.npz")
    return [(case, arrays) for case in names if "Nt" in case]


def load(arrays, case, name):
    return torch.from_numpy(arrays[f"{case['name']}/{name}"]).float()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_scores_losses_and_gradients_of_the_original(cases, backend):
    compared = 0
    for case, arrays in cases:
        text, image = load(arrays, case, "text"), load(arrays, case, "image")
        text.requires_grad_(), image.requires_grad_()
        keep = load(arrays, case, "mask").bool() if "mask" in case else None
        scores = maxsim(text, image, text_mask=keep, mask_mode="zero", backend=backend)
        close(scores.text_to_image, load(arrays, case, "sim_t2i"))
        close(scores.image_to_text, load(arrays, case, "sim_i2t"))
        if f"{case['name']}/loss" in arrays:
            loss = paper_loss(scores)
            loss.backward()
            close(loss, load(arrays, case, "loss"))
            close(text.grad, load(arrays, case, "grad_text"))
            close(image.grad, load(arrays, case, "grad_image"))
            compared += 1
    assert compared >= 2


def test_pairs_of_the_original(cases):
    cases = [pair for pair in cases if f"{pair[0]['name']}/cosine_pairwise" in pair[1]]
    assert cases
    for case, arrays in cases:
        count = arrays[f"{case['name']}/cosine_pairwise"].shape[0]
        text, image = load(arrays, case, "text")[:count], load(arrays, case, "image")[:count]
        keep = load(arrays, case, "mask")[:count].bool() if "mask" in case else None
        text = text if keep is None else text * keep[..., None]
        scores = maxsim_pairs(l2_normalize(text), l2_normalize(image), mask_mode="zero")
        close(scores.text_to_image, load(arrays, case, "cosine_pairwise"))


def test_the_original_rule_on_data_of_our_own():
    text, image, keep = features(4, 9, 16), features(4, 33, 16, seed=1), mask(4, 9)
    keep[2] = True
    text.requires_grad_(), image.requires_grad_()
    truth = original_similarity(text, image, keep)
    ours = maxsim(text, image, text_mask=keep, mask_mode="zero")
    for mine, true in zip(ours[:2], truth, strict=True):
        torch.testing.assert_close(mine, true)
    theirs = torch.autograd.grad(truth[0].sum() + truth[1].square().sum(), (text, image))
    mine = torch.autograd.grad(
        ours.text_to_image.sum() + ours.image_to_text.square().sum(), (text, image)
    )
    for left, right in zip(mine, theirs, strict=True):
        close(left, right)
