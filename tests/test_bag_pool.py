"""bag_pool against the reference: sums, fused normalisation and mask, gradients, wrong input."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.makers import features, mask, same_bits
from support.tolerances import assert_no_worse

from bagformer import bag_pool, reference

BACKENDS = ["cpu", "torch", "reference"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# name, T, offsets of one row
ROWS = [
    ("no_bag", 3, [0]),
    ("no_token", 0, [0, 0]),
    ("single", 1, [0, 1]),
    ("empty_in_the_middle", 5, [0, 2, 2, 5]),
    ("all_empty", 4, [2, 2, 2]),
    ("one_of_all", 25, [0, 25]),
    ("starts_late_ends_early", 6, [1, 3, 5]),
    ("padded", 5, [0, 1, 4, 5, 5, 5]),
]


def truth_of(hidden, offsets, keep, normalize, eps=1e-12):
    pooled = reference.bag_pool(hidden, offsets)
    if normalize:  # in float16 the clamp would be 0
        wide = pooled.to(reference.accumulation_dtype(pooled.dtype))
        pooled = torch.nn.functional.normalize(wide, dim=-1, eps=eps).to(pooled.dtype)
    return pooled if keep is None else torch.where(keep[..., None], pooled, 0.0)


@pytest.mark.parametrize("name,tokens,bounds", ROWS, ids=[row[0] for row in ROWS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums(name, tokens, bounds, backend):
    for batch, width, dtype in itertools.product((0, 1, 3), (1, 7, 64), FLOATS):
        hidden = features(batch, tokens, width, dtype=dtype)
        offsets = torch.tensor([bounds] * batch, dtype=torch.int32).reshape(batch, len(bounds))
        truth = reference.bag_pool(hidden.double(), offsets)
        ours = bag_pool(hidden, offsets, backend=backend)
        assert ours.dtype == dtype
        assert_no_worse(
            ours, reference.bag_pool(hidden, offsets), truth, f"{batch} {width} {dtype}"
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_normalise_and_mask(dtype, backend):
    hidden, keep = features(2, 5, 33, dtype=dtype), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    hidden[0, 2:4] = 0
    offsets = torch.tensor([[0, 2, 4, 5], [0, 0, 3, 5]])
    for normalize, mask_ in itertools.product((True, False), (None, keep)):
        truth = truth_of(hidden.double(), offsets, mask_, normalize)
        own = truth_of(hidden, offsets, mask_, normalize)
        ours = bag_pool(hidden, offsets, mask=mask_, normalize=normalize, backend=backend)
        assert_no_worse(ours, own, truth, f"{normalize} {mask_ is not None}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(backend, normalize):
    hidden = features(2, 6, 5, dtype=torch.float64).requires_grad_()
    offsets = torch.tensor([[0, 2, 2, 6], [1, 3, 4, 5]])
    upstream = features(2, 3, 5, seed=1, dtype=torch.float64)
    for keep in (None, torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()):

        def run(h, keep=keep):
            return bag_pool(h, offsets, mask=keep, normalize=normalize, backend=backend)

        assert torch.autograd.gradcheck(run, (hidden,))
        truth = torch.autograd.grad(truth_of(hidden, offsets, keep, normalize), hidden, upstream)
        ours = torch.autograd.grad(run(hidden), hidden, upstream)
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_below_the_clamp_is_the_division_alone(backend):
    hidden = torch.tensor([[[3e-3, 4e-3], [1.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    pooled = bag_pool(hidden, torch.tensor([[0, 1, 2]]), normalize=True, eps=0.1, backend=backend)
    (ours,) = torch.autograd.grad(pooled[0, 0].sum(), hidden)
    torch.testing.assert_close(ours, torch.tensor([[[10.0, 10.0], [0.0, 0.0]]]).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_bag(backend):
    hidden = features(1, 4, 3)
    hidden[0, 1, 0], hidden[0, 3, 1] = float("nan"), float("inf")
    pooled = bag_pool(hidden, torch.tensor([[0, 1, 2, 3, 4]]), backend=backend)
    assert torch.equal(pooled.isfinite().all(-1), torch.tensor([[True, False, True, False]]))
    keep = torch.tensor([[True, False, True, False]])
    for normalize in (True, False):
        pooled = bag_pool(
            hidden,
            torch.tensor([[0, 1, 2, 3, 4]]),
            mask=keep,
            normalize=normalize,
            backend=backend,
        )
        assert pooled.isfinite().all() and not pooled[~keep].any()


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(0, 12), min_size=4, max_size=4), min_size=1, max_size=5),
    width=st.integers(1, 20),
    seed=st.integers(0, 1000),
    normalize=st.booleans(),
)
def test_any_offsets(cuts, width, seed, normalize):
    offsets = torch.tensor([sorted(row) for row in cuts], dtype=torch.int32)
    hidden = features(len(cuts), 12, width, seed=seed, dtype=torch.float64)
    keep = mask(len(cuts), 3, seed=seed)
    truth = truth_of(hidden, offsets, keep, normalize)
    for backend in ("cpu", "torch"):
        ours = bag_pool(hidden, offsets, mask=keep, normalize=normalize, backend=backend)
        torch.testing.assert_close(ours, truth)


def test_strides_offset_dtype_and_threads_change_no_bit():
    hidden, offsets = features(4, 9, 30), torch.tensor([[0, 2, 5, 9]]).expand(4, -1)
    plain = bag_pool(hidden, offsets.contiguous(), normalize=True)
    moved = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    assert not moved.is_contiguous() and not offsets.is_contiguous()
    assert same_bits(plain, bag_pool(moved, offsets.int(), normalize=True))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert same_bits(plain, bag_pool(hidden, offsets, normalize=True))
    finally:
        torch.set_num_threads(before)


def test_takes_bags_objects():
    hidden, offsets = features(1, 3, 2), torch.tensor([[0, 2, 3]], dtype=torch.int32)
    assert torch.equal(
        bag_pool(hidden, SimpleNamespace(offsets=offsets)), bag_pool(hidden, offsets)
    )


def test_a_second_derivative_is_refused():
    hidden = features(1, 3, 2).requires_grad_()
    pooled = bag_pool(hidden, torch.tensor([[0, 3]]), normalize=True).square().sum()
    (first,) = torch.autograd.grad(pooled, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="bagformer::bag_pool is differentiable once"):
        first.sum().backward()


HIDDEN, OFFSETS = features(2, 5, 4), torch.tensor([[0, 2, 5], [0, 1, 5]])
WRONG = [
    ({"hidden": [1.0]}, TypeError, "hidden_states must be a torch.Tensor, got list"),
    ({"hidden": HIDDEN.long()}, TypeError, "hidden_states must be float32, .* got torch.int64"),
    ({"hidden": HIDDEN[0]}, ValueError, r"hidden_states must have shape \[B, T, D\], got \[5, 4\]"),
    ({"bags": [[0, 5]]}, TypeError, "bags must be a torch.Tensor, got list"),
    ({"bags": OFFSETS.float()}, TypeError, "offsets must be int32 or int64, got torch.float32"),
    ({"bags": OFFSETS[0]}, ValueError, r"offsets must have shape \[B, N \+ 1\], got \[3\]"),
    ({"bags": OFFSETS[:1]}, ValueError, "offsets must have B = 2 rows as hidden_states, got 1"),
    ({"bags": OFFSETS.to("meta")}, ValueError, "on the device of hidden_states"),
    ({"bags": OFFSETS + 1}, ValueError, "within 0..T = 5, got 6 at row 0, place 2"),
    ({"bags": OFFSETS - 1}, ValueError, "within 0..T = 5, got -1 at row 0, place 0"),
    ({"bags": torch.tensor([[0, 2, 5], [0, 4, 3]])}, ValueError, "got 4 then 3 at row 1, places 1"),
    ({"mask": mask(2, 3)}, ValueError, r"mask must have shape \[2, 2\] as the bags, got \[2, 3\]"),
    ({"mask": mask(2, 2).int()}, TypeError, "mask must be bool"),
    ({"normalize": 1}, TypeError, "normalize must be a bool, got int"),
    ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ({"eps": "small"}, TypeError, "eps must be a number, got str"),
    ({"backend": "gpu"}, ValueError, "backend must be one of auto"),
]


@pytest.mark.parametrize("wrong,error,message", WRONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments(wrong, error, message, backend):
    call = {"hidden": HIDDEN, "bags": OFFSETS, "backend": backend, **wrong}
    with pytest.raises(error, match=message):
        bag_pool(call.pop("hidden"), call.pop("bags"), **call)
