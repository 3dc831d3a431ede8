"""The public operators with backend="triton", forward and backward, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from bagformer.kernels import tiles
from support.judging import judge
from support.makers import features, mask, masks

from bagformer import (
    bag_pool,
    explain_backend,
    l2_normalize,
    maxsim,
    maxsim_pairs,
    maxsim_topk,
    reference,
)
from bagformer.ops import _maxsim_topk_triton
from bagformer.ops.backend import choose_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLACK = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TRITON = {"backend": "triton"}


def outcome(function, leaves, **call):
    """Outputs, and the leaves' gradients under random upstream gradients of every float output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found = function(*leaves, **call)
    found = list(found) if isinstance(found, tuple) else [found]
    floats = [one for one in found if one is not None and one.requires_grad]
    upstream = [
        features(*one.shape, seed=90 + place).to(one.device, one.dtype)
        for place, one in enumerate(floats)
    ]
    return found, torch.autograd.grad(floats, leaves, upstream)


def compare(ours, standard, leaves, **call):
    """``ours`` through Triton no worse than ``standard``, the reference, in the leaves' dtype."""
    dtype, device = leaves[0].dtype, leaves[0].device
    ours, our_grads = outcome(ours, leaves, **call, **TRITON)
    theirs, their_grads = outcome(standard, leaves, **call)
    truth, true_grads = outcome(standard, [leaf.double() for leaf in leaves], **call)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        if true is None or not true.is_floating_point():
            assert (mine is None and true is None) or torch.equal(mine, other)
            continue
        assert mine.dtype == other.dtype and mine.device == device
        judge(mine, other, true, 1e-6)
    for mine, other, true in zip(our_grads, their_grads, true_grads, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        judge(mine, other, true, SLACK[dtype])


def sides(device, dtype, texts, images, depth=24, kind="first_side_all"):
    text, image = features(*texts, depth), features(*images, depth, seed=1)
    pair = (None if one is None else one.to(device) for one in masks(kind, texts, images))
    return [text.to(device, dtype), image.to(device, dtype)], *pair


@pytest.mark.parametrize("mode", reference.MASK_MODES)
@pytest.mark.parametrize("directions", reference.DIRECTIONS)
@pytest.mark.parametrize("images", [(3, 33), (4, 2, 19)], ids=["all pairs", "candidates"])
def test_maxsim(device, images, directions, mode):
    leaves, text_mask, image_mask = sides(device, torch.float32, (4, 9), images)
    reductions = dict(zip(reference.MASK_MODES, reference.REDUCTIONS, strict=True))
    compare(
        maxsim, reference.maxsim, leaves, text_mask=text_mask, image_mask=image_mask,
        mask_mode=mode, directions=directions, reduction=reductions[mode], return_argmax=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "all"])
def test_maxsim_in_each_dtype(device, dtype, kind):
    leaves, text_mask, image_mask = sides(device, dtype, (3, 5), (2, 18), 37, kind)
    compare(maxsim, reference.maxsim, leaves, text_mask=text_mask, image_mask=image_mask)


def test_maxsim_pairs(device):
    leaves, text_mask, image_mask = sides(device, torch.float32, (3, 7), (3, 20))
    compare(
        maxsim_pairs, reference.maxsim_pairs, leaves, text_mask=text_mask, image_mask=image_mask,
        mask_mode="zero", reduction="mean", return_argmax=True,
    )  # fmt: skip


@pytest.mark.parametrize("bags,patches", [(9, 257), (130, 5)])
def test_argmax_wider_than_a_byte_and_texts_longer_than_a_tile(device, bags, patches):
    leaves, text_mask, image_mask = sides(device, torch.float32, (2, bags), (2, patches), 16)
    compare(
        maxsim, reference.maxsim, leaves, text_mask=text_mask, image_mask=image_mask,
        return_argmax=True,
    )  # fmt: skip


