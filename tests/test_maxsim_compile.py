"""The scoring operators as citizens of PyTorch: opcheck, compile, export, fake tensors, FLOPs."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, mask
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bagformer import bag_pool, l2_normalize, maxsim, maxsim_topk

OPS = torch.ops.bagformer
OFFSETS = torch.tensor([[0, 2, 2, 5], [1, 3, 4, 4]], dtype=torch.int32)
OPTIONS = ("exclude", "both", "sum")


def leaf(*shape, seed=0):
    return features(*shape, seed=seed).requires_grad_()


def rows():
    """``name, operator, arguments`` of each operator, forward and backward."""
    text, image, candidates = leaf(3, 4, 8), leaf(2, 5, 8, seed=1), leaf(3, 2, 5, 8, seed=2)
    masks = mask(3, 4), mask(2, 5, seed=1)
    tail = ("fp32", "auto")
    yield "maxsim", (text, image, *masks, *OPTIONS, True, *tail)
    yield "maxsim", (text, image, None, None, "zero", "image_to_text", "mean", False, *tail)
    yield "maxsim_candidates", (text, candidates, masks[0], None, *OPTIONS, True, *tail)
    winners = OPS.maxsim(text, image, *masks, *OPTIONS, True, *tail)[2:4]
    plain = text.detach(), image.detach(), *masks, *winners
    grads = features(3, 2), features(2, 3)
    yield "maxsim_backward", (*grads, *plain, "exclude", "sum", *tail, True, True)
    yield "maxsim_backward", (None, grads[1], *plain, "exclude", "sum", *tail, False, True)
    none = torch.empty(0, 0, 0, dtype=torch.uint8)
    plain = text.detach(), candidates.detach(), None, None, none, none
    yield (
        "maxsim_candidates_backward",
        (grads[0], None, *plain, "zero", "mean", *tail, True, True),
    )
    yield "maxsim_topk", (text, image, *masks, 2, "text_to_image", "exclude", "sum", *tail)
    best = torch.tensor([[1], [0], [1]])
    plain = best, text.detach(), image.detach(), None, None
    yield (
        "maxsim_topk_backward",
        (features(3, 1), *plain, "text_to_image", "exclude", "sum", *tail),
    )
    hidden, keep = leaf(2, 5, 8), mask(2, 3)
    yield "bag_pool", (hidden, OFFSETS, keep, True, 1e-12, "auto")
    yield "bag_pool", (hidden, OFFSETS.long(), None, False, 1e-12, "auto")
    grad = features(2, 3, 8, seed=3)
    yield "bag_pool_backward", (grad, hidden.detach(), OFFSETS, keep, 5, 1e-12, "auto")
    yield "bag_pool_backward", (grad, None, OFFSETS, None, 5, 1e-12, "auto")
    yield "l2_normalize", (hidden, 1e-12, "auto")
    yield "l2_normalize_backward", (features(2, 5, 8, seed=4), hidden.detach(), 1e-12, "auto")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "name,arguments", list(rows()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_opcheck(name, arguments, backend):
    arguments = tuple(backend if value == "auto" else value for value in arguments)
    torch.library.opcheck(getattr(OPS, name), arguments)


def pipeline(hidden, image, keep):
    text = bag_pool(hidden, OFFSETS[:1].expand(hidden.shape[0], -1), mask=keep, normalize=True)
    scores = maxsim(text, l2_normalize(image), text_mask=keep, reduction="mean")
    best = maxsim_topk(text, image, 2).scores
    return scores.text_to_image.sum() + scores.image_to_text.square().sum() + best.sum()


def test_compile_whole_graph_with_any_batch():
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=True)
    for batch, images in ((3, 2), (5, 7), (8, 4)):
        results = []
        for function in (pipeline, compiled):
            leaves = leaf(batch, 5, 8), leaf(images, 6, 8, seed=1)
            loss = function(*leaves, mask(batch, 3))
            loss.backward()
            results.append((loss.detach(), *(tensor.grad for tensor in leaves)))
        for plain, built in zip(*results, strict=True):
            torch.testing.assert_close(plain, built)


class Scorer(torch.nn.Module):
    def forward(self, text, image):
        return maxsim(text, image).text_to_image


def test_export_with_any_batch():
    batch = torch.export.Dim("batch", min=2, max=1000)
    shapes = {"text": {0: batch}, "image": None}
    text, image = features(3, 4, 8), features(2, 5, 8, seed=1)
    program = torch.export.export(Scorer(), (text, image), dynamic_shapes=shapes)
    text = features(7, 4, 8, seed=2)
    assert torch.equal(program.module()(text, image), Scorer()(text, image))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device):
    """Shapes, dtypes and devices without data, of a GPU as well where there is none."""
    with FakeTensorMode():
        text = torch.empty(3, 25, 16, dtype=torch.bfloat16, device=device)
        image = torch.empty(4, 300, 16, dtype=torch.bfloat16, device=device)
        scores = maxsim(text, image, return_argmax=True)
        found = [(list(field.shape), field.dtype, field.device.type) for field in scores]
        topk = maxsim_topk(text, image, 2, direction="image_to_text")
    assert found == [
        ([3, 4], torch.float32, device),
        ([4, 3], torch.float32, device),
        ([3, 4, 25], torch.int32, device),
        ([4, 3, 300], torch.int32, device),
    ]
    assert topk.scores.shape == topk.indices.shape == (4, 2) and topk.indices.dtype == torch.int64


def test_flops_count_each_product_once():
    text, image = leaf(3, 4, 8), leaf(2, 5, 8, seed=1)
    with FlopCounterMode(display=False) as counter:
        scores = maxsim(text, image)
    assert counter.get_total_flops() == 2 * 3 * 2 * 4 * 5 * 8
    with FlopCounterMode(display=False) as counter:
        scores.text_to_image.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 3 * 2 * 8
    with FlopCounterMode(display=False) as counter:
        maxsim_topk(text.detach(), image.detach(), 1)
        bag_pool(features(2, 5, 8), OFFSETS)
        l2_normalize(features(2, 5, 8))
    assert counter.get_total_flops() == 2 * 3 * 2 * 4 * 5 * 8 + 2 * 5 * 8 + 3 * 2 * 5 * 8
