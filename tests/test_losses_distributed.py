"""Several processes against one: the loss and every gradient, in float64 over gloo."""

from __future__ import annotations

import re

import pytest
import torch
from support.loss_worlds import (
    EXPONENTS,
    Case,
    batches,
    in_processes,
    model_batch,
    model_losses,
    model_step,
    narrow_batches,
    step,
    together,
)

from bagformer import BagwiseContrastiveLoss

SOFTMAX = {"temperature": "learn"}
SIGMOID = {"objective": "sigmoid", "temperature": "learn", "reduction": "mean"}
TWO = [
    Case((3, 2), (3, 2), (4, 6), SOFTMAX),
    Case((3, 2), (3, 2), (4, 6), SIGMOID),
    Case((3, 2), (3, 2), (4, 6), SOFTMAX | {"mask_mode": "zero"}, "ids"),
    Case((2, 2), (2, 2), (4, 4), SIGMOID | {"mask_mode": "zero"}, "ids", masked=False),
    Case((2, 4), (3, 2), (5, 4), SOFTMAX | {"reduction": "mean"}, "positives"),
    Case((2, 4), (3, 2), (5, 4), SIGMOID, "positives"),
    Case((2, 2), (2, 2), (4, 4), {"directions": "text_to_image", "temperature": 0.5}, masked=False),
    Case((2, 3), (2, 3), (3, 5), SOFTMAX | {"mask_mode": "zero"}, masked=False),
    Case((1, 3), (1, 3), (2, 4), SIGMOID | {"directions": "image_to_text"}),
]
THREE = [
    Case((3, 1, 2), (3, 1, 2), (4, 6, 2), SOFTMAX, "ids"),
    Case((2, 2, 1), (1, 2, 3), (3, 3, 4), SIGMOID, "positives"),
]


@pytest.fixture(scope="module")
def worlds():
    return in_processes(TWO, THREE)


def close(found, wanted):
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def compare(worlds, case, key):
    world = len(worlds)
    whole = together(case)
    truth = step(case, whole)
    # the features' gradients are world times the truth, for DistributedDataParallel's mean
    sizes = {"text": case.texts, "image": case.images}
    parts = {name: (truth[name] * world).split(sizes[name]) for name in sizes}
    for rank, found in enumerate(worlds):
        mine = found[key]
        assert mine.keys() == truth.keys()
        for name in mine.keys() - sizes.keys():
            close(mine[name], truth[name])
        close(mine["image"], parts["image"][rank])
        close(mine["text"], parts["text"][rank][:, : case.bags[rank]])
        assert not parts["text"][rank][:, case.bags[rank] :].any()
        model = found[f"{key} model"]
        for name, value in model_step(case, whole).items():
            close(model[name], value)


@pytest.mark.parametrize("number", range(len(TWO)))
@pytest.mark.parametrize("gather", ["local", "ring"])
def test_two_processes_are_one(worlds, gather, number):
    compare([found["two"] for found in worlds[:2]], TWO[number], f"{gather} {number}")


@pytest.mark.parametrize("number", range(len(THREE)))
def test_three_processes_are_one(worlds, number):
    compare([found["three"] for found in worlds], THREE[number], f"ring {number}")


@pytest.mark.parametrize("number", [n for n, case in enumerate(TWO) if not case.labels])
def test_without_gathering_the_model_gets_the_mean_of_the_processes(worlds, number):
    case = TWO[number]
    alone = []
    for rank in range(2):
        batch = batches(case)[rank]
        for name, value in step(case, batch).items():
            close(worlds[rank]["two"][f"none {number}"][name], value)
        alone.append(model_step(case, batch))
    for found in worlds[:2]:
        model = found["two"][f"none {number} model"]
        for name in model.keys() - {"loss"}:
            close(model[name], (alone[0][name] + alone[1][name]) / 2)


