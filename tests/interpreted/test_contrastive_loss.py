"""The kernels of the contrastive loss against the reference: value, every gradient, every form."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import contrastive_loss as kernels
from bagformer.kernels.contrastive_loss import contrastive_loss_backward, contrastive_loss_forward
from support.judging import judge

from bagformer import reference
from bagformer.ops import contrastive_loss as ops
from bagformer.ops.contrastive_loss import contrastive_loss

OBJECTIVES = reference.OBJECTIVES
# one row, one past a program's rows, one past a block of columns and past what the sum adds at once
SIZES = [(1, 1), (9, 17), (8, 16), (33, 9), (3, 513), (1030, 5)]


def world(texts, images, dtype=torch.float32, scale=3.0, seed=0):
    maker = torch.Generator().manual_seed(seed)
    scores = [
        scale * torch.randn(*shape, generator=maker) for shape in ((texts, images), (images, texts))
    ]
    positives = torch.rand(texts, images, generator=maker) < 0.2
    rows, columns = torch.arange(texts), torch.arange(images)
    positives[rows, rows % images] = True
    positives[columns % texts, columns] = True
    bias = torch.tensor([-1.5, 0.7])
    return [one.to(dtype) for one in scores], positives, torch.tensor(0.4), bias


def results(scores, positives, temperature, bias, objective, dtype, device, call):
    """Value and gradients by scores, temperature and bias, in ``dtype``."""
    leaves = [None if one is None else one.to(device, dtype).requires_grad_() for one in scores]
    numbers = [temperature.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()]
    if objective == "sigmoid":
        numbers.append(bias.to(numbers[0]).requires_grad_())
    shift = numbers[1] if objective == "sigmoid" else None
    loss = call(leaves, positives.to(device), numbers[0], shift, objective)
    asked = [one for one in (*leaves, *numbers) if one is not None]
    grads = torch.autograd.grad(loss, asked, torch.tensor(-1.7).to(loss))
    return [loss.detach(), *grads]


def ours(leaves, positives, temperature, bias, objective):
    return contrastive_loss(
        *leaves, positives=positives, temperature=temperature, bias=bias, objective=objective,
        backend="triton",
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(device, sizes, objective):
    given = world(*sizes)
    truth = results(*given, objective, torch.float64, device, reference.contrastive_loss)
    own = results(*given, objective, torch.float32, device, reference.contrastive_loss)
    found = results(*given, objective, torch.float32, device, ours)
    for mine, theirs, true in zip(found, own, truth, strict=True):
        judge(mine, theirs, true, 5e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("missing", [0, 1, None])
def test_narrow_scores_and_one_direction(device, dtype, objective, missing):
    scores, *rest = world(12, 19, dtype)
    scores = [None if place == missing else one for place, one in enumerate(scores)]
    truth = results(scores, *rest, objective, torch.float64, device, reference.contrastive_loss)
    own = results(scores, *rest, objective, dtype, device, reference.contrastive_loss)
    found = results(scores, *rest, objective, dtype, device, ours)
    for mine, theirs, true in zip(found, own, truth, strict=True):
        assert mine.dtype == theirs.dtype
        judge(mine, theirs, true, 5e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_strides_and_the_diagonal(device, objective):
    """A transposed matrix, as that of CLS tokens; no positives: text b with image b."""
    (scores, _), _, temperature, bias = world(21, 21, seed=3)
    scores = scores.to(device)[:, ::1]
    wide = torch.randn(21, 42, device=device)[:, ::2]
    for pair in ((scores, scores.t()), (wide, scores)):
        given = [pair, torch.eye(21, dtype=torch.bool), temperature, bias, objective]
        truth = results(*given, torch.float64, device, reference.contrastive_loss)
        own = results(*given, torch.float32, device, reference.contrastive_loss)
        softmax = objective == "softmax"
        numbers = temperature.to(device), None if softmax else bias.to(device)
        loss, *left = contrastive_loss_forward(*pair, None, *numbers, softmax=softmax)
        judge(loss, own[0], truth[0], 5e-6)
        upstream = torch.tensor(-1.7, device=device)
        grads = contrastive_loss_backward(upstream, *pair, *left, None, *numbers, softmax=softmax)
        found = [*grads[:2], grads[2][0], grads[2][1:]]
        for mine, theirs, true in zip(found, own[1:], truth[1:], strict=False):
            judge(mine, theirs, true, 5e-6)


def test_transposed_positives(device):
    scores, positives, temperature, bias = world(10, 14)
    turned = positives.t().contiguous().t()
    first, second = (
        results(scores, one, temperature, bias, "softmax", torch.float32, device, ours)
        for one in (positives, turned)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_stand_where_autograd_has_them(device, value, objective):
    scores, positives, temperature, bias = world(9, 11)
    scores[0][2, 3] = value
    scores[1][4] = value
    positives[2, 3] = False
    given = scores, positives, temperature, bias, objective
    truth = results(*given, torch.float64, device, reference.contrastive_loss)
    own = results(*given, torch.float32, device, reference.contrastive_loss)
    found = results(*given, torch.float32, device, ours)
    assert torch.equal(found[0].isnan(), truth[0].isnan())
    for mine, theirs, true in zip(found[1:3], own[1:3], truth[1:3], strict=True):
        judge(mine, theirs, true, 5e-6)


def test_a_row_that_begins_with_minus_infinity(device):
    """Longer than a block of columns: the running maximum is -inf when the second block comes."""
    scores, positives, _, bias = world(5, 300)
    scores[0][:, :270] = float("-inf")
    positives[:, :270], positives[:, 280] = False, True
    given = [scores[0], None], positives, torch.tensor(1.0), bias, "softmax"
    truth = results(*given, torch.float64, device, reference.contrastive_loss)
    found = results(*given, torch.float32, device, ours)
    assert truth[0].isfinite()
    for mine, exact in zip(found[:2], truth[:2], strict=True):
        torch.testing.assert_close(mine.double(), exact)


@pytest.mark.parametrize("objective,margin", [("softmax", 11.0), ("sigmoid", 22.0)])
def test_a_good_pair_s_loss_has_its_digits(device, objective, margin):
    """Sums over 257 patches are large: the loss is a small difference of large numbers."""
    scores = 230.0 + torch.linspace(-1, 1, 256).view(16, 16)
    scores.diagonal().add_(margin)
    pair, true = (scores, scores.t()), torch.eye(16, dtype=torch.bool)
    given = pair, true, torch.tensor(1.0), torch.tensor([-241.0, -242.0]), objective
    truth = results(*given, torch.float64, device, reference.contrastive_loss)
    assert 1e-5 < truth[0] < 1e-3
    found = results(*given, torch.float32, device, ours)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-4, atol=0)
    negatives = ~true.to(device)
    torch.testing.assert_close(found[1].double()[negatives], truth[1][negatives], rtol=5e-6, atol=0)


def test_a_row_without_a_positive_is_nan_in_loss_and_gradient(device):
    scores = torch.randn(3, 4, device=device, requires_grad=True)
    positives = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], device=device).bool()
    loss = contrastive_loss(scores, None, positives=positives, backend="triton")
    loss.backward()
    assert loss.isnan()
    assert scores.grad.isnan().all(dim=1).tolist() == [False, True, False]


def test_the_room_for_rows_is_what_the_kernels_leave():
    assert kernels.FIELDS.value == ops.FIELDS


def test_the_same_bits_every_time(device):
    given = world(40, 600)
    first, *others = (results(*given, "softmax", torch.float32, device, ours) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_huge_scores_do_not_overflow(device):
    scores, positives, temperature, bias = world(6, 6, scale=3e4)
    for objective in OBJECTIVES:
        found = results(
            scores, positives, temperature, bias, objective, torch.float32, device, ours
        )
        assert all(one.isfinite().all() for one in found)
