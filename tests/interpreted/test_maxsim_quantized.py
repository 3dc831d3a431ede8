"""The kernel on eight-bit images against the reference: formats, dtypes, masks, forms, edges."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from bagformer.kernels import maxsim_quantized as kernel
from bagformer.kernels import scoring
from bagformer.kernels.maxsim_quantized import exactly
from support.judging import judge

from bagformer import maxsim_quantized, quantize_features, reference

FORMATS = tuple(reference.QUANTIZED_DTYPES)
# texts, bags, images, patches, width
SHAPES = [(1, 1, 1, 1, 8), (5, 9, 3, 33, 96), (2, 3, 2, 18, 37)]


def make(shape, device, dtype, stored, candidates=0):
    n_texts, n_bags, n_images, n_patches, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    lead = (n_texts, candidates) if candidates else (n_images,)
    text = torch.randn(n_texts, n_bags, width, generator=generator).to(dtype)
    image = torch.randn(*lead, n_patches, width, generator=generator)
    masks = [
        torch.rand(size, generator=generator) < 0.6 for size in (text.shape[:2], image.shape[:-1])
    ]
    masks[0][-1] = False
    masks[1][..., 0, :] = False
    values, scales = reference.quantize_features(image, stored)
    return [x.to(device) for x in (text, values, scales, *masks)]


def assert_right(text, values, scales, masks=(None, None), mode="exclude", mean=False, **wants):
    got = kernel.maxsim_quantized_forward(text, values, scales, *masks, mode, mean=mean, **wants)
    options = {
        "text_mask": masks[0], "image_mask": masks[1], "mask_mode": mode,
        "reduction": "mean" if mean else "sum", "return_argmax": bool(wants.get("want_argmax")),
    }  # fmt: skip
    truth = reference.maxsim_quantized(text.double(), values, scales, **options)
    own = reference.maxsim_quantized(text, values, scales, **options)
    for ours, theirs, true in zip(got[:2], own[:2], truth[:2], strict=True):
        judge(ours, theirs, true, slack=1e-6)
    return got, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_and_dtype(shape, stored, dtype, device):
    text, values, scales, *_ = make(shape, device, dtype, stored)
    assert_right(text, values, scales)


@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("candidates", [0, 3])
def test_masks_and_candidates(candidates, stored, mode, device):
    text, values, scales, *masks = make(
        (3, 9, 2, 33, 64), device, torch.bfloat16, stored, candidates
    )
    assert_right(text, values, scales, masks, mode, mean=True)


def test_texts_sorted_by_length(device, monkeypatch):
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 1)
    text, values, scales, *masks = make((9, 25, 2, 20, 32), device, torch.bfloat16, "int8")
    assert_right(text, values, scales, masks, "zero")


def test_indices_and_long_texts_take_the_other_kernel(device):
    text, values, scales, *masks = make((2, 130, 2, 9, 16), device, torch.bfloat16, "int8")
    got, truth = assert_right(text, values, scales, masks, "zero", want_argmax=True)
    for index, true in zip(got[2:], truth[2:], strict=True):
        wide = index.to(torch.int32)
        none = 255 if index.dtype == torch.uint8 else -1
        assert torch.equal(wide.masked_fill(wide == none, -1), true)


def test_strided_features_and_scales(device):
    text, values, scales, *_ = make((4, 9, 6, 20, 24), device, torch.bfloat16, "fp8_e4m3")
    assert_right(text, values[::2], scales[::2])
    turned = values.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(text, turned.view(torch.float8_e4m3fn), scales)


def test_a_broken_patch_reaches_its_own_picture_alone(device):
    text, values, scales, *_ = make((2, 3, 3, 18, 16), device, torch.bfloat16, "fp8_e4m3")
    scales[1, 4] = float("nan")
    got, _ = assert_right(text, values, scales)
    assert got[0].isnan().tolist() == [[False, True, False]] * 2


@triton.jit
def widen_codes(codes, like, out):
    place = tl.arange(0, 256)
    number = exactly(tl.load(codes + place), tl.load(like), 2)
    tl.store(out + place, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_fp8_code_by_arithmetic(dtype, device):
    """NaN and subnormal numbers among them."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    like, out = torch.zeros(1, dtype=dtype, device=device), codes.to(dtype)
    widen_codes[(1,)](codes, like, out)
    want = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(out.isnan(), want.isnan()) and want.isnan().sum() == 2
    assert torch.equal(out.nan_to_num(), want.nan_to_num())


def test_int8_texts_are_refused(device):
    stored = [
        quantize_features(torch.randn(2, 3, 8).to(device)),
        quantize_features(torch.randn(2, 5, 8).to(device)),
    ]
    with pytest.raises(
        ValueError, match=r"backend='triton': .*bfloat16 and float16, got torch.int"
    ):
        maxsim_quantized(*stored, backend="triton")
