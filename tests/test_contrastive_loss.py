"""The contrastive loss of score matrices: value, gradients, what it keeps, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from support.tolerances import assert_no_worse

from bagformer import reference
from bagformer.ops.contrastive_loss import contrastive_loss

OBJECTIVES = reference.OBJECTIVES
FLOAT = torch.float64


def world(texts=5, images=7, dtype=FLOAT, objective="softmax", seed=0):
    """Scores of both directions, positives, temperature and, of a sigmoid, bias."""
    maker = torch.Generator().manual_seed(seed)
    scores = [
        3 * torch.randn(*shape, generator=maker, dtype=FLOAT)
        for shape in ((texts, images), (images, texts))
    ]
    positives = torch.rand(texts, images, generator=maker) < 0.3
    positives[:, 0] = positives[0] = True
    leaves = [one.to(dtype).requires_grad_() for one in scores]
    wide = reference.accumulation_dtype(dtype)
    temperature = torch.tensor(0.3, dtype=wide, requires_grad=True)
    bias = None
    if objective == "sigmoid":
        bias = torch.tensor([-2.0, 0.5], dtype=wide, requires_grad=True)
    return leaves, positives, temperature, bias


def gradients(loss, leaves, numbers):
    asked = [one for one in (*leaves, *numbers) if one is not None]
    return torch.autograd.grad(loss, asked, torch.tensor(-1.7, dtype=loss.dtype))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("missing", [None, 0, 1])
@pytest.mark.parametrize("dtype", [FLOAT, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients(dtype, missing, objective):
    leaves, positives, *numbers = world(9, 13, dtype, objective)
    leaves = [None if place == missing else one for place, one in enumerate(leaves)]
    true = [None if one is None else one.detach().double().requires_grad_() for one in leaves]
    exact = [None if one is None else one.detach().double().requires_grad_() for one in numbers]
    temperature, bias = numbers
    loss = contrastive_loss(
        *leaves, positives=positives, temperature=temperature, bias=bias, objective=objective
    )
    own = reference.contrastive_loss(leaves, positives, *numbers, objective)
    truth = reference.contrastive_loss(true, positives, *exact, objective)
    assert loss.dtype == reference.accumulation_dtype(dtype)
    found = [loss, *gradients(loss, leaves, numbers)]
    expected = [own, *gradients(own, leaves, numbers)]
    for mine, theirs, exactly in zip(
        found, expected, [truth, *gradients(truth, true, exact)], strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert_no_worse(mine, theirs, exactly)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_operator_keeps_the_rules_of_operators(objective):
    leaves, positives, temperature, bias = world(3, 4, objective=objective)
    arguments = (*leaves, positives, temperature, bias, 1.0, objective, "auto")
    torch.library.opcheck(torch.ops.bagformer.contrastive_loss.default, arguments)
    # as of CLS tokens: one matrix and its transpose
    square = torch.randn(4, 4, requires_grad=True)
    arguments = (square, square.t(), None, None, None, 0.07, objective, "auto")
    torch.library.opcheck(torch.ops.bagformer.contrastive_loss.default, arguments)
    op, true = torch.ops.bagformer.contrastive_loss, torch.rand(4, 4).t() > 0.5
    arguments = (
        square.detach().t(),
        square.detach().t(),
        true,
        None,
        None,
        0.07,
        objective,
        "auto",
    )
    grads = torch.ops.bagformer.contrastive_loss_backward(
        torch.ones(()), *op(*arguments)[1:], *arguments
    )
    assert grads[0].is_contiguous() and grads[1].is_contiguous()
    assert torch.autograd.gradcheck(
        lambda *x: contrastive_loss(
            *x[:2], positives=positives, temperature=x[2], bias=bias, objective=objective
        ),
        (*leaves, temperature),
    )


def test_without_positives_text_b_belongs_to_image_b():
    leaves, *_ = world(6, 6)
    loss = contrastive_loss(*leaves, temperature=0.7)
    target = torch.arange(6)
    cross = torch.nn.functional.cross_entropy
    truth = (cross(leaves[0] / 0.7, target) + cross(leaves[1] / 0.7, target)) / 2
    torch.testing.assert_close(loss, truth)


def test_all_positive_rows_have_their_lowest_loss_at_equal_scores():
    every = torch.ones(3, 3, dtype=torch.bool)
    level = contrastive_loss(torch.zeros(3, 3), None, positives=every)
    torch.testing.assert_close(level, torch.tensor(math.log(3)))
    assert contrastive_loss(torch.randn(3, 3), None, positives=every) > level


def test_minus_infinity_on_a_negative_is_no_nan():
    scores = torch.tensor([[1.0, float("-inf")], [0.0, 2.0]], requires_grad=True)
    loss = contrastive_loss(scores, scores.t())
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


def test_huge_scores_do_not_overflow():
    leaves, positives, *_ = world(dtype=torch.float32)
    for objective in OBJECTIVES:
        scores = [(1e6 * one.detach()).requires_grad_() for one in leaves]
        loss = contrastive_loss(*scores, positives=positives, objective=objective)
        loss.backward()
        assert loss.isfinite() and all(one.grad.isfinite().all() for one in scores)


def test_no_matrix_is_kept_for_the_backward_but_the_scores():
    leaves, positives, temperature, _ = world(64, 64, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = contrastive_loss(*leaves, positives=positives, temperature=temperature)
    matrices = {one.data_ptr() for one in kept if one.numel() == 64 * 64}
    assert matrices == {one.data_ptr() for one in (*leaves, positives)}
    loss.backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiles_whole_and_once(objective):
    leaves, positives, temperature, bias = world(dtype=torch.float32, objective=objective)

    def step(first, second, temperature):
        return contrastive_loss(
            first * 2, second, positives=positives, temperature=temperature.exp(), bias=bias,
            objective=objective,
        )  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    first, second = step(*leaves, temperature), compiled(*leaves, temperature)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(
        gradients(first, leaves, [temperature]), gradients(second, leaves, [temperature])
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_of_any_size_share_a_graph(objective):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def loss(scores):
        return contrastive_loss(scores * 2, scores.t() * 2, objective=objective)

    torch.compiler.reset()
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend=counting)
    for size in (5, 6, 7, 11):
        scores = torch.randn(size, size)
        torch.testing.assert_close(compiled(scores), loss(scores))
    assert len(graphs) == 1


class _Loss(torch.nn.Module):
    def forward(self, scores):
        return contrastive_loss(scores, scores.t())


def test_exports_with_a_size_of_its_own():
    size = torch.export.Dim("size", min=2)
    made = torch.export.export(_Loss(), (torch.randn(5, 5),), dynamic_shapes=({0: size, 1: size},))
    scores = torch.randn(9, 9)
    torch.testing.assert_close(made.module()(scores), _Loss()(scores))


@pytest.mark.parametrize("name", ["temperature", "bias"])
def test_what_the_numbers_cannot_do_is_said(name):
    def loss(number):
        given = {"temperature": torch.tensor(0.3), "bias": torch.zeros(2), name: number}
        return contrastive_loss(torch.eye(3), None, objective="sigmoid", **given)

    number = torch.tensor(0.3) if name == "temperature" else torch.ones(2)
    with pytest.raises(RuntimeError, match=f"{name} carries a forward-mode tangent"):
        torch.func.jvp(loss, (number,), (torch.ones_like(number),))
    with pytest.raises(RuntimeError, match=f"{name} is differentiated by torch.func"):
        torch.func.grad(loss)(number)


def test_a_row_without_a_positive_is_nan_in_loss_and_gradient():
    scores = torch.randn(3, 4, requires_grad=True)
    positives = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()
    loss = contrastive_loss(scores, None, positives=positives)
    loss.backward()
    assert loss.isnan()
    assert scores.grad.isnan().all(dim=1).tolist() == [False, True, False]


def test_differentiable_once():
    leaves, positives, *_ = world()
    loss = contrastive_loss(*leaves, positives=positives)
    grad = torch.autograd.grad(loss, leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="contrastive_loss is differentiable once"):
        grad.sum().backward()


SQUARE = torch.zeros(3, 3)
BAD = [
    ({"text_to_image": None, "image_to_text": None}, ValueError, "give text_to_image, image_to"),
    ({"text_to_image": [1.0]}, TypeError, "text_to_image must be a torch.Tensor, got list"),
    ({"text_to_image": SQUARE.long()}, TypeError, "text_to_image must be .* got torch.int64"),
    ({"text_to_image": torch.zeros(0, 3)}, ValueError, r"at least one text .*got \[0, 3\]"),
    ({"text_to_image": torch.zeros(3)}, ValueError, r"must be a matrix .*got \[3\]"),
    ({"image_to_text": torch.zeros(2, 3)}, ValueError, r"must be \[3, 3\] .*got \[2, 3\]"),
    ({"image_to_text": SQUARE.double()}, TypeError, "torch.float32 on cpu as .*torch.float64"),
    (
        {"text_to_image": torch.zeros(2, 3), "image_to_text": None},
        ValueError, "as many texts as images, got 2 and 3",
    ),
    ({"positives": SQUARE}, TypeError, "positives must be bool, got torch.float32"),
    ({"positives": SQUARE[:2] > 0}, ValueError, r"positives must be \[3, 3\], got \[2, 3\]"),
    ({"temperature": 0.0}, ValueError, "temperature must be a number above 0, got 0.0"),
    ({"temperature": 10**400}, ValueError, "temperature must be a number above 0, got 1000"),
    ({"temperature": True}, ValueError, "temperature must be a number above 0, got True"),
    ({"temperature": torch.ones(1)}, ValueError, r"temperature must be a float tensor \[\]"),
    ({"bias": torch.zeros(2)}, ValueError, "bias: a softmax does not change"),
    (
        {"bias": torch.zeros(3), "objective": "sigmoid"},
        ValueError, r"bias must be a float tensor \[2\], got torch.float32 \[3\]",
    ),
    ({"objective": "hinge"}, ValueError, "objective must be one of softmax, sigmoid; got 'hinge'"),
    ({"backend": "gpu"}, ValueError, "backend must be one of .*'gpu'"),
    ({"text_to_image": SQUARE.to("meta")}, TypeError, "on meta as text_to_image is"),
]  # fmt: skip


@pytest.mark.parametrize("changed,error,message", BAD, ids=[str(row[2])[:40] for row in BAD])
def test_bad_arguments(changed, error, message):
    given = {"text_to_image": SQUARE, "image_to_text": SQUARE, **changed}
    scores = given.pop("text_to_image"), given.pop("image_to_text")
    with pytest.raises(error, match=message):
        contrastive_loss(*scores, **given)
