"""Images stored in eight bits: what is stored, the scores, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, instruction_sets, masks, same_bits
from support.tolerances import TOLERANCES, relative_error

from bagformer import (
    QuantizedFeatures,
    explain_backend,
    maxsim,
    maxsim_quantized,
    quantize_features,
    reference,
)

FORMATS = tuple(reference.QUANTIZED_DTYPES)
BACKENDS = ("cpu", "torch", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_STEP = {"int8": 0.5 / 127, "fp8_e4m3": 16 / 448}  # of the largest magnitude


def stored(*shape: int, dtype: str = "int8", seed: int = 1) -> QuantizedFeatures:
    return quantize_features(features(*shape, seed=seed), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", FLOATS)
def test_each_patch_keeps_its_largest_value_and_half_a_step(dtype, source):
    image = features(3, 7, 20, dtype=source) * torch.logspace(-6, 4, 7)[:, None].to(source)
    made = quantize_features(image, dtype)
    assert made.values.dtype == reference.QUANTIZED_DTYPES[dtype][0]
    assert made.scales.dtype == torch.float32 and len(made) == 3
    wide, peak = image.double(), image.double().abs().amax(-1, keepdim=True)
    error = (made.dequantize(torch.float64) - wide).abs() / peak
    assert error.max() <= HALF_STEP[dtype] * (1 + 1e-6)
    largest = torch.where(wide.abs() == peak, error, 0)
    assert largest.max() < 1e-6, "the largest magnitude of a patch is stored exactly"


@pytest.mark.parametrize("dtype", FORMATS)
def test_patches_without_a_scale(dtype):
    image = torch.zeros(1, 5, 4)
    image[0, 1, 2], image[0, 2, 0] = float("nan"), float("-inf")
    image[0, 3], image[0, 4, 1] = 1e-45, -3e38
    made = quantize_features(image, dtype)
    assert made.scales[0].isnan().tolist() == [False, True, True, False, False]
    assert made.scales[0, [0, 3]].tolist() == [0.0, 0.0]
    assert (made.values.float()[0, :4] == 0).all() and made.dequantize().isfinite()[0, 4].all()
    scores = maxsim_quantized(torch.ones(1, 1, 4), made)
    assert scores.text_to_image.isnan().all()
    keep = ~made.scales.isnan()
    assert maxsim_quantized(torch.ones(1, 1, 4), made, image_mask=keep).text_to_image == 0


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", FLOATS)
def test_every_instruction_set_agrees_with_the_reference(isa, source, dtype, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    for width in (1, 37, 64, 96):
        text = features(3, 14, width, dtype=source)
        image = stored(4, 67, width, dtype=dtype)
        got = maxsim_quantized(text, image, return_argmax=True, backend="cpu")
        want = reference.maxsim_quantized(
            text.double(), image.values, image.scales, return_argmax=True
        )
        assert got.text_to_image.dtype == reference.accumulation_dtype(source)
        for ours, true in zip(got[:2], want[:2], strict=True):
            allowed = TOLERANCES[torch.float64 if source == torch.float64 else torch.float32]
            assert relative_error(ours, true) <= allowed
        assert torch.equal(got.text_argmax, want.text_argmax)
        assert torch.equal(got.image_argmax, want.image_argmax)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", FLOATS)
def test_short_texts_that_share_tiles_have_their_own_bits(isa, source, dtype, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    text, image = features(9, 10, 24, dtype=source), stored(3, 37, 24, dtype=dtype)
    keep = torch.arange(10) < torch.tensor([3, 0, 4, 10, 1, 5, 6, 2, 7])[:, None]
    for argmax in (False, True):
        options = {"return_argmax": argmax, "mask_mode": "zero", "backend": "cpu"}
        shared = maxsim_quantized(text, image, text_mask=keep, **options)
        for i in range(9):
            alone = maxsim_quantized(text[[i]], image, text_mask=keep[[i]], **options)
            assert same_bits(shared.text_to_image[[i]], alone.text_to_image)
            assert same_bits(shared.image_to_text[:, [i]], alone.image_to_text)
    want = reference.maxsim_quantized(
        text.double(), image.values, image.scales, text_mask=keep, mask_mode="zero"
    )
    allowed = TOLERANCES[torch.float64 if source == torch.float64 else torch.float32]
    assert relative_error(shared.text_to_image, want.text_to_image) <= allowed
    assert relative_error(shared.image_to_text, want.image_to_text) <= allowed


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_every_fp8_code_is_read_right(isa, source, monkeypatch):
    """A patch for each code, subnormal numbers and NaN among them; as many features as lanes."""
    monkeypatch.setenv("BAGFORMER_CPU_ISA", isa)
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.zeros(256, 1, 32, dtype=torch.uint8)
    values[:, 0, 5] = codes
    image = QuantizedFeatures(values.view(torch.float8_e4m3fn), torch.full((256, 1), 0.5))
    text = torch.ones(1, 1, 32, dtype=source)
    got = maxsim_quantized(text, image, backend="cpu").text_to_image[0]
    want = codes.view(torch.float8_e4m3fn).float() / 2
    assert got.isnan().sum() == 2 and torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["none", "random", "first_side_all", "all"])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("candidates", [False, True])
def test_masks_directions_and_forms(backend, kind, mode, candidates, monkeypatch):
    monkeypatch.setattr("bagformer.ops.maxsim_quantized.CHUNK_ELEMENTS", 1000)
    lead = (3, 4) if candidates else (4,)
    text, image = features(3, 5, 12), stored(*lead, 9, 12)
    keep = masks(kind, (3, 5), (*lead, 9))
    options = {"mask_mode": mode, "reduction": "mean", "return_argmax": True}
    for directions in reference.DIRECTIONS:
        options["directions"] = directions
        given = {"text_mask": keep[0], "image_mask": keep[1], **options}
        got = maxsim_quantized(text, image, backend=backend, **given)
        want = reference.maxsim(text.double(), image.dequantize(torch.float64), **given)
        for ours, true in zip(got, want, strict=True):
            assert (ours is None) == (true is None)
            if true is not None:
                assert relative_error(ours, true) <= TOLERANCES[torch.float32]


def test_a_pair_has_the_same_bits_in_any_company():
    text, image = features(4, 6, 40, dtype=torch.bfloat16), stored(5, 33, 40)
    scores = maxsim_quantized(text, image, backend="cpu")
    one = maxsim_quantized(text[2:3], image[3:4], backend="cpu")
    assert same_bits(scores.text_to_image[2:3, 3:4], one.text_to_image)
    listed = QuantizedFeatures(
        image.values[None].expand(4, -1, -1, -1), image.scales[None].expand(4, -1, -1)
    )
    again = maxsim_quantized(text, listed, backend="cpu")
    assert same_bits(scores.text_to_image, again.text_to_image)
    assert same_bits(scores.image_to_text.t().contiguous(), again.image_to_text)


def test_strides_are_read_as_they_are():
    text, image = features(2, 3, 16), stored(6, 10, 16)
    turned = QuantizedFeatures(
        image.values.transpose(1, 2).contiguous().transpose(1, 2), image.scales.t().contiguous().t()
    )
    for view, plain in (
        (turned, image),
        (image[::2], QuantizedFeatures(image.values[::2].clone(), image.scales[::2].clone())),
    ):
        for ours, true in zip(
            maxsim_quantized(text, view)[:2], maxsim_quantized(text, plain)[:2], strict=True
        ):
            assert relative_error(ours, true) < 1e-6


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_score(shape, backend):
    text = features(2, 4, shape[-1])
    scores = maxsim_quantized(text, stored(*shape), backend=backend)
    assert scores.text_to_image.shape == (2, shape[0]) and not scores.text_to_image.any()


def test_bytes_slices_and_types():
    image = stored(5, 10, 16)
    assert image.nbytes == 5 * 10 * (16 + 4) and len(image[1:3]) == 2
    assert image[2].values.shape == (10, 16) and image[torch.tensor([4, 0])].scales.shape == (2, 10)
    assert image.to("cpu").values.dtype == torch.int8
    assert image.dequantize(torch.bfloat16).dtype == torch.bfloat16
    for index in ((0, 0), (slice(None), slice(0, 2)), (Ellipsis, 0)):
        with pytest.raises(IndexError, match="leave patches and features"):
            image[index]


def test_what_is_refused():
    text, image = features(2, 3, 8), stored(4, 5, 8)
    with pytest.raises(TypeError, match=r"image must be QuantizedFeatures .*got Tensor"):
        maxsim_quantized(text, image.dequantize())
    with pytest.raises(TypeError, match=r"image must be a torch.Tensor, got QuantizedFeatures"):
        maxsim(text, image)
    with pytest.raises(ValueError, match=r"feature size D of text \(3\), got 8"):
        maxsim_quantized(features(2, 3, 3), image)
    with pytest.raises(ValueError, match="Nt = 2"):
        maxsim_quantized(text, stored(3, 4, 5, 8))
    with pytest.raises(ValueError, match=r"\[Ni, P, D\] or \[Nt, K, P, D\]"):
        maxsim_quantized(text, image[0])
    with pytest.raises(RuntimeError, match=r"text requires one: .*no_grad"):
        maxsim_quantized(text.clone().requires_grad_(), image)
    learned = QuantizedFeatures(image.values, image.scales.clone().requires_grad_())
    for asker in (text, quantize_features(text)):
        with pytest.raises(RuntimeError, match=r"image\.scales requires one"):
            maxsim_quantized(asker, learned)
    with pytest.raises(RuntimeError, match=r"text\.scales requires one"):
        maxsim_quantized(learned, image)
    with torch.no_grad():
        maxsim_quantized(learned, learned)
        maxsim_quantized(text.clone().requires_grad_(), image)
    with pytest.raises(ValueError, match=r"image_mask must have shape \[4, 5\]"):
        maxsim_quantized(text, image, image_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="dtype must be one of int8, fp8_e4m3; got 'int4'"):
        quantize_features(image.dequantize(), "int4")
    with pytest.raises(TypeError, match=r"values must be int8 or float8_e4m3fn, got torch.uint8"):
        QuantizedFeatures(image.values.to(torch.uint8), image.scales)
    with pytest.raises(TypeError, match="scales must be float32"):
        QuantizedFeatures(image.values, image.scales.double())
    with pytest.raises(ValueError, match=r"scales must have shape \[4, 5\].*got \[4\]"):
        QuantizedFeatures(image.values, image.scales[:, 0])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck(dtype, backend):
    image = stored(2, 5, 8, dtype=dtype)
    keep = masks("random", (3, 4), (2, 5))
    rest = ("zero", "both", "mean", True, backend)
    arguments = (features(3, 4, 8), image.values, image.scales, *keep, *rest)
    tests = ["test_autograd_registration", "test_faketensor"]
    if dtype == "int8":  # the others compare inputs by arithmetic that torch lacks for float8
        tests += ["test_schema", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.bagformer.maxsim_quantized, arguments, test_utils=tests)


def test_compiles_whole_and_says_its_backend():
    def best(text, image):
        return maxsim_quantized(text * 2, image).text_to_image.max()

    compiled = torch.compile(best, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5):
        text, image = features(count, 3, 8), stored(count + 1, 4, 8)
        assert torch.allclose(compiled(text, image), best(text, image))
    assert "backend 'cpu'" in explain_backend("maxsim_quantized", text, image.values)