@pytest.mark.parametrize("images", [(3, 17), (4, 3, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_winners_over_the_budget_are_computed_again(device, monkeypatch, dtype, images):
    from bagformer.kernels import gradients

    leaves, text_mask, image_mask = sides(device, dtype, (4, 9), images)
    call = {"text_mask": text_mask, "image_mask": image_mask, "mask_mode": "zero", **TRITON}
    launched = []
    recompute = gradients._recompute
    monkeypatch.setattr(
        gradients, "_recompute", lambda *given: launched.append(True) or recompute(*given)
    )
    _, saved = outcome(maxsim, leaves, **call)
    assert not launched
    monkeypatch.setenv("BAGFORMER_ARGMAX_BUDGET", "0")
    _, again = outcome(maxsim, leaves, **call)
    assert launched
    for one, two in zip(saved, again, strict=True):
        assert torch.equal(one, two)


def test_one_score_used_and_one_side_wanted(device):
    (text, image), *_ = sides(device, torch.float32, (3, 9), (2, 20), kind="none")
    slope = features(2, 3, seed=7).to(device)
    for backward in (maxsim, reference.maxsim):
        call = TRITON if backward is maxsim else {}
        text.grad, image.grad = None, None
        leaf = text.detach().requires_grad_()
        (backward(leaf, image, **call).image_to_text * slope).sum().backward()
        if backward is maxsim:
            ours = leaf.grad
    torch.testing.assert_close(ours, leaf.grad)
    assert image.grad is None


@pytest.mark.parametrize("precision,slack", [("tf32", 1e-6), ("bf16", 2e-2)])
def test_precision_reaches_the_kernel(device, precision, slack):
    (text, image), *_ = sides(device, torch.float32, (2, 5), (3, 9), 64, "none")
    truth = reference.maxsim(text.double(), image.double()).text_to_image
    exact = maxsim(text, image, **TRITON).text_to_image
    less = maxsim(text, image, precision=precision, **TRITON).text_to_image
    judge(less, exact, truth, max(slack, 1e-3 if device.type == "cuda" else 0))
    if precision == "bf16":
        assert not torch.equal(less, exact)
        # float16 has more digits than bfloat16: it is not narrowed
        text, image = text.half(), image.half()
        asked = maxsim(text, image, precision="bf16", **TRITON).text_to_image
        assert torch.equal(asked, maxsim(text, image, **TRITON).text_to_image)


def _strided(tensor, way):
    """The same values, laid out otherwise."""
    if way == "last axis":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if way == "first axis last":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan")).to(tensor)
    wider[..., 1:-2] = tensor
    return wider[..., 1:-2]


@pytest.mark.parametrize("way", ["last axis", "first axis last", "slice"])
def test_layouts_do_not_matter(device, way):
    (text, image), text_mask, image_mask = sides(device, torch.float32, (3, 9), (4, 18))
    offsets = torch.tensor([[0, 2, 2, 9], [0, 1, 4, 9], [0, 3, 8, 9]], device=device)
    calls = (
        (maxsim, {"text_mask": text_mask, "image_mask": image_mask, "return_argmax": True}),
        (maxsim_topk, {"k": 2}),
    )
    leaves = [_strided(text, way), _strided(image, way)]
    assert not leaves[0].is_contiguous()
    whole = [outcome(call, (text, image), **options, **TRITON) for call, options in calls]
    cut = [_strided(one.float()[..., None], way)[..., 0].bool() for one in (text_mask, image_mask)]
    calls[0][1].update(text_mask=cut[0], image_mask=cut[1])
    again = [outcome(call, leaves, **options, **TRITON) for call, options in calls]
    for call, options in ((l2_normalize, {}), (bag_pool, {"bags": offsets, "normalize": True})):
        whole.append(outcome(call, (text,), **options, **TRITON))
        again.append(outcome(call, leaves[:1], **options, **TRITON))
    for (one, one_grad), (two, two_grad) in zip(whole, again, strict=True):
        for first, second in itertools.chain(zip(one, two), zip(one_grad, two_grad)):  # noqa: B905
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    "texts,images,depth",
    [
        ((0, 3), (3, 5), 8),
        ((2, 3), (0, 5), 8),
        ((2, 0), (3, 5), 8),
        ((2, 3), (3, 0), 8),
        ((0, 0), (0, 0), 8),
        ((2, 3), (3, 5), 0),
        ((0, 3), (3, 5), 0),
        ((2, 3), (2, 0, 5), 8),
        ((2, 3), (2, 4, 0), 8),
        ((0, 3), (0, 4, 5), 8),
        ((2, 3), (2, 4, 5), 0),
    ],
)
def test_empty_sides(device, texts, images, depth):
    text, image = torch.ones(*texts, depth, device=device), torch.ones(*images, depth).to(device)
    for directions in reference.DIRECTIONS:
        options = {"directions": directions, "return_argmax": True, "reduction": "mean"}
        got, grads = outcome(maxsim, (text, image), **options, **TRITON)
        want = reference.maxsim(text, image, **options)
        for mine, true in zip(got, want, strict=True):
            assert (mine is None and true is None) or torch.equal(mine, true)
        assert all(not grad.any() for grad in grads)
    if images[0] and len(images) == 2:
        got = maxsim_topk(text, image, 1, **TRITON)
        assert all(map(torch.equal, got, reference.maxsim_topk(text, image, 1)))


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maxsim_topk(device, dtype, direction):
    leaves, text_mask, image_mask = sides(device, dtype, (5, 6), (7, 12))
    leaves[1][4] = leaves[1][1]
    call = {"direction": direction, "text_mask": text_mask, "image_mask": image_mask}
    for k, mode, reduction in ((1, "exclude", "mean"), (4, "zero", "sum")):
        compare(
            maxsim_topk, reference.maxsim_topk, leaves, k=k, mask_mode=mode, reduction=reduction,
            **call,
        )  # fmt: skip


def test_maxsim_topk_of_more_than_a_program_holds(device, monkeypatch):
    leaves, text_mask, _ = sides(device, torch.float32, (3, 6), (7, 12))
    for longest in (5, 4):
        monkeypatch.setattr(_maxsim_topk_triton, "LONGEST", longest)
        compare(maxsim_topk, reference.maxsim_topk, leaves, k=5, text_mask=text_mask)


def _pooled(hidden, bags, mask=None, normalize=False):
    rows = reference.bag_pool(hidden, bags)
    rows = reference.l2_normalize(rows) if normalize else rows
    return rows if mask is None else rows.masked_fill(~mask[..., None], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize,masked", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_bag_pool(device, dtype, normalize, masked, index):
    hidden = features(2, 9, 20).to(device, dtype)
    # tokens before the first bag and after the last; an empty bag, but not where its gradient
    # would be divided by eps
    third = 3 if normalize else 2
    offsets = torch.tensor([[1, 2, third, 7], [0, 1, 5, 9]], dtype=index, device=device)
    keep = mask(2, 3, seed=5).to(device) if masked else None
    compare(bag_pool, _pooled, [hidden], bags=offsets, mask=keep, normalize=normalize)


def test_bag_pool_of_nothing(device):
    for batch, tokens, bags, depth in itertools.product((0, 2), (0, 4), (0, 3), (0, 5)):
        hidden = torch.ones(batch, tokens, depth, device=device)
        offsets = torch.zeros(batch, bags + 1, dtype=torch.int32, device=device)
        offsets[:, 1:] = tokens
        (got,), (grad,) = outcome(bag_pool, [hidden], bags=offsets, **TRITON)
        assert torch.equal(got, reference.bag_pool(hidden, offsets))
        assert grad.shape == hidden.shape and (bags > 0 or not grad.any())


def test_offsets_that_fall_write_every_gradient_row_once(device, monkeypatch):
    # a CPU tensor's offsets are looked at and refused; a GPU's are not, as here
    monkeypatch.setattr("bagformer.ops.bag_pool.check_offset_values", lambda *_: None)
    hidden = features(1, 8, 6).to(device)
    wild = torch.tensor([[-3, 5, 2, 900]], device=device)
    tame = torch.tensor([[0, 5, 5, 8]], device=device)
    (got,), (grad,) = outcome(bag_pool, [hidden], bags=wild, **TRITON)
    (want,), (true,) = outcome(_pooled, [hidden], bags=tame)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 3, 37), (0, 4), (4, 0)])
