"""How many kernels an operator launches on a GPU, and that none of them makes the host wait."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if torch.cuda.is_available():
    pytest.skip("the stand-in for a GPU is for machines without one", allow_module_level=True)

from support.launches import SynchronisationError, recording

from bagformer import BagwiseContrastiveLoss, reference
from bagformer.ops import _maxsim_ops

bag_pool, contrastive_loss, l2_normalize, maxsim_topk = (
    importlib.import_module(f"bagformer.ops.{name}")
    for name in ("bag_pool", "contrastive_loss", "l2_normalize", "maxsim_topk")
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def keeps(*shape):
    return empty(*shape, dtype=torch.bool)


def names(found):
    return [launch.name.removeprefix("triton::").removeprefix("aten::") for launch in found]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["plain", "expanded offsets, transposed mask and gradient"])
def test_bag_pool_is_one_launch_each_way(normalize, index, layout):
    with recording() as found:
        hidden, offsets = empty(64, 40, 256), empty(64, 26, dtype=index)
        mask, grad = keeps(64, 25), empty(64, 25, 256)
        if layout != "plain":
            offsets, mask = offsets[:1].expand(64, -1), keeps(25, 64).T
            grad = empty(25, 64, 256).transpose(0, 1)
        for keep in (None, mask):
            found.clear()
            bag_pool._run(hidden, offsets, keep, normalize, 1e-12, "triton")
            given = hidden if normalize else None
            bag_pool._run_backward(grad, given, offsets, keep, 40, 1e-12, "triton")
            assert names(found) == ["bag_pool_forward_kernel", "bag_pool_backward_kernel"]


def test_l2_normalize_is_one_launch_each_way():
    with recording() as found:
        x = empty(64, 257, 256)
        l2_normalize._run(x, 1e-12, "triton")
        l2_normalize._run_backward(x, x, 1e-12, "triton")
        assert names(found) == ["l2_normalize_forward_kernel", "l2_normalize_backward_kernel"]


def scored(
    text, image, masks=(None, None), grads=(True, True), argmax=True, backend="triton", **options
):
    """A forward and a backward of the scores, as autograd calls them."""
    asked = {"mask_mode": "exclude", "directions": "both", "reduction": "sum", "precision": "fp32"}
    asked |= options
    mode, directions, reduction, precision = asked.values()
    out = _maxsim_ops.run(
        text, image, *masks, mode, directions, reduction, argmax, precision, backend
    )
    slopes = (score if score.numel() else None for score in out[:2])
    return _maxsim_ops._run_backward(
        *slopes, text, image, *masks, *out[2:4], mode, reduction, precision, backend, *grads, out[4]
    )


STEP = ["maxsim_forward_kernel", "grad_text_kernel", "grad_image_kernel"]
# A training step on unit features: at most 5 launches, fills of PyTorch included.
STEPS = [
    ("all pairs", (1024,), (False, False), 0),
    ("all pairs, mask of the texts", (1024,), (True, False), 1),
    ("all pairs, mask of the images", (1024,), (False, True), 1),
    ("all pairs, both masks", (1024,), (True, True), 1),
    ("candidates", (1024, 4), (False, False), 0),
    ("candidates, mask of the texts", (1024, 4), (True, False), 1),
    ("candidates, both masks", (1024, 4), (True, True), 1),
]


@pytest.mark.parametrize("name,images,masked,plans", STEPS, ids=[row[0] for row in STEPS])
def test_a_training_step_of_the_scores(name, images, masked, plans):
    with recording() as found:
        text, image = empty(1024, 25, 256), empty(*images, 257, 256)
        sides = keeps(1024, 25), keeps(*images, 257)
        scored(text, image, tuple(m if has else None for m, has in zip(sides, masked, strict=True)))
        # texts in slots of 8 have a launch of their own where images are masked too (tiles.ALONE)
        apart = ["maxsim_forward_kernel"] if name == "all pairs, both masks" else []
        assert names(found) == ["plan_kernel"] * plans + apart + STEP
        assert len(found) <= 5


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "small"])
@pytest.mark.parametrize("width", [128, 256, 768])
@pytest.mark.parametrize("mode", reference.MASK_MODES)
def test_a_masked_step_takes_at_most_five_everywhere(monkeypatch, family, width, mode):
    from bagformer.kernels import tiles

    with recording() as found:
        monkeypatch.setattr(tiles, "family_of", lambda device: family)
        text, image = empty(1024, 25, width), empty(1024, 257, width)
        for masks in ((keeps(1024, 25), None), (keeps(1024, 25), keeps(1024, 257))):
            found.clear()
            scored(text, image, masks, mask_mode=mode)
            assert len(found) <= 5, names(found)


@pytest.mark.parametrize("objective", reference.OBJECTIVES)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_the_loss_of_scores_is_two_launches_and_one_back(labels, learned, objective):
    with recording() as found:
        scores = empty(64, 96, dtype=FP32), empty(96, 64, dtype=FP32)
        positives = keeps(64, 96)
        if not labels:
            scores, positives = (scores[0][:, :64], scores[1][:64]), None
        temperature = empty(dtype=FP32) if learned else None
        bias = empty(2, dtype=FP32) if objective == "sigmoid" else None
        given = *scores, positives, temperature, bias, 0.07, objective, "triton"
        _, *left = contrastive_loss._run(*given)
        grads = contrastive_loss._run_backward(empty(dtype=FP32), *left, *given)
        assert names(found) == [
            "contrastive_rows_kernel", "contrastive_sum_kernel", "contrastive_gradient_kernel"
        ]  # fmt: skip
        assert [one.shape for one in grads] == [scores[0].shape, scores[1].shape, (3,)]


@pytest.mark.parametrize("learned", [None, "learn", 0.07])
def test_the_loss_s_forward_adds_nothing_of_pytorch_s(learned):
    """But what a learned temperature takes: kept in range, from its logarithm."""
    with recording() as found:
        text = empty(1024, 25, 256).requires_grad_()
        image = empty(1024, 257, 256).requires_grad_()
        with torch.device("cuda"):
            loss = BagwiseContrastiveLoss(temperature=learned)
        found.clear()
        assert loss(text, image).requires_grad
        own = ["clamp_", "exp"] if learned == "learn" else []
        assert names(found) == ["bagformer::maxsim", *own, "bagformer::contrastive_loss"]


def test_top_k_of_one_stripe_is_three_launches():
    with recording() as found:
        text, image = empty(64, 25, 256), empty(5000, 257, 256)
        options = "text_to_image", "exclude", "sum", "fp32", "triton"
        scores, indices = maxsim_topk._run(text, image, None, None, 10, *options)
        assert names(found) == ["maxsim_forward_kernel", "merge_kernel", "unpack_kernel"]
        assert scores.shape == (64, 10) and indices.dtype == torch.int64


def test_top_k_holds_a_stripe_of_scores_and_no_matrix(monkeypatch):
    """A collection 16 times as long takes 16 stripes of the same size."""
    from bagformer.kernels import topk

    monkeypatch.setattr(topk, "STRIPE_SCORES", 1 << 15)
    widths = []
    forward = topk.maxsim_forward

    def watch(*given, **options):
        out = forward(*given, **options)
        widths.append(max(one.numel() for one in out))
        return out

    monkeypatch.setattr(topk, "maxsim_forward", watch)
    options = "text_to_image", "exclude", "sum", "fp32", "triton"
    with recording():
        for images in (512, 8192):
            widths.clear()
            text, image = empty(64, 25, 64), empty(images, 7, 64)
            maxsim_topk._run(text, image, None, None, 10, *options)
            assert widths == [1 << 15] * (images // 512)


@pytest.mark.parametrize(
    "backend,dtype,texts",
    [("triton", BF16, 512), ("triton", FP16, 512), ("triton", FP32, 512), ("torch", FP32, 16)],
)
def test_nothing_waits_for_the_device(backend, dtype, texts):
    """What waits, or takes its size from the device's values, cannot be captured in a graph."""
    with recording() as found:
        text, image = empty(texts, 25, 96, dtype=dtype), empty(300, 50, 96, dtype=dtype)
        candidates = empty(texts, 3, 50, 96, dtype=dtype)
        masks, own = (keeps(texts, 25), keeps(300, 50)), (keeps(texts, 25), keeps(texts, 3, 50))
        for mode, reduction in zip(reference.MASK_MODES, reference.REDUCTIONS, strict=True):
            for directions in reference.DIRECTIONS:
                options = {
                    "backend": backend, "mask_mode": mode, "reduction": reduction,
                    "directions": directions,
                }  # fmt: skip
                scored(text, image, masks, **options)
                scored(text, candidates, own, argmax=False, **options)
        scored(text, image, grads=(True, False), precision="bf16", backend=backend)
        scored(text, image, argmax=False, precision="tf32", backend=backend)
        long = empty(8, 300, 96, dtype=dtype)
        scored(long, image, (keeps(8, 300), None), reduction="mean", backend=backend)
        for direction in maxsim_topk.TOPK_DIRECTIONS:
            settings = direction, "zero", "mean", "fp32", backend
            best = maxsim_topk._run(text, image, *masks, 10, *settings)
            maxsim_topk._run_backward(*best, text, image, *masks, *settings)
        offsets, keep = empty(300, 9, dtype=torch.int64), keeps(300, 8)
        pooled = bag_pool._run(image, offsets, keep, True, 1e-12, backend)
        bag_pool._run_backward(pooled, image, offsets, keep, 50, 1e-12, backend)
        l2_normalize._run_backward(text, l2_normalize._run(text, 1e-12, backend), 1e-12, backend)
        assert len(found) > 50


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.repeat_interleave(x.int()),
    ],
)
def test_the_check_sees_what_waits(wait):
    with recording():
        x = empty(8, 1)[:, 0]
        with pytest.raises(SynchronisationError):
            wait(x)
