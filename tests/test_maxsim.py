"""maxsim's scores and winners against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.makers import MASKS, features, instruction_sets, masks
from support.tolerances import assert_no_worse

from bagformer import maxsim, maxsim_pairs, reference

BAGS = (0, 1, 2, 7, 8, 9, 13, 14, 25, 33)
PATCHES = (0, 1, 15, 16, 17, 31, 32, 33, 257)


def einsum_scores(text, image):
    """What a user would write, in the inputs' own dtype; no masks."""
    similarity = torch.einsum("tnd,ipd->tinp", text, image)
    return similarity.amax(3).sum(2), similarity.amax(2).sum(2).t()


def compare(ours, truth, where, own=None):
    """``own``: PyTorch's result in the dtype of ``ours``, where that is not float64."""
    own = truth if own is None else own
    for name, mine, theirs, true in zip(ours._fields, ours, own, truth, strict=True):
        what = f"{where} {name}"
        assert (mine is None) == (true is None), what
        if mine is None:
            continue
        if mine.dtype == torch.int32:
            assert torch.equal(mine, true), what
        else:
            assert_no_worse(mine, theirs, true, what)


@pytest.mark.parametrize("depth", [1, 3, 8, 64, 100, 256])
@pytest.mark.parametrize("isa", instruction_sets())
def test_scores_and_winners_at_odd_sizes(isa, depth, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    options = itertools.cycle(itertools.product(MASKS, reference.MASK_MODES, reference.REDUCTIONS))
    for bags, patches in itertools.product(BAGS, PATCHES):
        text, image = features(3, bags, depth, seed=bags), features(2, patches, depth, seed=patches)
        kind, mode, reduction = next(options)
        text_mask, image_mask = masks(kind, (3, bags), (2, patches))
        call = {
            "text_mask": text_mask,
            "image_mask": image_mask,
            "mask_mode": mode,
            "reduction": reduction,
            "return_argmax": True,
        }
        truth = reference.maxsim(text.double(), image.double(), **call)
        own = reference.maxsim(text, image, **call)
        where = f"N={bags} P={patches} {kind} {mode} {reduction}"
        compare(maxsim(text, image, **call), truth, where, own)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("kind", MASKS)
def test_every_backend_keeps_the_contract(backend, mode, kind, monkeypatch):
    monkeypatch.setattr("bagformer.ops._maxsim_torch.CHUNK_ELEMENTS", 5000)
    text = features(5, 9, 8, dtype=torch.float64)
    image = features(6, 33, 8, seed=1, dtype=torch.float64)
    text_mask, image_mask = masks(kind, (5, 9), (6, 33))
    for directions, reduction in itertools.product(reference.DIRECTIONS, reference.REDUCTIONS):
        call = {
            "text_mask": text_mask,
            "image_mask": image_mask,
            "mask_mode": mode,
            "directions": directions,
            "reduction": reduction,
            "return_argmax": True,
        }
        truth = reference.maxsim(text, image, **call)
        compare(maxsim(text, image, backend=backend, **call), truth, f"{directions} {reduction}")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_worse_than_pytorch_in_each_dtype(dtype, backend):
    text, image = features(4, 25, 256, dtype=dtype), features(3, 257, 256, seed=1, dtype=dtype)
    truth = einsum_scores(text.double(), image.double())
    own = einsum_scores(text, image)
    ours = maxsim(text, image, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mine, theirs, true in zip(ours, own, truth, strict=False):
        assert mine.dtype == wide
        assert_no_worse(mine, theirs, true, str(dtype))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", MASKS)
def test_candidates_and_pairs(kind, backend):
    text = features(4, 9, 16, dtype=torch.float64)
    image = features(4, 3, 17, 16, seed=1, dtype=torch.float64)
    text_mask, image_mask = masks(kind, (4, 9), (4, 3, 17))
    call = {"text_mask": text_mask, "return_argmax": True, "mask_mode": "zero"}
    truth = reference.maxsim(text, image, image_mask=image_mask, **call)
    ours = maxsim(text, image, image_mask=image_mask, backend=backend, **call)
    compare(ours, truth, "candidates")
    pair_mask = None if image_mask is None else image_mask[:, 1]
    truth = reference.maxsim_pairs(text, image[:, 1], image_mask=pair_mask, **call)
    ours = maxsim_pairs(text, image[:, 1], image_mask=pair_mask, backend=backend, **call)
    compare(ours, truth, "pairs")


def test_example_by_hand():
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    image = torch.tensor([[[0.5, 0.0], [0.0, 0.25], [-1.0, -1.0]]])
    scores = maxsim(text, image, return_argmax=True)
    assert scores.text_to_image.tolist() == [[0.75]]
    assert scores.image_to_text.tolist() == [[0.5 + 0.25 - 1.0]]
    assert scores.text_argmax.tolist() == [[[0, 1]]]
    assert scores.image_argmax.tolist() == [[[0, 1, 0]]]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 4)] * 2, st.integers(0, 30), st.integers(0, 70)),
    depth=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    keep=st.floats(0, 1),
    mode=st.sampled_from(reference.MASK_MODES),
    reduction=st.sampled_from(reference.REDUCTIONS),
    small_integers=st.booleans(),
)
def test_any_shape_and_mask(sizes, depth, seed, keep, mode, reduction, small_integers):
    texts, images, bags, patches = sizes
    text = features(texts, bags, depth, seed=seed, dtype=torch.float64)
    image = features(images, patches, depth, seed=seed + 1, dtype=torch.float64)
    if small_integers:  # exact arithmetic with many ties
        text, image = text.round(), image.round()
    draw = torch.Generator().manual_seed(seed)
    call = {
        "text_mask": torch.rand(texts, bags, generator=draw) < keep,
        "image_mask": torch.rand(images, patches, generator=draw) < keep,
        "mask_mode": mode,
        "reduction": reduction,
        "return_argmax": True,
    }
    compare(maxsim(text, image, **call), reference.maxsim(text, image, **call), str(sizes))
    if small_integers:
        narrow = maxsim(text.float(), image.float(), **call)
        own = reference.maxsim(text.float(), image.float(), **call)
        compare(narrow, reference.maxsim(text, image, **call), str(sizes), own)
