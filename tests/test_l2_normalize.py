"""l2_normalize against torch.nn.functional.normalize and the reference."""

from __future__ import annotations

import pytest
import torch
from support.makers import features, same_bits
from support.tolerances import assert_no_worse

from bagformer import l2_normalize, reference

BACKENDS = ["cpu", "torch", "reference"]
SHAPES = [(1,), (4, 3), (0, 3), (2, 0), (2, 3, 16), (2, 2, 2, 17), (1, 300), (130, 5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, backend):
    x = features(*shape, dtype=dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    upstream = features(*shape, seed=1, dtype=dtype)
    ours, own = l2_normalize(x, backend=backend), torch.nn.functional.normalize(x, dim=-1)
    truth = reference.l2_normalize(wide)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_no_worse(ours.detach(), own.detach(), truth.detach())
    (mine,) = torch.autograd.grad(ours, x, upstream)
    (theirs,) = torch.autograd.grad(own, x, upstream)
    (true,) = torch.autograd.grad(truth, wide, upstream.double())
    assert_no_worse(mine, theirs, true, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_vectors_meet_the_clamp_as_in_pytorch(backend):
    x = torch.tensor([[0.0, 0.0], [3e-13, 4e-13], [3e-12, 4e-12]], dtype=torch.float64)
    x.requires_grad_()
    ours, own = l2_normalize(x, backend=backend), torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(ours, own)
    upstream = features(3, 2, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, upstream), torch.autograd.grad(own, x, upstream)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_large_eps(backend):
    x = features(3, 5, dtype=torch.float64).requires_grad_()
    for eps in (1e-12, 100.0):
        assert torch.autograd.gradcheck(lambda y, eps=eps: l2_normalize(y, eps, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_row(backend):
    x = features(4, 6)
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    torch.testing.assert_close(
        l2_normalize(x, backend=backend), torch.nn.functional.normalize(x, dim=-1), equal_nan=True
    )


def test_narrow_values_round_as_pytorch_does():
    """Every finite float16 and bfloat16 goes through; a one-element vector becomes its sign."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        ours = l2_normalize(every[:, None])[:, 0]
        truth = reference.l2_normalize(every[:, None])[:, 0]
        torch.testing.assert_close(ours, truth, rtol=0, atol=0, equal_nan=True)
        pair = torch.stack([every, torch.full_like(every, 0.5)], dim=1)
        ours, own = l2_normalize(pair), torch.nn.functional.normalize(pair.float(), dim=1)
        torch.testing.assert_close(ours, own.to(dtype), rtol=0, atol=1e-2, equal_nan=True)


def test_strides_and_threads_change_no_bit():
    x = features(40, 200, 9)
    plain = l2_normalize(x)
    assert same_bits(plain, l2_normalize(x.transpose(0, 2).contiguous().transpose(0, 2)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert same_bits(plain, l2_normalize(x))
    finally:
        torch.set_num_threads(before)


def test_a_second_derivative_is_refused():
    x = features(2, 3).requires_grad_()
    (first,) = torch.autograd.grad(l2_normalize(x)[0, 0].square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bagformer::l2_normalize is differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (("x",), TypeError, "x must be a torch.Tensor, got str"),
        ((torch.ones(2).to_sparse(),), TypeError, "x must be a dense tensor, got layout"),
        ((torch.ones(2).int(),), TypeError, "x must be float32, .* got torch.int32"),
        ((torch.tensor(1.0),), ValueError, r"x must have shape \[..., D\]"),
        ((torch.ones(2), -1.0), ValueError, "eps must be positive and finite, got -1.0"),
        ((torch.ones(2), None), TypeError, "eps must be a number, got NoneType"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        l2_normalize(*arguments)
