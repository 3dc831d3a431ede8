"""Sigmoid objective, ids, presets, compilation, and the total of the model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from support.models import make_inputs, tiny_model
from test_losses import features

from bagformer import BagwiseContrastiveLoss, reference
from bagformer.losses import (
    PAPER_LOSS,
    positives_from_ids,
)
from bagformer.models.total_loss import PAPER_TOTAL

TEXT_IDS, IMAGE_IDS = torch.tensor([7, 8, 7, 9]), torch.tensor([1, 7, 3, 1])
# texts 0 and 2 are the same, images 0 and 3 are; that image 1 has a text's number means nothing
SAME = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]).bool()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("directions", ["both", "text_to_image", "image_to_text"])
def test_sigmoid_is_a_logistic_loss_of_each_pair(directions):
    text, image, text_mask, image_mask = features(3, 4)
    positives = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    loss = BagwiseContrastiveLoss(directions, "zero", "mean", "learn", objective="sigmoid").double()
    with torch.no_grad():
        loss.bias.copy_(torch.tensor([-1.5, 0.5]))
    found = loss(text, image, text_mask, image_mask, positives)
    masks = {"text_mask": text_mask, "image_mask": image_mask}
    scores = reference.maxsim(text, image, **masks, mask_mode="zero", reduction="mean")
    truth = []
    for direction, bias in zip(("text_to_image", "image_to_text"), loss.bias, strict=True):
        if directions not in ("both", direction):
            continue
        matrix = getattr(scores, direction)
        right = positives if direction == "text_to_image" else positives.t()
        chance = 1 / (1 + torch.exp(-(matrix / loss.log_temperature.exp() + bias)))
        pairs = torch.where(right, chance, 1 - chance).log()
        truth.append(-pairs.sum() / len(matrix))
    truth = sum(truth) / len(truth)
    torch.testing.assert_close(found, truth)
    inputs = (text, image, loss.bias, loss.log_temperature)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)
    )


def test_sigmoid_starts_with_a_bias_for_each_direction():
    assert BagwiseContrastiveLoss(objective="sigmoid").bias.tolist() == [-10.0, -10.0]
    assert BagwiseContrastiveLoss().bias is None


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gather", ["none", "local", "ring"])
def test_equal_ids_are_positives(alone, gather, objective):
    text, image, *_ = features()
    options = {"objective": objective, "temperature": 0.3}
    wanted = BagwiseContrastiveLoss(**options)(text, image, positives=SAME)
    loss = BagwiseContrastiveLoss(**options, gather=gather)
    found = loss(text, image, text_ids=TEXT_IDS, image_ids=IMAGE_IDS)
    torch.testing.assert_close(found, wanted)
    for first, second in zip(
        torch.autograd.grad(found, (text, image)),
        torch.autograd.grad(wanted, (text, image)),
        strict=True,
    ):
        torch.testing.assert_close(first, second)


def test_ids_need_pairs():
    text, image, *_ = features(2, 3)
    for name in ("text_ids", "image_ids"):
        with pytest.raises(ValueError, match=f"{name} needs pairs, .*got 2 and 3.*positives"):
            BagwiseContrastiveLoss()(text, image, **{name: torch.arange(2)})


def test_positives_from_ids():
    assert torch.equal(positives_from_ids(TEXT_IDS, IMAGE_IDS), SAME)
    eye = torch.eye(4, dtype=torch.bool)
    only = eye.clone()
    only[0, 2] = only[2, 0] = True
    assert torch.equal(positives_from_ids(TEXT_IDS, None), only)
    assert torch.equal(positives_from_ids(None, torch.arange(4)), eye)


@pytest.mark.parametrize("gather", ["none", "local"])
@pytest.mark.parametrize(
    "labels,error,message",
    [
        ({"text_ids": torch.arange(3)}, ValueError, r"text_ids must be \[4\], got \[3\]"),
        ({"image_ids": torch.ones(4)}, TypeError, "image_ids must be int64, got torch.float32"),
        ({"text_ids": [0, 1, 2, 3]}, TypeError, "text_ids must be a torch.Tensor, got list"),
        ({"text_ids": TEXT_IDS, "positives": SAME}, ValueError, "positives or text_ids"),
        ({"positives": SAME & (TEXT_IDS != 8)}, ValueError, "no True in row 1"),
    ],
)
def test_bad_labels(alone, gather, labels, error, message):
    text, image, *_ = features()
    with pytest.raises(error, match=message):
        BagwiseContrastiveLoss(gather=gather)(text, image, **labels)


@pytest.mark.parametrize("name", ["gather", "objective"])
def test_unknown_options_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'all'"):
        BagwiseContrastiveLoss(**{name: "all"})


@pytest.mark.parametrize("gather", ["local", "ring"])
def test_nan_and_unequal_sides_of_one_process(alone, gather):
    text, image, *_ = features(2, 3)
    with pytest.raises(ValueError, match="as many texts as images, got 2 and 3"):
        BagwiseContrastiveLoss(gather=gather)(text, image)
    bad = image[:2].detach().clone()
    bad[1, 1, 0] = float("nan")
    assert torch.isnan(BagwiseContrastiveLoss(gather=gather)(text, bad))


@pytest.mark.parametrize("gather", ["none", "local", "ring"])
def test_a_second_derivative_is_refused(alone, gather):
    text, image, *_ = features()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    value = BagwiseContrastiveLoss(gather=gather)(text, image) * weight
    (first,) = torch.autograd.grad(value, text, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        first.pow(2).sum().backward()


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_compiles_without_a_graph_break(objective):
    text, image, text_mask, _ = features(dtype=torch.float32)
    loss = BagwiseContrastiveLoss(temperature="learn", objective=objective)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = {"text_mask": text_mask, "text_ids": TEXT_IDS, "image_ids": IMAGE_IDS}
    found, wanted = compiled(text, image, **arguments), loss(text, image, **arguments)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, (text, image)), torch.autograd.grad(wanted, (text, image))
    )


def test_the_papers_presets():
    loss = BagwiseContrastiveLoss(**PAPER_LOSS)
    assert (loss.mask_mode, loss.reduction, loss.temperature()) == ("zero", "sum", None)
    model = tiny_model()
    inputs = make_inputs()
    torch.manual_seed(0)
    output = model(**inputs, return_loss=True)
    torch.manual_seed(0)
    weighted = model(**inputs, return_loss=True, loss_weights=PAPER_TOTAL)
    assert torch.equal(weighted.loss, output.loss)
    assert torch.equal(output.loss, output.loss_ita + output.loss_itm + output.loss_twc)


def test_loss_weights():
    model, inputs = tiny_model(), make_inputs()
    full = model(**inputs, return_loss=True)
    some = model(**inputs, return_loss=True, loss_weights={"twc": 0.5, "ita": 2, "itm": 0})
    torch.testing.assert_close(some.loss, 0.5 * full.loss_twc + 2 * full.loss_ita)
    assert some.loss_itm is None and some.itm_logits is None
    for weights, message in (
        ({"mlm": 1.0}, "unknown name 'mlm'"),
        ({"ita": -1.0}, "'ita' must be a number of at least 0, got -1.0"),
        ({"ita": math.nan}, "got nan"),
        ({}, "leave nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, return_loss=True, loss_weights=weights)


@pytest.mark.parametrize("hard", [False, True])
def test_matching_negatives_are_never_positives(hard, monkeypatch):
    """Drawn a hundred times, as the model does it, with ids that leave each row one negative."""
    from bagformer.models import total_loss

    model, inputs = tiny_model(), make_inputs()
    model.config.hard_negatives = hard
    batch = len(inputs["input_ids"])
    drawn = []
    real = total_loss.draw_negatives

    def spy(positives, similarity):
        assert (similarity is not None) == hard
        for _ in range(100):
            drawn.append(real(positives, similarity))
        return drawn[-1]

    monkeypatch.setattr(total_loss, "draw_negatives", spy)
    ids = torch.zeros(batch, dtype=torch.long)
    ids[-1] = 1
    with torch.no_grad():
        model(**inputs, return_loss=True, image_ids=ids)
    assert len(drawn) == 100
    for negatives in drawn:
        assert (ids[negatives.image_of_text] != ids[negatives.text_rows]).all()
        assert (ids[negatives.text_of_image] != ids[negatives.image_rows]).all()


@pytest.mark.parametrize("gather", ["local", "ring"])
def test_the_model_takes_negatives_from_all_processes(alone, gather):
    model, inputs = tiny_model(), make_inputs()
    batch = len(inputs["input_ids"])
    ids = torch.arange(batch) // 2
    positives = positives_from_ids(None, ids)
    wanted = model(**inputs, return_loss=True, positives=positives)
    model.gather_losses(gather)
    for labels in ({"image_ids": ids}, {"positives": positives}):
        found = model(**inputs, return_loss=True, **labels)
        torch.testing.assert_close(found.loss_twc, wanted.loss_twc)
        torch.testing.assert_close(found.loss_ita, wanted.loss_ita)
    with pytest.raises(ValueError, match="gather must be one of"):
        model.gather_losses("everywhere")


@pytest.mark.parametrize("hard", [False, True])
def test_scores_of_cls_tokens_stay_wide_under_autocast(hard):
    """The features are bfloat16, or nearly; what is made of them is not."""
    model, inputs = tiny_model(use_itm_head=False, hard_negatives=hard), make_inputs(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, return_loss=True)
    logits = output.text_cls.double() @ output.image_cls.double().t() / model.temp.double()
    truth = reference.contrastive_loss((logits, logits.t()), torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(output.loss_ita.double(), truth, rtol=1e-6, atol=1e-6)


def test_two_batches_before_one_backward():
    """Keeping the temperatures in range must not spoil what the first batch saved."""
    model, inputs = tiny_model(temperature="learn").train(), make_inputs(3)
    torch.manual_seed(0)
    losses = [model(**inputs, return_loss=True).loss for _ in range(2)]
    sum(losses).backward()
    both = model.temp.grad.clone()
    model.zero_grad()
    torch.manual_seed(0)
    for _ in range(2):
        model(**inputs, return_loss=True).loss.backward()
    torch.testing.assert_close(both, model.temp.grad)


def test_matching_needs_pairs_that_belong_together():
    """It shows the head text b with image b as a match, so labels must not say otherwise."""
    model, inputs = tiny_model(), make_inputs(3)
    positives = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    with pytest.raises(ValueError, match=r"loss_itm .*positives\[0, 0\] is False"):
        model(**inputs, return_loss=True, positives=positives)
    weights = {"ita": 1, "twc": 1}
    output = model(**inputs, return_loss=True, positives=positives, loss_weights=weights)
    assert output.loss_itm is None and torch.isfinite(output.loss)
