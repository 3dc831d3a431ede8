"""Gradients of maxsim: against autograd through the reference, to the bit where promised."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.makers import MASKS, features, instruction_sets, masks, same_bits
from support.tolerances import assert_no_worse

from bagformer import maxsim, maxsim_pairs, reference
from bagformer.ops.maxsim import saves_argmax


def gradients(function, text, image, **call):
    """Gradients of text and image under random upstream gradients of every score."""
    leaves = text.detach().requires_grad_(), image.detach().requires_grad_()
    scores = [score for score in function(*leaves, **call)[:2] if score is not None]
    upstream = [
        features(*score.shape, seed=50 + place).to(score.dtype)
        for place, score in enumerate(scores)
    ]
    return torch.autograd.grad(scores, leaves, upstream)


def compare(text, image, where, backend="auto", **call):
    own = gradients(reference.maxsim, text, image, **call)
    truth = gradients(reference.maxsim, text.double(), image.double(), **call)
    ours = gradients(maxsim, text, image, backend=backend, **call)
    for name, mine, theirs, true in zip(("text", "image"), ours, own, truth, strict=True):
        assert mine.dtype == text.dtype
        assert_no_worse(mine, theirs, true, f"{where} gradient of {name}")


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("depth", [1, 3, 64, 100])
def test_gradients_at_odd_sizes(isa, depth, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    options = itertools.cycle(
        itertools.product(
            MASKS[:3], reference.MASK_MODES, reference.REDUCTIONS, reference.DIRECTIONS
        )
    )
    for bags, patches in itertools.product((1, 2, 9, 25), (1, 17, 33)):
        text, image = features(3, bags, depth, seed=bags), features(4, patches, depth, seed=patches)
        kind, mode, reduction, directions = next(options)
        text_mask, image_mask = masks(kind, (3, bags), (4, patches))
        call = {"mask_mode": mode, "reduction": reduction, "directions": directions}
        compare(
            text,
            image,
            f"N={bags} P={patches} {kind} {call}",
            text_mask=text_mask,
            image_mask=image_mask,
            **call,
        )


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
def test_every_backend_and_each_form(backend, mode, monkeypatch):
    monkeypatch.setattr("bagformer.ops._maxsim_torch.CHUNK_ELEMENTS", 2000)
    text = features(5, 9, 8, dtype=torch.float64)
    for shape in ((6, 33, 8), (5, 3, 33, 8)):
        image = features(*shape, seed=1, dtype=torch.float64)
        for directions in reference.DIRECTIONS:
            text_mask, image_mask = masks("first_side_all", (5, 9), shape[:-1])
            compare(
                text,
                image,
                f"{shape} {directions}",
                backend=backend,
                text_mask=text_mask,
                image_mask=image_mask,
                mask_mode=mode,
                directions=directions,
            )
    image = features(5, 33, 8, seed=1, dtype=torch.float64)
    truth = gradients(reference.maxsim_pairs, text, image, mask_mode=mode)
    ours = gradients(maxsim_pairs, text, image, mask_mode=mode, backend=backend)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_narrow_gradients_are_rounded_once(dtype, backend):
    text, image = features(6, 9, 32, dtype=dtype), features(4, 33, 32, seed=1, dtype=dtype)
    compare(text, image, str(dtype), backend=backend)


@pytest.mark.parametrize("shape", [(2, 5, 3), (3, 2, 5, 3)])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
def test_gradcheck(shape, mode):
    text = features(3, 4, 3, dtype=torch.float64).requires_grad_()
    image = features(*shape, seed=1, dtype=torch.float64).requires_grad_()
    text_mask, image_mask = masks("random", (3, 4), shape[:-1])
    call = {"text_mask": text_mask, "image_mask": image_mask, "mask_mode": mode}
    assert torch.autograd.gradcheck(
        lambda t, i: maxsim(t, i, reduction="mean", **call)[:2], (text, image)
    )


@pytest.mark.parametrize("shape", [(7, 300, 16), (5, 4, 300, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_recomputed_winners_give_the_same_bits(shape, dtype, monkeypatch):
    text, image = features(5, 25, 16, dtype=dtype), features(*shape, seed=1, dtype=dtype)
    text_mask, image_mask = masks("random", (5, 25), shape[:-1])
    call = {"text_mask": text_mask, "image_mask": image_mask, "mask_mode": "zero"}
    for directions in reference.DIRECTIONS:
        monkeypatch.setenv("BAGFORMER_ARGMAX_BUDGET", str(1 << 30))
        saved = gradients(maxsim, text, image, directions=directions, **call)
        monkeypatch.setenv("BAGFORMER_ARGMAX_BUDGET", "0")
        monkeypatch.setattr("bagformer.ops._maxsim_cpu.RECOMPUTE_BYTES", 5000)
        again = gradients(maxsim, text, image, directions=directions, **call)
        assert all(map(same_bits, saved, again)), directions


def test_the_budget_decides_what_is_saved(monkeypatch):
    # 25 patch indices of 2 bytes and 257 bag indices of 1 byte
    assert saves_argmax(1000, 25, 257, budget=307_000)
    assert not saves_argmax(1000, 25, 257, budget=306_999)
    assert saves_argmax(1000, 25, 257, "text_to_image", budget=50_000)
    assert not saves_argmax(1000, 300, 257, "image_to_text", budget=513_999)
    monkeypatch.setenv("BAGFORMER_ARGMAX_BUDGET", "10")
    assert not saves_argmax(1, 25, 257)
    monkeypatch.setenv("BAGFORMER_ARGMAX_BUDGET", "much")
    with pytest.raises(ValueError, match=r"BAGFORMER_ARGMAX_BUDGET must be .* bytes, got 'much'"):
        saves_argmax(1, 25, 257)


def test_the_same_bits_on_every_run_and_thread_count():
    text, image = features(6, 25, 48), features(5, 65, 48, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results.append(gradients(maxsim, text, image))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(same_bits, results[0], result))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_masked_tokens_get_no_gradient(backend):
    text, image = features(3, 9, 8), features(2, 17, 8, seed=1)
    text_mask, image_mask = masks("first_side_all", (3, 9), (2, 17))
    text[~text_mask], image[~image_mask] = float("nan"), float("inf")
    for mode in reference.MASK_MODES:
        grads = gradients(
            maxsim,
            text,
            image,
            text_mask=text_mask,
            image_mask=image_mask,
            mask_mode=mode,
            backend=backend,
        )
        for grad, keep in zip(grads, (text_mask, image_mask), strict=True):
            assert grad.isfinite().all() and (grad[~keep] == 0).all()


def test_only_the_side_that_asks_gets_a_gradient():
    text, image = features(2, 3, 4).requires_grad_(), features(2, 5, 4, seed=1)
    maxsim(text, image).text_to_image.sum().backward()
    assert text.grad is not None and image.grad is None
    assert not maxsim(text.detach(), image).text_to_image.requires_grad
    assert not maxsim(text, image, return_argmax=True).text_argmax.requires_grad


def test_empty_sides_have_zero_gradients():
    for bags, patches in ((0, 5), (3, 0)):
        text = features(2, bags, 4).requires_grad_()
        image = features(3, patches, 4).requires_grad_()
        scores = maxsim(text, image)
        (scores.text_to_image.sum() + scores.image_to_text.sum()).backward()
        assert not text.grad.any() and not image.grad.any()


def test_a_second_derivative_is_refused():
    text, image = features(2, 3, 4).requires_grad_(), features(2, 5, 4, seed=1)
    score = maxsim(text, image).text_to_image.square().sum()
    (first,) = torch.autograd.grad(score, text, create_graph=True)
    with pytest.raises(RuntimeError, match="bagformer::maxsim is differentiable once"):
        first.sum().backward()
