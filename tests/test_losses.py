"""Contrastive losses against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from bagformer import BagwiseContrastiveLoss, reference
from bagformer.losses import TEMPERATURE_RANGE


def features(texts=4, images=4, bags=5, patches=7, size=8, dtype=torch.float64, seed=0):
    maker = torch.Generator().manual_seed(seed)
    text = torch.randn(texts, bags, size, generator=maker, dtype=torch.float64)
    image = torch.randn(images, patches, size, generator=maker, dtype=torch.float64)
    text_mask = torch.rand(texts, bags, generator=maker) < 0.7
    text_mask[:, 1] = True
    image_mask = torch.rand(images, patches, generator=maker) < 0.8
    image_mask[:, 0] = True
    return (
        F.normalize(text, dim=-1).to(dtype).requires_grad_(),
        F.normalize(image, dim=-1).to(dtype).requires_grad_(),
        text_mask,
        image_mask,
    )


def expected(text, image, text_mask, image_mask, positives, options):
    """Row by row, from the reference scores."""
    scores = reference.maxsim(
        text,
        image,
        text_mask=text_mask,
        image_mask=image_mask,
        mask_mode=options["mask_mode"],
        reduction=options["reduction"],
    )
    wanted = {
        "text_to_image": (scores.text_to_image, positives),
        "image_to_text": (scores.image_to_text, positives.t()),
    }
    losses = []
    for direction, (matrix, targets) in wanted.items():
        if options["directions"] not in ("both", direction):
            continue
        rows = []
        for row, target in zip(matrix / (options["temperature"] or 1.0), targets, strict=True):
            each = [torch.logsumexp(row, 0) - row[column] for column in target.nonzero()[:, 0]]
            rows.append(sum(each) / len(each))
        losses.append(sum(rows) / len(rows))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("directions", ["both", "text_to_image", "image_to_text"])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [None, 0.07])
def test_value_and_gradients(directions, mask_mode, reduction, temperature):
    options = {
        "directions": directions,
        "mask_mode": mask_mode,
        "reduction": reduction,
        "temperature": temperature,
    }
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 2] = positives[3, 1] = True
    text, image, text_mask, image_mask = features()
    loss = BagwiseContrastiveLoss(**options)(text, image, text_mask, image_mask, positives)
    truth = expected(text, image, text_mask, image_mask, positives, options)
    torch.testing.assert_close(loss, truth)
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    found = torch.autograd.grad(loss, (text, image), upstream)
    wanted = torch.autograd.grad(truth, (text, image), upstream)
    torch.testing.assert_close(found, wanted)


def test_the_papers_loss_is_two_cross_entropies_on_the_diagonal():
    text, image, text_mask, _ = features(dtype=torch.float32)
    loss = BagwiseContrastiveLoss(mask_mode="zero")(text, image, text_mask)
    zeroed = text * text_mask[..., None]
    similarity = torch.einsum("atd,bpd->abtp", zeroed, image)
    target = torch.arange(4)
    truth = F.cross_entropy(similarity.amax(3).sum(2), target)
    truth = (truth + F.cross_entropy(similarity.amax(2).sum(2).t(), target)) / 2
    torch.testing.assert_close(loss, truth)


def test_scores_that_are_none_are_named():
    loss, square = BagwiseContrastiveLoss(), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"image_to_text must be a matrix .*got \[2, 2, 2\]"):
        loss.from_scores(square, torch.zeros(2, 2, 2), None)
    with pytest.raises(ValueError, match=r"image_to_text must be \[3, 2\] .*got \[4, 2\]"):
        loss.from_scores(torch.zeros(2, 3), torch.zeros(4, 2), torch.ones(2, 3).bool())
    with pytest.raises(TypeError, match=r"image_to_text must be a torch\.Tensor, got list"):
        loss.from_scores(square, [1], square > -1)


def test_a_nan_feature_makes_the_loss_nan():
    text, image, *_ = features(dtype=torch.float32)
    text = text.detach().clone()
    text[1, 1, 0] = float("nan")
    assert torch.isnan(BagwiseContrastiveLoss()(text, image))
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 1] = False
    assert torch.isfinite(BagwiseContrastiveLoss()(text, image, mask))


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        (torch.tensor([[1, 0], [0, 0]]).bool(), r"no True in row 1"),
        (torch.tensor([[1, 0], [1, 0]]).bool(), r"no True in column 1"),
        (torch.eye(2), r"must be bool, got torch.float32"),
        (torch.eye(3).bool(), r"must be \[2, 2\], got \[3, 3\]"),
    ],
)
def test_bad_positives(positives, message):
    text, image, *_ = features(2, 2)
    with pytest.raises(ValueError, match=message):
        BagwiseContrastiveLoss()(text, image, positives=positives)


def test_as_many_texts_as_images_unless_positives_say_otherwise():
    text, image, *_ = features(2, 3)
    with pytest.raises(ValueError, match="as many texts as images, got 2 and 3"):
        BagwiseContrastiveLoss()(text, image)
    positives = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    assert torch.isfinite(BagwiseContrastiveLoss()(text, image, positives=positives))


def test_an_empty_batch_is_refused():
    text, image, *_ = features(2, 2)
    with pytest.raises(ValueError, match="at least one text and one image"):
        BagwiseContrastiveLoss()(text[:0], image[:0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("directions", "up"),
        ("mask_mode", "none"),
        ("reduction", "max"),
        ("temperature", 0.0),
        ("temperature", "auto"),
        ("temperature", float("nan")),
        ("temperature", True),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        BagwiseContrastiveLoss(**{name: value})


def test_learned_temperature_starts_by_reduction_and_stays_in_range():
    assert BagwiseContrastiveLoss(temperature="learn").temperature().item() == pytest.approx(1.0)
    loss = BagwiseContrastiveLoss(temperature="learn", reduction="mean")
    assert loss.temperature().item() == pytest.approx(0.07)
    text, image, *_ = features(dtype=torch.float32)
    loss(text, image).backward()
    assert loss.log_temperature.grad.abs() > 0
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(1e-6))
    assert loss.temperature().item() == pytest.approx(TEMPERATURE_RANGE[0])
    loss.zero_grad()
    loss(text, image).backward()
    # at the bound it can still come back
    assert loss.log_temperature.item() == pytest.approx(math.log(TEMPERATURE_RANGE[0]))
    assert loss.log_temperature.grad.abs() > 0


def test_evaluation_does_not_move_the_parameter():
    loss = BagwiseContrastiveLoss(temperature="learn").eval()
    with torch.no_grad():
        loss.log_temperature.fill_(-50.0)
    assert loss.temperature().item() == pytest.approx(TEMPERATURE_RANGE[0])
    assert loss.log_temperature.item() == -50.0


def test_nothing_of_the_size_of_all_similarities_is_kept():
    text, image, *_ = features(24, 24, bags=25, patches=65, size=16, dtype=torch.float32)
    largest = 0

    def pack(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = BagwiseContrastiveLoss()(text, image)
    loss.backward()
    everything = 24 * 24 * 25 * 65 * 4
    assert 0 < largest < everything / 8
