"""bag_pool and l2_normalize on every instruction set of this machine, past the edges of vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.makers import features, instruction_sets, mask, same_bits
from support.tolerances import assert_no_worse

from bagformer import bag_pool, l2_normalize, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 7, 8, 9, 15, 16, 17, 23, 31, 33, 63, 64, 65, 80, 127, 130, 257, 768]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=instruction_sets(), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_unit_vectors_and_their_gradient(width, dtype):
    x, upstream = features(5, width, dtype=dtype), features(5, width, seed=1, dtype=dtype)
    x[1] = 0
    x[2, : width - 1] = 0  # the last element alone: the sum of squares must not miss it
    x[3, 1:] = 0
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, own, truth = l2_normalize(x), F.normalize(x, dim=-1), reference.l2_normalize(wide)
    if dtype == torch.float16:  # there PyTorch's eps is 0, and a zero vector NaN
        own = own.nan_to_num()
    assert_no_worse(ours.detach(), own.detach(), truth.detach())
    (mine,) = torch.autograd.grad(ours, x, upstream)
    (theirs,) = torch.autograd.grad(own, x, upstream)
    (true,) = torch.autograd.grad(truth, wide, upstream.double())
    # of a zero vector: upstream over eps, too large for float16
    rows = [0, 2, 3, 4]
    assert_no_worse(mine[rows], theirs[rows], true[rows], "gradient")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [3, 16, 21, 64, 70, 257])
def test_pooled_unit_vectors(width, dtype):
    hidden = features(2, 9, width, dtype=dtype).requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    offsets = torch.tensor([[0, 1, 1, 4, 9], [1, 3, 6, 7, 8]], dtype=torch.int32)
    keep = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]).bool()
    upstream = features(2, 4, width, seed=1, dtype=dtype)

    def plain(tokens):
        sums = reference.bag_pool(tokens, offsets)
        sums = sums.to(reference.accumulation_dtype(sums.dtype))
        return torch.where(keep[..., None], F.normalize(sums, dim=-1), 0.0).to(tokens.dtype)

    for normalize, truth_of in ((True, plain), (False, None)):
        if truth_of is None:

            def truth_of(tokens):
                return torch.where(keep[..., None], reference.bag_pool(tokens, offsets), 0.0)

        ours = bag_pool(hidden, offsets, mask=keep, normalize=normalize)
        own, truth = truth_of(hidden), truth_of(wide)
        assert_no_worse(ours.detach(), own.detach(), truth.detach(), f"{normalize}")
        grads = [
            torch.autograd.grad(value, leaf, upstream.to(value.dtype))[0]
            for value, leaf in ((ours, hidden), (own, hidden), (truth, wide))
        ]
        assert_no_worse(*grads, f"gradient {normalize}")


@pytest.mark.parametrize("power", [-140, -110, -101, -100, -99, -60, 0, 60, 99, 100, 101, 120])
def test_long_and_short_vectors(power):
    """Where a quotient by multiplication would overflow or lose bits, it is a division."""
    x = features(4, 65).clamp(-4, 4) * 2.0 ** (power - 3)
    ours, truth = l2_normalize(x, 1e-30), reference.l2_normalize(x.double(), 1e-30)
    if power >= 60:  # squares beyond float32, as in PyTorch
        own = F.normalize(x, dim=-1, eps=1e-30)
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-7)
    else:
        smallest = 2.0**-149 / max(1e-30, float(x.norm(dim=1).min()))
        if power <= -60:  # squares below float32's: the norm is 0 and eps divides, as in PyTorch
            torch.testing.assert_close(ours, F.normalize(x, dim=-1, eps=1e-30), rtol=1e-5, atol=0)
        else:
            torch.testing.assert_close(ours.double(), truth, rtol=3e-7, atol=smallest)


@pytest.mark.parametrize("width", [16, 31, 64, 70])
def test_quotients_are_good_to_the_last_bit(width):
    """A vector of one element becomes its sign; others are off by the rounding of their norm, by
    the square root's of it and by one of their own."""
    x = torch.zeros(4000, width)
    x[:, 0] = torch.linspace(0.1, 7, 4000)
    assert l2_normalize(x)[:, 0].eq(1).all()
    x[:, 0], x[:, -1] = 3, torch.linspace(0.1, 7, 4000)
    truth = reference.l2_normalize(x.double())[:, 0]
    assert ((l2_normalize(x)[:, 0] - truth).abs() <= 1.25 * 2.0**-23 * truth).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [17, 40, 70])
def test_nan_and_inf_stay_in_their_row(width, dtype):
    x = features(7, width, dtype=dtype)
    clean = l2_normalize(x)
    x[1, width - 1], x[3, 0], x[5, 2] = NAN, INF, -INF
    ours, own = l2_normalize(x), F.normalize(x.double(), dim=-1).to(dtype)
    torch.testing.assert_close(ours[1::2], own[1::2], equal_nan=True)
    assert same_bits(ours[::2], clean[::2])
    offsets = torch.tensor([[0, 2, 4, 7]])
    pooled = bag_pool(x[None], offsets)
    true = reference.bag_pool(x[None].double(), offsets).to(dtype)
    torch.testing.assert_close(pooled, true, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [9, 24, 33, 200])
def test_neighbours_strides_and_threads_change_no_bit(width, dtype):
    hidden = features(30, 11, width, dtype=dtype)
    offsets = torch.arange(0, 12, 1).clamp(max=11)[None].repeat(30, 1)
    offsets[::2] = torch.tensor([0, 1, 1, 3, 4, 7, 7, 8, 9, 10, 11, 11])
    keep = mask(30, 11)
    call = {"mask": keep, "normalize": True}
    whole = bag_pool(hidden, offsets, **call)
    roomy = torch.full((30, 11, width + 3), NAN, dtype=dtype)
    roomy[..., 2:-1] = hidden
    assert same_bits(bag_pool(roomy[..., 2:-1], offsets, **call), whole)
    turned = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    assert same_bits(bag_pool(turned, offsets, **call), whole)
    for row in (0, 17):
        one = bag_pool(hidden[row : row + 1], offsets[row : row + 1], mask=keep[row : row + 1])
        assert same_bits(one, bag_pool(hidden, offsets, mask=keep)[row : row + 1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        large = hidden.repeat(40, 1, 1)
        many = bag_pool(large, offsets.repeat(40, 1), mask=keep.repeat(40, 1), normalize=True)
        assert same_bits(many, whole.repeat(40, 1, 1))
        assert same_bits(l2_normalize(large), l2_normalize(hidden).repeat(40, 1, 1))
    finally:
        torch.set_num_threads(before)
