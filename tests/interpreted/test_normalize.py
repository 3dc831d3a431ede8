"""l2_normalize: forward and backward against the reference and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels.normalize import l2_normalize_backward, l2_normalize_forward
from support.judging import judge

from bagformer import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _grad(x, grad):
    leaf = x.clone().requires_grad_()
    reference.l2_normalize(leaf).backward(grad)
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 5, 96), (33, 129), (2, 4097)])
def test_matches_the_reference(device, shape, dtype):
    generator = torch.Generator().manual_seed(len(shape) * 100 + shape[-1])
    x = torch.randn(shape, generator=generator).to(device, dtype)
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    judge(
        l2_normalize_forward(x), reference.l2_normalize(x), reference.l2_normalize(x.double()), 1e-6
    )
    judge(
        l2_normalize_backward(grad, x), _grad(x, grad), _grad(x.double(), grad.double()),
        1e-6 if dtype == torch.float32 else 2e-3,
    )  # fmt: skip


def test_rows_may_be_strided(device):
    x = torch.randn(5, 7, 40, device=device)
    for view in (x[:, ::2], x.transpose(0, 1), x[..., :33], x.transpose(1, 2)):
        torch.testing.assert_close(l2_normalize_forward(view), reference.l2_normalize(view))
        grad = torch.randn(view.shape, device=device)
        got = l2_normalize_backward(grad, view)
        torch.testing.assert_close(got, _grad(view, grad), rtol=1e-5, atol=1e-6)


def test_small_norms_are_clamped_and_zero_stays_zero(device):
    x = torch.zeros(3, 16, device=device)
    x[1, 0], x[2, 3] = 1e-5, 3.0
    torch.testing.assert_close(l2_normalize_forward(x, 1e-3), reference.l2_normalize(x, 1e-3))
    grad = torch.ones_like(x)
    got = l2_normalize_backward(grad, x, 1e-3)
    torch.testing.assert_close(got[:2], grad[:2] / 1e-3)
    assert got[2, 3].item() == 0


def test_nan_stays_in_its_own_row(device):
    x = torch.randn(4, 24, device=device)
    x[2, 5] = float("nan")
    assert l2_normalize_forward(x).isnan().all(1).tolist() == [False, False, True, False]


def test_empty(device):
    assert l2_normalize_forward(torch.empty(0, 8, device=device)).shape == (0, 8)
    assert l2_normalize_forward(torch.empty(3, 0, device=device)).shape == (3, 0)
