"""bag_pool: forward and backward, plain and with normalisation and mask fused in."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels.bag_pool import bag_pool_backward, bag_pool_forward
from support.judging import judge

from bagformer import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _offsets(batch: int, n_tokens: int, n_bags: int, generator, low: int = 0) -> torch.Tensor:
    """Random cuts, empty bags included; each row ends at ``n_tokens`` when ``low`` is 0."""
    cuts = torch.randint(low, n_tokens + 1 - low, (batch, n_bags + 1), generator=generator)
    cuts = cuts.sort(dim=1).values
    if not low:
        cuts[:, 0], cuts[:, -1] = 0, n_tokens
    return cuts.to(torch.int32)


def _expected(hidden, offsets, mask, normalize):
    pooled = reference.bag_pool(hidden, offsets)
    if normalize:
        pooled = reference.l2_normalize(pooled)
    return pooled if mask is None else pooled.masked_fill(~mask[..., None], 0)


def _grad(hidden, offsets, mask, normalize, grad):
    leaf = hidden.clone().requires_grad_()
    wide = leaf.to(reference.accumulation_dtype(hidden.dtype))
    _expected(wide, offsets, mask, normalize).to(hidden.dtype).backward(grad)
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize,masked", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("shape", [(3, 25, 20, 64), (2, 7, 1, 96), (1, 40, 33, 200)])
def test_matches_the_reference(device, shape, normalize, masked, dtype):
    batch, n_tokens, n_bags, width = shape
    generator = torch.Generator().manual_seed(n_tokens)
    hidden = torch.randn(batch, n_tokens, width, generator=generator).to(device, dtype)
    offsets = _offsets(batch, n_tokens, n_bags, generator).to(device)
    grad = torch.randn(batch, n_bags, width, generator=generator).to(device, dtype)
    mask = (torch.rand(batch, n_bags, generator=generator) < 0.7).to(device) if masked else None
    options = (offsets, mask, normalize)
    if normalize:  # an empty bag's gradient is grad / eps: not a value to compare at a tolerance
        grad[(offsets[:, 1:] == offsets[:, :-1])] = 0
    truth = _expected(hidden.double(), *options)
    wide = hidden.float()
    judge(bag_pool_forward(hidden, *options), _expected(wide, *options).to(dtype), truth, 1e-6)
    judge(
        bag_pool_backward(grad, hidden if normalize else None, offsets, mask, n_tokens),
        _grad(hidden, *options, grad),
        _grad(hidden.double(), *options, grad.double()), 1e-6,
    )  # fmt: skip


def test_tokens_of_no_bag_get_no_gradient(device):
    generator = torch.Generator().manual_seed(5)
    offsets = _offsets(4, 30, 9, generator, low=3).to(device)
    hidden = torch.randn(4, 30, 48, device=device)
    grad = torch.randn(4, 9, 48, device=device)
    torch.testing.assert_close(
        bag_pool_backward(grad, None, offsets, None, 30), _grad(hidden, offsets, None, False, grad)
    )


def test_strided_hidden_states(device):
    hidden = torch.randn(2, 26, 80, device=device)[:, 1:, :72]
    offsets = _offsets(2, 25, 10, torch.Generator().manual_seed(1)).to(device)
    torch.testing.assert_close(
        bag_pool_forward(hidden, offsets), reference.bag_pool(hidden, offsets)
    )


def test_nan_reaches_its_own_bag_and_no_other(device):
    hidden = torch.randn(1, 6, 16, device=device)
    hidden[0, 3] = float("nan")
    offsets = torch.tensor([[0, 2, 4, 4, 6]], dtype=torch.int32, device=device)
    mask = torch.tensor([[True, False, True, True]], device=device)
    pooled = bag_pool_forward(hidden, offsets)
    assert pooled.isnan().all(-1).tolist() == [[False, True, False, False]]
    assert not bag_pool_forward(hidden, offsets, mask, True).isnan().any()
    grad = torch.ones(1, 4, 16, device=device)
    grad[0, 2] = 0
    assert not bag_pool_backward(grad, hidden, offsets, mask, 6).isnan().any()


def test_no_bags_and_wild_offsets(device):
    hidden = torch.randn(2, 5, 8, device=device)
    none = torch.zeros(2, 1, dtype=torch.int32, device=device)
    assert bag_pool_forward(hidden, none).shape == (2, 0, 8)
    assert not bag_pool_backward(torch.empty(2, 0, 8, device=device), None, none, None, 5).any()
    wild = torch.tensor([[-7, 3, 900], [0, 0, 5]], dtype=torch.int32, device=device)
    tame = torch.tensor([[0, 3, 5], [0, 0, 5]], dtype=torch.int32, device=device)
    torch.testing.assert_close(bag_pool_forward(hidden, wild), bag_pool_forward(hidden, tame))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("n_bags,width", [(300, 40), (9, 700), (140, 2)])
def test_offsets_that_fall_or_leave_the_row_are_made_to_rise(device, n_bags, width, index):
    """As ``clamp`` and ``cummax`` would, over more bags than a program and than a look holds."""
    generator = torch.Generator().manual_seed(n_bags)
    wild = torch.randint(-20, 60, (2, n_bags + 1), generator=generator).to(device, index)
    wild[1] = wild[1].sort().values
    if index == torch.int64:
        wild[0, n_bags // 2] = 1 << 40
    tame = wild.clamp(0, 31).cummax(dim=1).values.to(torch.int32)
    hidden = torch.randn(2, 31, width, generator=generator).to(device)
    grad = torch.randn(2, n_bags, width, generator=generator).to(device)
    torch.testing.assert_close(bag_pool_forward(hidden, wild), reference.bag_pool(hidden, tame))
    torch.testing.assert_close(
        bag_pool_backward(grad, None, wild, None, 31), _grad(hidden, tame, None, False, grad)
    )


def test_strides_of_offsets_mask_and_gradient(device):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 12, 24, generator=generator).to(device)
    row = _offsets(1, 12, 5, generator).to(device)
    keep = (torch.rand(5, 3, generator=generator) < 0.6).to(device).T
    grad = torch.randn(5, 3, 24, generator=generator).to(device).transpose(0, 1)
    spread = torch.ones(1, 1, 1, device=device).expand(3, 5, 24)
    for offsets, slope in ((row.expand(3, -1), grad), (row.T.repeat(1, 3).T, spread)):
        plain = offsets.contiguous(), keep.contiguous()
        for one, two in (
            (bag_pool_forward(hidden, offsets, keep), bag_pool_forward(hidden, *plain)),
            (
                bag_pool_backward(slope, hidden, offsets, keep, 12),
                bag_pool_backward(slope.contiguous(), hidden, *plain, 12),
            ),
        ):
            assert torch.equal(one, two)
