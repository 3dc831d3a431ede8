"""One batch: its losses, its gradient in pieces, its optimiser and its learning rate."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from support.models import make_inputs, tiny_model

from bagformer import reference
from bagformer.training import step as step_module
from bagformer.training.config import (
    ConfigError,
    LossConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from bagformer.training.optim import (
    Schedule,
    decays,
    freeze,
    make_optimizer,
    param_groups,
    spared_by_timm,
    train_mode,
)
from bagformer.training.step import TrainStep, active_losses, freeze_unreached


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
def test_losses_are_the_models_own(mask_mode, reduction, hard):
    options = {"mask_mode": mask_mode, "reduction": reduction, "hard_negatives": hard}
    model, inputs = tiny_model(**options), make_inputs(4)
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 2] = True
    torch.manual_seed(1)
    expected = model(**inputs, positives=positives, return_loss=True)
    torch.manual_seed(1)
    found = TrainStep(model, LossConfig(itm=0.5))(inputs, positives)
    for name in ("twc", "ita", "itm"):
        torch.testing.assert_close(found[f"loss_{name}"], expected[f"loss_{name}"].detach())
    total = expected.loss_twc + expected.loss_ita + 0.5 * expected.loss_itm
    torch.testing.assert_close(found["loss"], total)
    best = expected.text_to_image.argmax(dim=1)
    right = [bool(positives[row, column]) for row, column in enumerate(best)]
    assert found["accuracy"].item() == pytest.approx(sum(right) / 4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("mask_mode", ["exclude", "zero"])
def test_options_of_the_scores_reach_the_loss(mask_mode, reduction):
    """Features that disagree, so that the zeros of masked bags win where they are kept."""
    model = tiny_model(mask_mode=mask_mode, reduction=reduction)
    maker = torch.Generator().manual_seed(3)
    text = torch.rand(4, 5, 16, generator=maker, dtype=torch.float64)
    image = -torch.rand(4, 3, 16, generator=maker, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 1], [0, 1, 1, 1, 0]]).bool()
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 2] = True
    losses, logits, _ = TrainStep(model, LossConfig()).contrast(
        text, mask, text[:, 0], image, positives
    )
    scores = reference.maxsim(text, image, text_mask=mask, mask_mode=mask_mode, reduction=reduction)
    temperature = model.twc_loss.temperature()
    truth = reference.contrastive_loss(scores[:2], positives, temperature)
    torch.testing.assert_close(losses["twc"], truth)
    torch.testing.assert_close(logits, text[:, 0] @ image[:, 0].t() / model.cls_temperature())


@pytest.mark.parametrize("options", [LossConfig(), LossConfig(twc=0)])
def test_accuracy_is_of_texts(options):
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0], [0.0, 2.0, 1.0]])
    positives = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()
    text, image = torch.eye(3)[:, None], scores.t()[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    step = TrainStep(tiny_model(), options)
    assert step.contrast(text, mask, text[:, 0], image, positives)[2].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("hard", [False, True])
def test_what_the_negatives_are_drawn_by(hard, monkeypatch):
    """All positives are kept out; hard ones go by the CLS tokens, texts in rows."""
    model, inputs = tiny_model(hard_negatives=hard), make_inputs(4)
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, :3] = positives[1, 3] = True
    calls, shown = [], []
    draw, match = step_module.draw_negatives, step_module.match

    def spy_draw(*arguments):
        calls.append((*arguments, draw(*arguments)))
        return calls[-1][-1]

    def spy_match(*arguments):
        shown.append(arguments[-1])
        return match(*arguments)

    monkeypatch.setattr(step_module, "draw_negatives", spy_draw)
    monkeypatch.setattr(step_module, "match", spy_match)
    TrainStep(model, LossConfig())(inputs, positives)
    ((kept_out, similarity, drawn),) = calls
    assert torch.equal(kept_out, positives) and shown == [drawn]
    if not hard:
        assert similarity is None
        return
    output = model(**inputs)
    text, image = output.text_cls.double(), output.image_cls.double()
    wanted = (text @ image.t()) / model.cls_temperature().double()
    assert (wanted - wanted.t()).abs().max() > 0.1
    torch.testing.assert_close(similarity.double(), wanted, rtol=1e-4, atol=1e-4)


def test_encoders_are_narrow_and_scores_wide_under_autocast(monkeypatch):
    model, inputs = tiny_model(), make_inputs(4)
    positives = torch.eye(4, dtype=torch.bool)
    dtypes, kept = {}, {}
    for name in ("text_proj", "vision_proj", "itm_head"):
        hook = lambda *a, name=name: dtypes.update({name: a[2].dtype})  # noqa: E731
        getattr(model, name).register_forward_hook(hook)
    for name in ("get_text_features", "get_image_features"):
        real = getattr(model, name)
        keep = lambda *a, name=name, real=real: kept.setdefault(name, real(*a))  # noqa: E731
        monkeypatch.setattr(model, name, keep)
    torch.manual_seed(1)
    found = TrainStep(model, LossConfig(), "bf16")(inputs, positives)
    assert dtypes == dict.fromkeys(("text_proj", "vision_proj", "itm_head"), torch.bfloat16)
    assert {value.dtype for value in found.values()} == {torch.float32}
    text, image = kept["get_text_features"], kept["get_image_features"]
    logits = text.text_cls.double() @ image.image_features[:, 0].double().t() / model.temp.double()
    truth = reference.contrastive_loss((logits, logits.t()), torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(found["loss_ita"].double(), truth, rtol=1e-6, atol=1e-6)
    monkeypatch.undo()
    torch.manual_seed(1)
    plain = TrainStep(model, LossConfig())(inputs, positives)
    assert set(dtypes.values()) == {torch.float32}
    torch.testing.assert_close(found["loss"], plain["loss"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(size):
    from bagformer.training.cached import cached_losses

    inputs, positives = make_inputs(5), torch.eye(5, dtype=torch.bool)
    positives[1, 3] = True
    whole, pieces = (tiny_model(use_itm_head=False).double() for _ in range(2))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = TrainStep(whole, LossConfig())(inputs, positives)
    (expected["loss"] * 0.5).backward()
    found = cached_losses(TrainStep(pieces, LossConfig()), inputs, (positives, None), size, 0.5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value.detach())
    theirs = gradients(whole)
    assert gradients(pieces).keys() == theirs.keys()
    for name, value in gradients(pieces).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12)


def test_pieces_are_encoded_under_autocast_both_times():
    from bagformer.training.cached import cached_losses

    model, inputs = tiny_model(use_itm_head=False), make_inputs(4)
    step, positives = TrainStep(model, LossConfig(), "bf16"), torch.eye(4, dtype=torch.bool)
    step(inputs, positives)["loss"].backward()
    wanted = gradients(model)
    model.zero_grad()
    dtypes = {"text_proj": [], "vision_proj": []}
    for name, seen in dtypes.items():
        hook = lambda *a, seen=seen: seen.append((a[2].dtype, a[2].requires_grad))  # noqa: E731
        getattr(model, name).register_forward_hook(hook)
    found = cached_losses(step, inputs, (positives, None), 2, 1.0)
    passes = [(torch.bfloat16, False)] * 2 + [(torch.bfloat16, True)] * 2
    # the text's bags and its CLS token go through it one after the other
    twice = [one for one in passes for _ in range(2)]
    assert dtypes == {"text_proj": twice, "vision_proj": passes}
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in gradients(model).items():
        assert (value - wanted[name]).norm() <= 2e-2 * wanted[name].norm() + 1e-6, name


def test_pieces_refuse_the_matching_loss():
    from bagformer.training.cached import cached_losses

    step = TrainStep(tiny_model(), LossConfig())
    with pytest.raises(ConfigError, match=r"set loss\.itm to 0"):
        cached_losses(step, make_inputs(2), (torch.eye(2).bool(), None), 1, 1.0)


@pytest.mark.parametrize(
    "options,changes",
    [
        (LossConfig(ita=0, itm=0), {}),
        (LossConfig(ita=0, twc=0), {}),
        (LossConfig(ita=0, twc=0), {"hard_negatives": True}),
        (LossConfig(itm=0), {"fusion": "early"}),
        (LossConfig(ita=0), {"interaction": "tokenwise", "hard_negatives": True}),
        (LossConfig(itm=0), {"interaction": "cls_token"}),
    ],
)
def test_parameters_that_no_loss_reaches_are_frozen(options, changes):
    """What is left gets a gradient, all of it but the padding's own row."""
    model = tiny_model(temperature="learn", **changes)
    freeze_unreached(model, active_losses(model, options))
    step = TrainStep(model, options)
    step(make_inputs(4), torch.eye(4).bool())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_model_without_a_loss_is_refused():
    with pytest.raises(ConfigError, match="every loss"):
        active_losses(tiny_model(), LossConfig(twc=0, ita=0, itm=0))