def test_l2_normalize(device, dtype, shape):
    compare(l2_normalize, reference.l2_normalize, [features(*shape).to(device, dtype)])


@pytest.mark.parametrize("depth", [1, 8])
def test_gradients_that_are_expanded(device, depth):
    x = features(3, depth).to(device)
    leaf, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    l2_normalize(leaf, **TRITON).sum().backward()
    reference.l2_normalize(own).sum().backward()
    torch.testing.assert_close(leaf.grad, own.grad)


def test_items_of_far_apart_rows_are_copied(device, monkeypatch):
    monkeypatch.setattr("bagformer.ops._triton.FARTHEST", 150)
    (text, image), *_ = sides(device, torch.float32, (3, 5), (4, 6), kind="none")
    far = image.transpose(0, 1).contiguous().transpose(0, 1)
    got = maxsim(text, far, **TRITON).text_to_image
    assert torch.equal(got, maxsim(text, image, **TRITON).text_to_image)
    with pytest.raises(ValueError, match=r"one item of image must hold fewer .* got 7 x 24"):
        maxsim(text, features(1, 7, 24).to(device), **TRITON)


def test_fake_outputs_and_schemas_are_true(device):
    (text, image), *pair = sides(device, torch.bfloat16, (3, 9), (4, 18))
    ops = torch.ops.bagformer
    text, image = text.requires_grad_(), image.requires_grad_()
    offsets = torch.tensor([[0, 2, 9]] * 3, device=device)
    keep = torch.ones(3, 2, dtype=torch.bool, device=device)
    scored = ("exclude", "both", "sum", True, "fp32", "triton")
    for op, given in (
        (ops.maxsim, (text, image, *pair, *scored)),
        (
            ops.maxsim_topk,
            (text, image, *pair, 2, "image_to_text", "zero", "sum", "fp32", "triton"),
        ),
        (ops.l2_normalize, (text, 1e-12, "triton")),
        (ops.bag_pool, (text, offsets, keep, True, 1e-12, "triton")),
    ):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.default, given, test_utils=tests)


def test_a_compiled_graph_holds_the_operators(device):
    (text, image), *_ = sides(device, torch.float32, (3, 9), (4, 18), kind="none")

    def step(text, image):
        return maxsim(l2_normalize(text, **TRITON), image, **TRITON)[:2]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (ours, grads), (plain, plain_grads) = (outcome(one, (text, image)) for one in (compiled, step))
    for one, two in zip([*ours, *grads], [*plain, *plain_grads], strict=True):
        assert torch.equal(one, two)


def test_the_choice_and_its_explanation(device):
    (text, image), *_ = sides(device, torch.float32, (3, 9), (4, 18), kind="none")
    assert choose_backend("maxsim", device, torch.float32, "triton").backend == "triton"
    line = explain_backend("maxsim", text, image, **TRITON)
    tile = tiles.forward_tile(device, torch.float32, 24, 16, 3, "ieee")
    assert f"of {tile.block_p} patches x {tile.block_n} bags in slots of at most 16" in line
    assert tiles.family_of(device) in line
    assert "tiles" not in explain_backend("maxsim", text, **TRITON)
    with pytest.raises(ValueError, match=r"take float32, bfloat16 and float16, got torch.float64"):
        maxsim(text.double(), image.double(), **TRITON)
