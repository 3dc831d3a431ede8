"""maxsim_topk: the full matrix's answer, without the matrix."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.makers import features, masks, same_bits
from support.memory import Largest, only_linux, printed_by

from bagformer import maxsim, maxsim_topk, reference

ROOM = importlib.import_module("bagformer.ops.maxsim_topk")


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_against_the_reference(direction, k, backend):
    text = features(11, 5, 8, dtype=torch.float64)
    image = features(9, 17, 8, seed=1, dtype=torch.float64)
    text_mask, image_mask = masks("first_side_all", (11, 5), (9, 17))
    call = {"text_mask": text_mask, "image_mask": image_mask, "direction": direction}
    truth = reference.maxsim_topk(text, image, k, reduction="mean", **call)
    ours = maxsim_topk(text, image, k, reduction="mean", backend=backend, **call)
    assert torch.equal(ours.indices, truth.indices)
    torch.testing.assert_close(ours.scores, truth.scores)


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_the_same_bits_whatever_the_chunks(direction, monkeypatch):
    # few distinct features, so that scores tie, and one image that is broken
    text, image = features(3, 4, 6).repeat(5, 1, 1), features(4, 20, 6, seed=1).repeat(6, 1, 1)
    image[13, 2, 1] = float("nan")
    whole = reference.maxsim_topk(text, image, 10, direction=direction)
    results = []
    for rows, columns in ((2048, 1024), (7, 5), (1, 1), (4, 24)):
        monkeypatch.setattr(ROOM, "ROWS", rows)
        monkeypatch.setattr(ROOM, "COLUMNS", columns)
        results.append(maxsim_topk(text, image, 10, direction=direction))
    for result in results[1:]:
        assert all(map(same_bits, results[0], result))
    if direction == "text_to_image":
        assert (results[0].indices[:, 0] == 13).all()
    scores = getattr(maxsim(text, image), direction)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(results[0].indices, order[:, :10])
    torch.testing.assert_close(results[0].scores, values[:, :10], equal_nan=True, rtol=0, atol=0)
    assert results[0].indices.shape == whole.indices.shape


def test_equal_scores_come_in_the_order_of_their_ids():
    text, image = torch.ones(2, 3, 4), torch.ones(50, 5, 4)
    image[20] *= 2
    answer = maxsim_topk(text, image, 5)
    assert answer.indices.tolist() == [[20, 0, 1, 2, 3]] * 2


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_gradients(direction, monkeypatch):
    monkeypatch.setattr(ROOM, "ROWS", 2)
    monkeypatch.setattr(ROOM, "COLUMNS", 3)
    text, image = features(5, 3, 4).double(), features(4, 6, 4, seed=1).double()
    upstream = features(5 if direction == "text_to_image" else 4, 2, seed=2).double()
    results = []
    for function in (maxsim_topk, reference.maxsim_topk):
        leaves = text.clone().requires_grad_(), image.clone().requires_grad_()
        scores = function(*leaves, 2, direction=direction, mask_mode="zero").scores
        results.append(torch.autograd.grad(scores, leaves, upstream))
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true)


def test_a_second_derivative_is_refused():
    text, image = features(2, 3, 4).requires_grad_(), features(3, 5, 4, seed=1)
    score = maxsim_topk(text, image, 1).scores.square().sum()
    (first,) = torch.autograd.grad(score, text, create_graph=True)
    with pytest.raises(RuntimeError, match="bagformer::maxsim_topk is differentiable once"):
        first.sum().backward()


def test_never_a_matrix_of_all_scores(monkeypatch):
    """The largest tensor that exists at any time inside the operator."""
    monkeypatch.setattr(ROOM, "ROWS", 100)
    monkeypatch.setattr(ROOM, "COLUMNS", 40)
    text, image = features(500, 1, 2), features(400, 1, 2, seed=1)
    with Largest() as seen:
        ROOM._run(text, image, None, None, 5, "text_to_image", "exclude", "sum", "fp32", "auto")
    assert 500 * 5 <= seen.found <= 100 * (40 + 5)


WRONG = [
    ({"k": 0}, ValueError, "k must be at least 1 and at most Ni = 5, got 0"),
    ({"k": 6}, ValueError, "k must be at least 1 and at most Ni = 5, got 6"),
    ({"k": 3, "direction": "image_to_text"}, ValueError, "at most Nt = 2, got 3"),
    ({"k": 2.0}, TypeError, "k must be an int, got float"),
    ({"k": True}, TypeError, "k must be an int, got bool"),
    ({"direction": "both"}, ValueError, "direction must be one of text_to_image, image_to_text"),
    ({"mask_mode": "none"}, ValueError, "mask_mode must be one of exclude, zero"),
    ({"image": features(2, 3, 6, 4)}, ValueError, r"image must have shape \[Ni, P, D\]"),
]


PEAK = """
import torch, bagformer
from support.memory import forget_peak, high_water_mb

torch.set_num_threads(1)
text, image = torch.randn(500, 1, 4), torch.randn(1, 2, 4)
bagformer.maxsim_topk(text, image.expand(2000, -1, -1), 10)
before = forget_peak()
bagformer.maxsim_topk(text, image.expand(80000, -1, -1), 10)
print(high_water_mb() - before)
"""


@only_linux
def test_memory_does_not_grow_with_the_collection():
    """All scores would take 153 MB; a chunk of them takes 2 MB, and the allocator what it likes."""
    assert float(printed_by(PEAK)) < 50


@pytest.mark.parametrize("wrong,error,message", WRONG)
def test_wrong_arguments(wrong, error, message):
    call = {"text": features(2, 3, 4), "image": features(5, 6, 4), "k": 1, **wrong}
    with pytest.raises(error, match=message):
        maxsim_topk(call.pop("text"), call.pop("image"), call.pop("k"), **call)