def test_which_parameters_decay():
    model = tiny_model()
    spared = spared_by_timm(model)
    of = {
        name: (decays(name, p, "default", spared), decays(name, p, "original"))
        for name, p in model.named_parameters()
    }
    backbone = "vision_model.backbone."
    assert of["vision_proj.weight"] == (True, True)
    assert of["vision_proj.bias"] == of["text_model.embeddings.LayerNorm.weight"] == (False, False)
    for name in (
        "temp",
        "twc_loss.log_temperature",
        f"{backbone}cls_token",
        f"{backbone}pos_embed",
    ):
        assert of[name] == (False, True), name
    # as transformers' Trainer has it
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        assert of[f"text_model.embeddings.{name}.weight"] == (True, True), name
    made = make_optimizer(model, OptimConfig(weight_decay=0.3, betas=[0.8, 0.9], eps=1e-7))
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]
    assert made.param_groups[0]["betas"] == (0.8, 0.9) and made.param_groups[1]["eps"] == 1e-7
    counted = sum(p.numel() for group in made.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters())


def test_timm_says_what_of_a_picture_encoder_is_spared():
    """Position tables that are not called pos_embed, in a module at any depth."""
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(1, 1)
    )
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), swin)
    decayed, without = param_groups(model, OptimConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = {names[id(one)]: False for one in without["params"]}
    of |= {names[id(one)]: True for one in decayed["params"]}
    assert not of["1.layers.0.blocks.0.attn.relative_position_bias_table"]
    assert of["0.weight"] and of["1.layers.0.blocks.0.attn.qkv.weight"]


def test_freezing_by_name_stops_learning_and_dropout():
    model = tiny_model()
    frozen = freeze(model, ["vision_model", "text_model.embeddings.*"])
    assert frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad) > 0
    train_mode(model)
    assert not model.vision_model.training and not model.text_model.embeddings.dropout.training
    assert model.text_model.encoder.layer[0].training
    with pytest.raises(ConfigError, match="'visoin_model' matches no parameter"):
        freeze(model, ["visoin_model"])
    freeze(model, ["*"])
    with pytest.raises(ConfigError, match="nothing is left"):
        make_optimizer(model, OptimConfig())


