"""Texts and images both in int8: one right answer, to the bit, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, instruction_sets, masks, same_bits
from support.tolerances import relative_error
from torch import Tensor

from bagformer import (
    QuantizedFeatures,
    explain_backend,
    maxsim,
    maxsim_quantized,
    quantize_features,
    reference,
)
from bagformer.ops import _maxsim_int8
from bagformer.ops.backend import choose_backend

INF = float("inf")
BACKENDS = ("cpu", "torch", "reference")
# texts, bags, images, patches, features: whole and broken tiles, panels and words
SHAPES = [(3, 14, 4, 67, 1), (2, 25, 3, 257, 64), (3, 7, 2, 33, 101), (1, 1, 2, 16, 130),
          (1, 14, 3, 67, 64), (1, 40, 4, 27, 100), (1, 64, 2, 5, 4)]  # fmt: skip


def stored(*shape: int, seed: int = 1) -> QuantizedFeatures:
    return quantize_features(features(*shape, seed=seed))


def pair_of(shape, candidates: int = 0) -> tuple[QuantizedFeatures, QuantizedFeatures]:
    n_texts, n_bags, n_images, n_patches, width = shape
    lead = (n_texts, candidates) if candidates else (n_images,)
    return stored(n_texts, n_bags, width, seed=7), stored(*lead, n_patches, width)


def similarities(text: QuantizedFeatures, image: QuantizedFeatures) -> Tensor:
    """The contract once more, in integers: ``[Nt, Ni, N, P]``."""
    sums = text.values.long()[:, None] @ image.values.long().transpose(-1, -2)
    return sums.float() * (text.scales[:, None, :, None] * image.scales[..., None, :])


def in_order(best: Tensor) -> Tensor:
    """The sum over the last axis as the C++ kernels order it: 16 partial sums, then a tree."""
    padded = torch.nn.functional.pad(best, (0, -best.shape[-1] % 16))
    partial = torch.zeros(*best.shape[:-1], 16)
    for part in padded.split(16, dim=-1):
        partial = partial + part
    while partial.shape[-1] > 1:
        half = partial.shape[-1] // 2
        partial = partial[..., :half] + partial[..., half:]
    return partial[..., 0]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_same_bits(isa, shape, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = pair_of(shape)
    got = maxsim_quantized(text, image, return_argmax=True, backend="cpu")
    plain = maxsim_quantized(text, image, backend="cpu")
    exact = similarities(text, image)
    assert same_bits(got.text_to_image, in_order(exact.amax(-1)))
    assert same_bits(got.image_to_text, in_order(exact.amax(-2)).t())
    assert same_bits(got.text_to_image, plain.text_to_image)
    assert same_bits(got.image_to_text, plain.image_to_text)
    want = maxsim_quantized(text, image, return_argmax=True, backend="reference")
    assert torch.equal(got.text_argmax, want.text_argmax)
    assert torch.equal(got.image_argmax, want.image_argmax)
    assert relative_error(got.text_to_image, want.text_to_image) < 1e-6


# texts, bags, images, patches, features: more than a sweep over an image takes, and than are packed
# at once
@pytest.mark.parametrize("shape", [(90, 25, 2, 40, 256), (90, 100, 2, 3, 4096)])
@pytest.mark.parametrize("isa", instruction_sets())
def test_many_texts(isa, shape, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = pair_of(shape)
    text.scales[50, 1] = float("nan")  # of one text alone
    text.scales[70:] *= -1
    keep = masks("random", text.scales.shape, image.scales.shape)[0]
    for argmax in (False, True):
        options = {"return_argmax": argmax, "backend": "cpu"}
        got = maxsim_quantized(text, image, text_mask=keep, **options)
        for i in (0, 30, 49, 50, 51, 89):
            alone = maxsim_quantized(text[i : i + 1], image, text_mask=keep[[i]], **options)
            assert same_bits(got.text_to_image[[i]], alone.text_to_image)
            assert same_bits(got.image_to_text[:, [i]], alone.image_to_text)
            if argmax:
                assert torch.equal(got.text_argmax[[i]], alone.text_argmax)
                assert torch.equal(got.image_argmax[:, [i]], alone.image_argmax)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("width", [64, 65])
def test_numbers_that_lie_anywhere(isa, texts, width, monkeypatch):
    """Strides along every axis, scales too, and repeated tokens."""
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = pair_of((texts, 14, 3, 37, width))
    want = maxsim_quantized(text, image, backend="cpu")

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    def apart(x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(-1)], dim=-1)[..., 0]

    for change in (turned, apart):
        sides = [QuantizedFeatures(change(x.values), change(x.scales)) for x in (text, image)]
        assert sides[1].values.stride(-1) != 1
        got = maxsim_quantized(*sides, backend="cpu")
        assert all(map(same_bits, got[:2], want[:2]))
    one = QuantizedFeatures(
        image.values[:, :1].expand(-1, 37, -1), image.scales[:, :1].expand(-1, 37)
    )
    copied = QuantizedFeatures(one.values.contiguous(), one.scales.contiguous())
    for argmax in (False, True):
        got, want = (maxsim_quantized(text, x, return_argmax=argmax) for x in (one, copied))
        assert all(map(same_bits, got[:2], want[:2]))


@pytest.mark.parametrize("isa", instruction_sets())
def test_similarities_of_minus_infinity_behind_other_texts(isa, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = pair_of((90, 25, 2, 40, 256))
    image.values.copy_(image.values.abs().clamp_min(1).neg())  # winners of others lie anywhere
    image.scales.fill_(1e30)
    text.values[80] = 1
    text.scales[80] = 1e30
    got = maxsim_quantized(text, image, return_argmax=True, backend="cpu")
    assert (got.text_to_image[80] == -INF).all() and (got.image_to_text[:, 80] == -INF).all()
    assert (got.text_argmax[80] == 0).all() and (got.image_argmax[:, 80] == 0).all()


@pytest.mark.parametrize("isa", instruction_sets())
def test_single_tokens_have_the_reference_to_the_bit(isa, monkeypatch):
    """With one bag and one patch nothing is summed but the integers."""
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = stored(9, 1, 1031, seed=3), stored(11, 1, 1031)
    got = maxsim_quantized(text, image, backend="cpu")
    for backend in ("torch", "reference"):
        want = maxsim_quantized(text, image, backend=backend)
        assert same_bits(got.text_to_image, want.text_to_image)
        assert same_bits(got.image_to_text, want.image_to_text)


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_largest_sums_fit(isa, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    width = _maxsim_int8.MAX_FEATURES
    rows = torch.tensor([-128, 127], dtype=torch.int8)[:, None].expand(2, width)
    for text_row in range(2):
        for image_row in range(2):
            sides = [
                QuantizedFeatures(rows[None, [row]], torch.ones(1, 1))
                for row in (text_row, image_row)
            ]
            product = int(rows[text_row, 0]) * int(rows[image_row, 0]) * width
            got = maxsim_quantized(*sides, backend="cpu").text_to_image
            assert got.item() == torch.tensor(product).float().item()


@pytest.mark.parametrize("isa", instruction_sets())
def test_ties_go_to_the_lowest_index(isa, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    generator = torch.Generator().manual_seed(5)
    values = [
        torch.randint(-1, 2, shape, generator=generator).to(torch.int8)
        for shape in ((2, 30, 4), (3, 70, 4))
    ]
    text, image = (QuantizedFeatures(x, torch.ones(x.shape[:-1])) for x in values)
    keep = masks("random", (2, 30), (3, 70))
    for mode in reference.MASK_MODES:
        options = {"text_mask": keep[0], "image_mask": keep[1], "mask_mode": mode}
        got = maxsim_quantized(text, image, return_argmax=True, **options, backend="cpu")
        want = maxsim_quantized(text, image, return_argmax=True, **options, backend="reference")
        # whole numbers: every order of a sum gives the same bits
        assert all(same_bits(*fields) for fields in zip(got, want, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_company_and_form_change_no_bit(threads):
    text, image = pair_of((5, 14, 4, 67, 48))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = maxsim_quantized(text, image, backend="cpu")
        one = maxsim_quantized(text[2:3], image[3:4], backend="cpu")
        listed = QuantizedFeatures(
            image.values[None].expand(5, -1, -1, -1), image.scales[None].expand(5, -1, -1)
        )
        again = maxsim_quantized(text, listed, backend="cpu")
    finally:
        torch.set_num_threads(before)
    exact = similarities(text, image)
    assert same_bits(scores.text_to_image, in_order(exact.amax(-1)))
    assert same_bits(scores.text_to_image[2:3, 3:4], one.text_to_image)
    assert same_bits(scores.text_to_image, again.text_to_image)
    assert same_bits(scores.image_to_text.t(), again.image_to_text)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kind", ["none", "random", "first_side_all", "all"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("candidates", [0, 4])
def test_one_text_reads_images_where_they_lie(isa, kind, mode, candidates, monkeypatch):
    """With an argmax they are packed, which must change no bit of a score."""
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    texts = 3 if candidates else 1
    text, image = pair_of((texts, 37, 4, 30, 72), candidates)
    text.scales[0, 3], image.scales[..., 2, 5] = float("nan"), float("nan")
    keep = masks(kind, text.scales.shape, image.scales.shape)
    if kind == "random":
        keep[0][0, 3] = False
    options = {"text_mask": keep[0], "image_mask": keep[1], "mask_mode": mode, "backend": "cpu"}
    packed = maxsim_quantized(text, image, return_argmax=True, **options)
    both = maxsim_quantized(text, image, **options)
    assert same_bits(both.text_to_image, packed.text_to_image)
    assert same_bits(both.image_to_text, packed.image_to_text)
    for direction in reference.DIRECTIONS[1:]:
        one = maxsim_quantized(text, image, directions=direction, **options)
        assert same_bits(getattr(one, direction), getattr(packed, direction))
    scattered = QuantizedFeatures(
        image.values.repeat_interleave(2, dim=-2)[..., ::2, :], image.scales
    )
    assert same_bits(maxsim_quantized(text, scattered, **options).text_to_image, both.text_to_image)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "random", "first_side_all", "all"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("candidates", [0, 4])
def test_masks_directions_and_forms(backend, kind, mode, candidates, monkeypatch):
    monkeypatch.setattr(_maxsim_int8, "CHUNK_ELEMENTS", 100)
    text, image = pair_of((3, 5, 4, 9, 12), candidates)
    keep = masks(kind, (3, 5), image.scales.shape)
    for directions in reference.DIRECTIONS:
        given = {
            "text_mask": keep[0], "image_mask": keep[1], "mask_mode": mode,
            "directions": directions, "reduction": "mean", "return_argmax": True,
        }  # fmt: skip
        got = maxsim_quantized(text, image, backend=backend, **given)
        want = reference.maxsim(
            text.dequantize(torch.float64), image.dequantize(torch.float64), **given
        )
        for ours, true in zip(got, want, strict=True):
            assert (ours is None) == (true is None)
            if true is not None:
                assert ours.shape == true.shape and relative_error(ours, true) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_token_reaches_its_own_pairs_alone(backend):
    text, image = features(3, 4, 8), features(4, 35, 8, seed=1)
    text[1, 2, 3], image[2, 34, 0] = float("nan"), float("inf")
    stored_text, stored_image = quantize_features(text), quantize_features(image)
    scores = maxsim_quantized(stored_text, stored_image, return_argmax=True, backend=backend)
    broken = torch.zeros(3, 4, dtype=torch.bool)
    broken[1], broken[:, 2] = True, True
    assert torch.equal(scores.text_to_image.isnan(), broken)
    assert torch.equal(scores.image_to_text.isnan(), broken.t())
    assert (scores.text_argmax[0, 2] == 34).all() and (scores.image_argmax[0, 1] == 2).all()
    keep = {"text_mask": ~stored_text.scales.isnan(), "image_mask": ~stored_image.scales.isnan()}
    whole = maxsim_quantized(stored_text, stored_image, backend=backend, **keep)
    assert not whole.text_to_image.isnan().any() and not whole.image_to_text.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 3, 0, 4, 8),
                                   (2, 3, 4, 0, 8), (2, 3, 4, 5, 0)])  # fmt: skip
def test_nothing_to_score(shape, backend):
    text, image = pair_of(shape)
    scores = maxsim_quantized(text, image, return_argmax=True, backend=backend)
    assert scores.text_to_image.shape == (shape[0], shape[2])
    assert scores.image_to_text.shape == (shape[2], shape[0])
    assert not scores.text_to_image.any() and not scores.image_to_text.any()
    want = maxsim_quantized(text, image, return_argmax=True, backend="reference")
    assert torch.equal(scores.text_argmax, want.text_argmax)
    assert torch.equal(scores.image_argmax, want.image_argmax)


@pytest.mark.parametrize("isa", instruction_sets())
def test_strides_are_read_as_they_are(isa, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = pair_of((2, 6, 6, 40, 128))

    def turned(x: QuantizedFeatures) -> QuantizedFeatures:
        values = x.values.transpose(1, 2).contiguous().transpose(1, 2)
        return QuantizedFeatures(values, x.scales.t().contiguous().t())

    def spread(x: QuantizedFeatures) -> QuantizedFeatures:
        doubled = torch.repeat_interleave(x.values, 2, dim=1)[:, ::2]
        return QuantizedFeatures(doubled, torch.repeat_interleave(x.scales, 2, dim=1)[:, ::2])

    want = maxsim_quantized(text, image, backend="cpu")
    for view in (turned, spread):
        got = maxsim_quantized(view(text), view(image), backend="cpu")
        assert same_bits(got.text_to_image, want.text_to_image)
        assert same_bits(got.image_to_text, want.image_to_text)


def test_what_is_lost_is_lost_in_storing():
    text, image = features(4, 9, 64), features(5, 40, 64, seed=1)
    scores = maxsim_quantized(quantize_features(text), quantize_features(image)).text_to_image
    assert relative_error(scores, maxsim(text, image).text_to_image) < 0.01


def test_what_is_refused():
    text, image = stored(2, 3, 8), stored(4, 5, 8)
    fp8 = quantize_features(features(2, 3, 8), "fp8_e4m3")
    with pytest.raises(TypeError, match=r"text must be stored as int8 .*got torch.float8_e4m3fn"):
        maxsim_quantized(fp8, image)
    with pytest.raises(TypeError, match=r"image must be stored as int8 .*got torch.float8_e4m3fn"):
        maxsim_quantized(text, fp8)
    with pytest.raises(TypeError, match=r"image must be QuantizedFeatures .*got Tensor"):
        maxsim_quantized(text, image.dequantize())
    with pytest.raises(ValueError, match=r"text must have shape \[Nt, N, D\], got \[1, 2, 3, 8\]"):
        maxsim_quantized(stored(1, 2, 3, 8), image)
    with pytest.raises(ValueError, match=r"feature size D of text \(3\), got 8"):
        maxsim_quantized(stored(2, 3, 3), image)
    with pytest.raises(ValueError, match="Nt = 2"):
        maxsim_quantized(text, stored(3, 4, 5, 8))
    with pytest.raises(ValueError, match=r"text_mask must have shape \[2, 3\]"):
        maxsim_quantized(text, image, text_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="image_mask must be bool"):
        maxsim_quantized(text, image, image_mask=torch.ones(4, 5))
    wide = [QuantizedFeatures(torch.zeros(1, 1, 131072, dtype=torch.int8), torch.ones(1, 1))] * 2
    with pytest.raises(ValueError, match=r"at most 131,071 features D.* got 131,072"):
        maxsim_quantized(*wide)


def test_no_triton_kernel_takes_int8_texts(monkeypatch):
    """A GPU runs plain PyTorch unless triton is asked for, which is an error."""
    monkeypatch.setattr("bagformer.ops._triton.available", lambda: True)
    monkeypatch.delenv("BAGFORMER_BACKEND", raising=False)
    choice = choose_backend("maxsim_quantized", torch.device("cuda"), torch.int8)
    assert choice.backend == "torch" and "got torch.int8" in choice.reason
    with pytest.raises(
        ValueError, match=r"backend='triton': .*bfloat16 and float16, got torch.int"
    ):
        choose_backend("maxsim_quantized", torch.device("cuda"), torch.int8, "triton")
    assert "backend 'cpu'" in explain_backend("maxsim_quantized", stored(1, 2, 8).values)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck(backend):
    text, image = pair_of((3, 4, 2, 5, 8))
    keep = masks("random", (3, 4), (2, 5))
    rest = ("zero", "both", "mean", True, backend)
    arguments = (text.values, image.values, text.scales, image.scales, *keep, *rest)
    torch.library.opcheck(torch.ops.bagformer.maxsim_int8, arguments)


def test_compiles_whole():
    def best(text, image):
        return maxsim_quantized(text, image).text_to_image.max()

    compiled = torch.compile(best, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5):
        text, image = stored(count, 3, 8), stored(count + 1, 4, 8)
        assert torch.equal(compiled(text, image), best(text, image))
