"""Wrong arguments are named; empty and nested ones work."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, mask
from torch.autograd import forward_ad

from bagformer import (
    bag_pool,
    l2_normalize,
    maxsim,
    maxsim_pairs,
    maxsim_quantized,
    maxsim_topk,
    maxsim_topk_screened,
    quantize_features,
    reference,
    screen_images,
)
from bagformer.ops import _native

TEXT, IMAGE = features(2, 3, 4), features(5, 6, 4)

WRONG = [
    ({"text": [[1.0]]}, TypeError, "text must be a torch.Tensor, got list"),
    ({"text": TEXT.int()}, TypeError, "text must be float32, .* got torch.int32"),
    ({"text": TEXT.to(torch.complex64)}, TypeError, "text must be float32, .* got torch.complex64"),
    ({"text": TEXT[0]}, ValueError, r"text must have shape \[Nt, N, D\], got \[3, 4\]"),
    ({"text": TEXT.to_sparse()}, TypeError, "text must be a dense tensor"),
    ({"image": IMAGE[0, 0]}, ValueError, r"image must have shape \[Ni, P, D\] or .* got \[4\]"),
    ({"image": IMAGE.double()}, TypeError, r"image must have the dtype of text \(torch.float32\)"),
    (
        {"image": IMAGE[..., :3]},
        ValueError,
        r"image must have the feature size D of text \(4\), got 3",
    ),
    ({"image": IMAGE.to("meta")}, ValueError, r"image must be on the device of text \(cpu\)"),
    ({"image": features(5, 2, 6, 4)}, ValueError, r"must have Nt = 2 as text, got \[5, 2, 6, 4\]"),
    ({"text_mask": mask(2, 3).int()}, TypeError, r"text_mask must be bool .* got torch.int32"),
    (
        {"text_mask": mask(3, 2)},
        ValueError,
        r"text_mask must have shape \[2, 3\] as text, got \[3, 2\]",
    ),
    (
        {"image_mask": mask(5)},
        ValueError,
        r"image_mask must have shape \[5, 6\] as image, got \[5\]",
    ),
    ({"image_mask": [True]}, TypeError, "image_mask must be a torch.Tensor, got list"),
    (
        {"image_mask": mask(5, 6).to("meta")},
        ValueError,
        "image_mask must be on the device of image",
    ),
    ({"mask_mode": "ignore"}, ValueError, "mask_mode must be one of exclude, zero; got 'ignore'"),
    ({"directions": "sideways"}, ValueError, "directions must be one of both, .* got 'sideways'"),
    ({"reduction": "max"}, ValueError, "reduction must be one of sum, mean; got 'max'"),
    ({"precision": "fp8"}, ValueError, "precision must be one of fp32, tf32, bf16; got 'fp8'"),
    ({"return_argmax": "no"}, TypeError, "return_argmax must be a bool, got str"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, cpu, .* got 'cuda'"),
]


@pytest.mark.parametrize("wrong,error,message", WRONG)
def test_wrong_arguments(wrong, error, message):
    call = {"text": TEXT, "image": IMAGE, **wrong}
    with pytest.raises(error, match=message):
        maxsim(call.pop("text"), call.pop("image"), **call)


def test_wrong_pairs():
    with pytest.raises(ValueError, match="as many items each, got 2 texts and 5 images"):
        maxsim_pairs(TEXT, IMAGE)
    with pytest.raises(ValueError, match=r"image must have shape \[B, P, D\]"):
        maxsim_pairs(TEXT, IMAGE[:2, None])


def test_a_wrong_view_never_reaches_the_kernels():
    op = torch.ops.bagformer.maxsim
    rest = ("exclude", "both", "sum", False, "fp32", "auto")
    for text, image, text_mask in (
        (TEXT, IMAGE[..., :2], None),
        (TEXT, IMAGE.double(), None),
        (TEXT, IMAGE, mask(1, 3)),
    ):
        with pytest.raises(ValueError, match="internal view"):
            op(text, image, text_mask, None, *rest)
    with pytest.raises(ValueError, match="rank 5"):
        _native.load().l2_normalize(_native.view(torch.ones(1, 1, 1, 1, 1)), 1e-12, None, 1)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(
    "texts,bags,images,patches",
    [(0, 3, 2, 5), (2, 0, 2, 5), (2, 3, 0, 5), (2, 3, 2, 0), (0, 0, 0, 0)],
)
def test_empty(texts, bags, images, patches, backend):
    text, image = features(texts, bags, 4), features(images, patches, 4)
    ours = maxsim(text, image, return_argmax=True, backend=backend)
    for mine, true in zip(ours, reference.maxsim(text, image, return_argmax=True), strict=True):
        assert torch.equal(mine, true)


def test_no_features_at_all_score_zero():
    scores = maxsim(torch.ones(2, 3, 0), torch.ones(4, 5, 0), return_argmax=True)
    assert not scores.text_to_image.any() and not scores.text_argmax.any()


def jagged(padded, keep):
    parts = [row[chosen] for row, chosen in zip(padded, keep, strict=True)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def test_nested_tensors_are_their_padded_forms():
    lengths = torch.tensor([3, 1, 4]), torch.tensor([6, 2, 5])
    text, image = features(3, 4, 8), features(3, 6, 8, seed=1)
    keeps = [torch.arange(n) < length[:, None] for n, length in zip((4, 6), lengths, strict=True)]
    truth = maxsim(text, image, text_mask=keeps[0], image_mask=keeps[1])
    nested = jagged(text, keeps[0]).requires_grad_(), jagged(image, keeps[1])
    ours = maxsim(*nested)
    assert torch.equal(ours.text_to_image, truth.text_to_image)
    assert torch.equal(maxsim_pairs(*nested)[1], truth.image_to_text.diagonal())
    topk = maxsim_topk(*nested, 2)
    assert torch.equal(topk.scores, truth.text_to_image.sort(descending=True).values[:, :2])
    ours.text_to_image.sum().backward()
    leaf = text.clone().requires_grad_()
    maxsim(leaf, image, text_mask=keeps[0], image_mask=keeps[1]).text_to_image.sum().backward()
    assert torch.equal(nested[0].grad.to_padded_tensor(0.0), leaf.grad)


def test_nested_tensors_bring_their_own_mask():
    nested = jagged(features(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="text_mask must be None: the nested text has lengths"):
        maxsim(nested, IMAGE, text_mask=mask(2, 3))
    strided = torch.nested.nested_tensor([torch.ones(1, 4), torch.ones(2, 4)])
    with pytest.raises(ValueError, match="text must be a contiguous jagged tensor"):
        maxsim(strided, IMAGE)


def test_a_view_without_memory_never_reaches_the_kernels():
    freed = features(2, 3, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="internal view: text has no memory"):
        maxsim(freed, IMAGE)


def test_too_many_tokens_name_their_side():
    long = torch.zeros(1, 1, 1).expand(1, 2**30 + 1, 1)
    with pytest.raises(ValueError, match=r"text has more than 2.30 bags"):
        maxsim(long, torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match=r"image has more than 2.30 patches"):
        maxsim(torch.ones(1, 1, 1), long)


FORWARD_MODE = {
    "text": lambda x: maxsim(x, IMAGE).text_to_image,
    "image": lambda x: maxsim(TEXT[..., :4], x).image_to_text,
    "hidden_states": lambda x: bag_pool(x, torch.tensor([[0, 1, 3], [0, 2, 3]])),
    "x": l2_normalize,
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused_rather_than_zero(name):
    with pytest.raises(RuntimeError, match=f"^{name} carries a forward-mode tangent"):
        torch.func.jvp(FORWARD_MODE[name], (TEXT,), (torch.ones_like(TEXT),))
    with forward_ad.dual_level():
        assert maxsim(TEXT, IMAGE).text_to_image.shape == (2, 5)


def test_any_byte_but_zero_in_a_mask_counts():
    odd = torch.tensor([[2, 0, 255], [1, 1, 0]], dtype=torch.uint8).view(torch.bool)
    gradients = []
    for keep in (odd, odd.view(torch.uint8) != 0):
        leaf = TEXT.clone().requires_grad_()
        maxsim(leaf, IMAGE, text_mask=keep, reduction="mean").text_to_image.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_autocast_narrows_nothing(backend):
    """What was given in float32 is computed in float32: scores, gradients, pools."""
    text, image = features(3, 4, 33), features(5, 6, 33, seed=1)
    stored = quantize_features(image)
    offsets = torch.tensor([[0, 1, 2, 4]]).expand(3, -1)

    def results():
        leaves = [side.clone().requires_grad_() for side in (text, image)]
        maxsim_topk(*leaves, 2, backend=backend).scores.sum().backward()
        scores = maxsim(*leaves, backend=backend)
        gradients = torch.autograd.grad(sum(score.sum() for score in scores[:2]), leaves)
        one_way = maxsim(*leaves, directions="image_to_text", backend=backend).image_to_text
        gradients += torch.autograd.grad(one_way.sum(), leaves)
        return [
            *(leaf.grad for leaf in leaves),
            *(one.detach() for one in scores[:2]),
            *gradients,
            *maxsim_quantized(text, stored, backend=backend)[:2],
            *maxsim_quantized(quantize_features(text), stored, backend=backend)[:2],
            *maxsim_topk_screened(text, screen_images(image), 2, backend=backend),
            bag_pool(text, offsets, normalize=True, backend=backend),
            l2_normalize(text, backend=backend),
        ]

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), wanted))