@pytest.mark.parametrize(
    "options,message",
    [
        (OptimConfig(name="adamwww"), "timm.optim has no 'adamwww'"),
        (OptimConfig(name="adahessian"), "'adahessian' needs second derivatives"),
        (OptimConfig(options={"speed": 3}), "does not take {'speed': 3}"),
    ],
)
def test_optimisers_that_do_not_exist(options, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(tiny_model(), options)


def rates(schedule, total, per_epoch, lr=1.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    made = Schedule(optimizer, TrainConfig(schedule=schedule), total, per_epoch)
    found = []
    for update in range(total):
        made.set(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_rates_by_update():
    found = rates(ScheduleConfig(warmup=4, min_lr=0.1), 20, 5)
    expected = [n / 4 for n in range(4)]
    expected += [0.1 + 0.45 * (1 + math.cos(math.pi * n / 20)) for n in range(4, 20)]
    assert found == pytest.approx(expected)
    assert rates(ScheduleConfig(warmup=0.2, min_lr=0.1), 20, 5) == found
    linear = rates(ScheduleConfig(name="linear"), 10, 5)
    assert linear == pytest.approx([1 - n / 10 for n in range(10)])
    assert rates(ScheduleConfig(name="none"), 3, 1) == [1.0] * 3
    with pytest.raises(ConfigError, match=r"schedule\.warmup: .* none .* constant"):
        rates(ScheduleConfig(name="none", warmup=3), 20, 5)
    with pytest.raises(ConfigError, match="leave none to learn"):
        rates(ScheduleConfig(warmup=20), 20, 5)


@pytest.mark.parametrize("warmup", [0, 2])
def test_rates_as_the_original_steps_them(warmup):
    """Restated from its loop: in epoch 0 every 100 iterations up to 100 W, then once an epoch."""
    epochs, length, low, base, start = 3, 350, 0.01, 1.0, 0.2

    def formula(t):
        if t < warmup:
            return start + t * (base - start) / warmup
        return low + 0.5 * (base - low) * (1 + math.cos(math.pi * (t - warmup) / epochs))

    expected, rate = [], formula(0)
    for epoch in range(epochs):
        for i in range(length):
            expected.append(rate)
            if epoch == 0 and i % 100 == 0 and i <= 100 * warmup:
                rate = formula(i // 100)
        rate = formula(epoch + warmup + 1)
    options = ScheduleConfig(warmup=warmup, warmup_lr=start, min_lr=low, unit="original")
    assert rates(options, epochs * length, length) == pytest.approx(expected)