@pytest.mark.parametrize("gather", ["local", "ring"])
def test_the_gradient_cache_in_two_processes(worlds, gather):
    truth = model_step(TWO[0], together(TWO[0]))
    for found in worlds[:2]:
        for name, value in truth.items():
            close(found["cached"][gather][name], value)


@pytest.mark.parametrize("gather", ["local", "ring"])
def test_narrow_gradients_are_summed_wide(worlds, gather):
    """All logits are 0, so each pair sends half of its other side, minus for the right pair: the
    sum over the processes is to be rounded once."""
    batches = narrow_batches()
    for rank, found in enumerate(worlds):
        for side, grad in enumerate(found["narrow"][gather]):
            others = [
                (-0.5 if place == rank else 0.5) * batch[1 - side]
                for place, batch in enumerate(batches)
            ]
            wanted = torch.stack([other.double() for other in others]).sum(dim=0).bfloat16()
            assert not torch.equal(others[0] + others[1] + others[2], wanted)
            assert torch.equal(grad, wanted)


def test_log_sum_exp_over_processes(worlds):
    wanted = torch.tensor(EXPONENTS).logsumexp(dim=0)
    assert wanted.isnan().tolist() == [False] * 4 + [True] and wanted[2] == -torch.inf
    for found in worlds:
        torch.testing.assert_close(found["log-sum-exp"], wanted, equal_nan=True)


def test_a_ring_holds_no_more_than_one_block(worlds):
    winners = 8 * 8 * 16  # of the bags of one process's texts
    for found in worlds:
        assert found["largest"]["local"] >= 3 * winners
        assert found["largest"]["ring"] <= winners


@pytest.mark.parametrize("gather", ["local", "ring"])
def test_bad_arguments_of_one_process_stop_all(worlds, gather):
    first, second = (found["refusals"][gather].split("\n") for found in worlds[:2])
    assert first[:2] == ["RuntimeError: process 1 refused its arguments to the loss"] * 2
    assert second[0].endswith("expected as many texts as images, got 1 and 2")
    assert second[1] == "ValueError: positives must be [2, 4], got [2, 3]"
    assert first[2] == second[2]
    assert "every process must bring the same feature size, got [4, 3]" in first[2]
    assert first[3] == second[3]
    assert "no True in row 3 (number 1 of process 1)" in first[3]


def test_a_model_takes_its_negatives_from_all_processes(worlds):
    truth = model_losses(*model_batch(), "none", None)
    for found in worlds[:2]:
        for gather in ("local", "ring"):
            for value, wanted in zip(found["model"][gather], truth, strict=True):
                close(value, wanted)


def test_wrong_labels_of_a_model_in_one_process_stop_all(worlds):
    first, second = (found["model"]["refusals"] for found in worlds[:2])
    assert first == ["RuntimeError: process 1 refused its arguments to the loss"] * 2
    assert second == [
        "ValueError: positives must be [2, 4], got [2, 3]",
        "TypeError: positives must be a torch.Tensor, got list",
    ]


def test_processes_that_disagree_are_all_told(worlds):
    first, second = (found["disagreements"] for found in worlds[:2])
    assert first == second
    wanted = [
        r"same kind of labels, got \['text_ids', 'image_ids'\]",
        r"same gather, got \['local', 'ring'\]",
        r"same directions, got \['both', 'text_to_image'\]",
        r"same objective, got \['softmax', 'sigmoid'\]",
        r"same gradient of the text, got \['wanted', 'not wanted'\]",
        r"same gradient of the temperature, got \['not wanted', 'wanted'\]",
    ]
    for said, message in zip(first, wanted, strict=True):
        assert re.search(f"^ValueError: every process must bring the {message}$", said), said


@pytest.mark.parametrize("gather", ["local", "ring"])
def test_gathering_needs_processes(gather):
    with pytest.raises(RuntimeError, match=f"gather='{gather}' needs torch.distributed.*'none'"):
        BagwiseContrastiveLoss(gather=gather)(torch.ones(2, 3, 4), torch.ones(2, 5, 4))
