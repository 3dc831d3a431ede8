"""What the plan of a call's masks says, and that a backward takes the one that its forward made."""

from __future__ import annotations

import pytest
import torch
from bagformer.kernels import gradients, plan, scoring
from bagformer.kernels.gradients import maxsim_backward
from bagformer.kernels.scoring import maxsim_forward
from support.judging import judge
from support.makers import features, mask

from bagformer import maxsim, reference

BAGS = 30
# bags that count: every class of slots, some of them empty, texts of none, one text
RAGGED = {
    "every class": [30, 3, 8, 0, 17, 16, 9, 1, 25],
    "no text of the first class": [30, 9, 17],
    "no text of the middle class": [30, 3, 20, 8],
    "the first class alone": [1, 8, 0],
    "nothing counts": [0, 0, 0],
    "one text": [12],
}


def ragged(counts, device, dtype=torch.float32, images=3):
    """Sides and masks; the bags that count are not the first ones."""
    text = features(len(counts), BAGS, 24).to(device, dtype)
    image = features(images, 20, 24, seed=1).to(device, dtype)
    text_mask = (torch.arange(BAGS) < torch.tensor(counts)[:, None]).roll(5, 1)
    image_mask = mask(images, 20, seed=2)
    image_mask[0] = False
    return text, image, text_mask.to(device), image_mask.to(device)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not written holds numbers that no test would pass with."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def spoil(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", lambda *size, **how: spoil(empty(*size, **how)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **how: spoil(new_empty(self, *size, **how))
    )


@pytest.mark.parametrize("n_texts", [1, 5, 300])
def test_the_plan_in_plain_words(device, n_texts):
    generator = torch.Generator().manual_seed(n_texts)
    counts = torch.randint(0, BAGS + 1, (n_texts,), generator=generator)
    text, image, text_mask, image_mask = ragged(counts.tolist(), device)
    n = n_texts
    winners = [torch.full((n, 3, BAGS), 7, dtype=torch.uint8).to(device), None]
    found = plan.make(text, image, (text_mask, image_mask), 3, tuple(winners))
    assert winners[0].eq(255).all()
    for tokens, keep in ((found.text, text_mask), (found.image, image_mask)):
        keep = keep.cpu()
        length = keep.shape[1]
        rows = tokens.rows[: keep.numel()].view(keep.shape).cpu()
        assert torch.equal(tokens.counts[: len(keep)].cpu(), keep.sum(1).int())
        for row, one in zip(rows, keep, strict=True):
            wanted = [*one.nonzero()[:, 0].tolist(), *(~one).nonzero()[:, 0].tolist()]
            assert row.tolist() == wanted
        holes = [length if one.all() else one.int().argmin().item() for one in keep]
        assert tokens.holes[: len(keep)].tolist() == holes
    rank = (counts > 8).int() + (counts > 16).int()
    order = torch.argsort(rank, stable=True)
    assert found.order[:n].tolist() == order.tolist()
    bounds = found.bounds.view(-1, 4)[:3, :2].tolist()
    ends = torch.bincount(rank, minlength=3).cumsum(0).tolist()
    assert bounds == [[start, end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("sorts,case", [*((True, case) for case in RAGGED), (False, "one text")])
def test_ragged_texts(device, monkeypatch, poisoned, case, sorts):
    counts = RAGGED[case]
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0 if sorts else 1 << 40)
    for dtype, mode in ((torch.float32, "exclude"), (torch.bfloat16, "zero")):
        sides = ragged(counts, device, dtype)
        held = torch.empty(plan.size(*sides[:2], (True, True)), dtype=torch.int32, device=device)
        scores = maxsim_forward(*sides, mode, want_argmax=True, held=held)
        want = reference.maxsim(
            *sides[:2], text_mask=sides[2], image_mask=sides[3], mask_mode=mode, return_argmax=True
        )
        for ours, true in zip(scores[:2], want[:2], strict=True):
            torch.testing.assert_close(ours, true.float(), rtol=1e-5, atol=1e-5)
        assert (scores[2].transpose(1, 2)[~sides[2]] == 255).all()
        assert (scores[3].transpose(1, 2)[~sides[3]] == 255).all()
        n = len(counts)
        slopes = features(n, 3, seed=3).to(device), features(3, n, seed=4).to(device)
        kept = maxsim_backward(*slopes, *sides, *scores[2:], mode, held=held)
        anew = maxsim_backward(*slopes, *sides, *scores[2:], mode)
        leaves = [side.double().requires_grad_() for side in sides[:2]]
        true = reference.maxsim(*leaves, text_mask=sides[2], image_mask=sides[3], mask_mode=mode)
        truth = torch.autograd.grad(true[:2], leaves, [slope.double() for slope in slopes])
        for ours, again, exact, keep in zip(kept, anew, truth, sides[2:], strict=True):
            assert torch.equal(ours, again) and not ours[~keep].any()
            judge(ours, exact.to(dtype), exact, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("images", [(4, 18), (3, 2, 18)], ids=["all pairs", "candidates"])
def test_a_compiled_step_hands_its_plan_over(device, monkeypatch, images):
    monkeypatch.setattr(scoring, "SORTED_PAIRS", 0)
    made = []
    make = plan.make
    monkeypatch.setattr(plan, "make", lambda *a, **k: made.append(True) or make(*a, **k))
    leaves = features(3, 12, 24).to(device), features(*images, 24, seed=1).to(device)
    keep = mask(3, 12).to(device)

    def step(text, image):
        scores = maxsim(text, image, text_mask=keep, backend="triton")
        return scores.text_to_image.sum() + scores.image_to_text.square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        made.clear()
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        results.append(torch.autograd.grad(function(*own), own))
        assert len(made) == 1
    for found in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], found, strict=True))


def test_a_plan_of_other_features_is_refused(device):
    text, image, *masks = ragged([30, 3], device)
    op = torch.ops.bagformer
    options = ("exclude", "both", "sum")
    found = op.maxsim(text, image, *masks, *options, True, "fp32", "triton")
    assert found[4].numel() == plan.size(text, image, (True, True))
    tail = "exclude", "sum", "fp32", "triton", True, True
    with pytest.raises(ValueError, match="plan must be the one that the forward gave"):
        op.maxsim_backward(
            *found[:2], text, image, *masks, *found[2:4], *tail, found[4][:-4].clone()
        )
    assert op.maxsim(text, image, *masks, *options, False, "fp32", "triton")[4].numel() == 0


def test_long_texts_leave_a_plan_as_well(device):
    """Their scores come in pieces of bags, their gradients do not."""
    text, image = features(2, 131, 16).to(device), features(2, 9, 16, seed=1).to(device)
    keep = mask(2, 131).to(device)
    held = torch.full((plan.size(text, image, (True, False)),), -9, dtype=torch.int32).to(device)
    winners = maxsim_forward(text, image, keep, want_argmax=True, held=held)[2:]
    slopes = features(2, 2).to(device), features(2, 2, seed=1).to(device)
    one = maxsim_backward(*slopes, text, image, keep, None, *winners, held=held)
    two = maxsim_backward(*slopes, text, image, keep, None, *winners)
    assert all(map(torch.equal, one, two))
    assert gradients._classes(text, image, keep) == 0
