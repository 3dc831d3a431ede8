"""The original's training step in parts: against its recorded runs, and against restatements."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.models import make_inputs, tiny_model
from support.original import cases, model_of

from bagformer import BagFormerProcessor
from bagformer.models.conversion import from_original, to_original
from bagformer.models.fusion import Negatives
from bagformer.training.original import (
    alpha_at,
    bagwise_losses,
    baseline_losses,
    learning_rate,
    make_optimizer,
    make_slow,
    param_groups,
    schedule_time,
)

IDX = torch.tensor([4, 9, 4])


def slow_state(model, queue=7):
    """What a checkpoint holds besides the model: perturbed copies and queues."""
    maker = torch.Generator().manual_seed(8)
    state = {}
    for name, value in model.state_dict().items():
        part, _, rest = to_original(name).partition(".")
        if part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            noise = 0.05 * torch.randn(value.shape, generator=maker)
            state[f"{part}_m.{rest}"] = value + noise
    size = model.config.embed_dim
    for side in ("image", "text"):
        state[f"{side}_queue"] = F.normalize(torch.randn(size, queue, generator=maker), dim=0)
    state["idx_queue"] = torch.full((1, queue), -100)
    state["idx_queue"][0, 2] = 9
    return state


def test_groups_decay_what_the_original_decays():
    model = tiny_model(protocol="original")
    names = {id(value): name for name, value in model.named_parameters()}
    without, decayed = ([names[id(p)] for p in g["params"]] for g in param_groups(model, 0.02))
    assert sorted(without + decayed) == sorted(names.values())
    for name in ("temp", "vision_model.backbone.cls_token", "vision_model.backbone.pos_embed"):
        assert name in decayed
    sizes = {name: value.dim() for name, value in model.named_parameters()}
    assert all(sizes[name] == 1 for name in without)
    optimizer = make_optimizer(model, 1e-5, 0.02)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.02]
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {
        (1e-5, (0.9, 0.999), 1e-8)
    }


def test_the_rate_warms_up_in_hundreds_of_iterations():
    options = {"lr": 1.0, "epochs": 4, "warmup_epochs": 2, "warmup_lr": 0.2, "min_lr": 0.1}
    times = [schedule_time(0, i, 2) for i in (0, 1, 100, 101, 200, 201, 202, 900)]
    assert times == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [schedule_time(epoch, 5, 2) for epoch in (1, 2, 3)] == [3, 4, 5]
    rates = [learning_rate(time, **options) for time in range(8)]
    half = 0.1 + 0.9 * 0.5
    assert rates[:3] == pytest.approx([0.2, 0.6, 1.0])
    assert rates[4] == pytest.approx(half) and rates[6:] == [0.1, 0.1]
    assert [schedule_time(0, i, 0) for i in (0, 50, 500)] == [0, 0, 0]
    assert [alpha_at(0.4, 0, i, 10, True) for i in (0, 5, 10)] == [0.0, 0.2, 0.4]
    assert alpha_at(0.4, 1, 0, 10, True) == alpha_at(0.4, 0, 0, 10, False) == 0.4


@pytest.mark.parametrize("interaction", ["tokenwise", "cls_token"])
@pytest.mark.parametrize("alpha, distill", [(0.0, False), (0.4, True)])
def test_baseline_losses_are_the_restated_ones(interaction, alpha, distill):
    model = tiny_model(protocol="original", interaction=interaction)
    state = slow_state(model)
    slow = make_slow(model, state, queue_size=0, momentum=0.9)
    inputs = make_inputs()
    negatives = Negatives(
        torch.arange(3), torch.tensor([1, 2, 1]), torch.arange(3), torch.tensor([1, 0, 1])
    )
    found = baseline_losses(
        model, slow, inputs, IDX, alpha=alpha, distill=distill, negatives=negatives
    )
    moved = {}
    for name, value in model.named_parameters():
        part, _, rest = to_original(name).partition(".")
        if f"{part}_m.{rest}" in state:
            moved[name] = 0.9 * state[f"{part}_m.{rest}"] + 0.1 * value.detach()
    assert len(moved) > 40
    with torch.no_grad():
        other = torch.func.functional_call(model, moved, kwargs=inputs)
    own = model(
        **inputs,
        return_loss=True,
        itm_negatives=(negatives.image_of_text, negatives.text_of_image),
    )
    same = torch.tensor(
        [[i == j for j in [4, 9, 4, -100, -100, 9, *[-100] * 4]] for i in [4, 9, 4]]
    ).float()
    targets = same / same.sum(1, keepdim=True)
    total = torch.zeros(())
    for fast, slow_fast, pool in (
        (own.image_cls, other.image_cls, torch.cat([other.text_cls, state["text_queue"].t()])),
        (own.text_cls, other.text_cls, torch.cat([other.image_cls, state["image_queue"].t()])),
    ):
        wanted = targets
        if distill:
            opinion = torch.softmax(slow_fast @ pool.t() / model.temp.detach(), 1)
            wanted = alpha * opinion + (1 - alpha) * targets
        total = total - (torch.log_softmax(fast @ pool.t() / model.temp, 1) * wanted).sum(1).mean()
    torch.testing.assert_close(found["ita"], total / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["itm"], own.loss_itm, rtol=1e-5, atol=1e-6)
    assert ("twc" in found) == (interaction == "tokenwise")
    if interaction == "tokenwise":
        torch.testing.assert_close(found["twc"], own.loss_twc, rtol=1e-5, atol=1e-6)
    sum(found.values()).backward()
    assert model.temp.grad is not None
    assert all(p.grad is None for copied in slow.copies.values() for p in copied.parameters())


def test_negatives_are_drawn_by_similarity_and_never_positives():
    model = tiny_model(protocol="original", interaction="cls_token")
    slow = make_slow(model, {}, queue_size=5)
    assert slow.image_queue.shape == (16, 5) and (slow.idx_queue == -100).all()
    torch.testing.assert_close(slow.text_queue.norm(dim=0), torch.ones(5))
    baseline_losses(model, slow, make_inputs(), IDX)
    with pytest.raises(ValueError, match="every pair of the batch is a positive"):
        baseline_losses(model, slow, make_inputs(), torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match=r"text_proj_m.weight is \[3\]"):
        make_slow(model, {"text_proj_m.weight": torch.zeros(3)}, queue_size=5)


def test_a_model_that_broke_shows_it_in_the_loss_not_in_the_draw():
    model = tiny_model(protocol="original", interaction="cls_token")
    slow = make_slow(model, {}, queue_size=5)
    with torch.no_grad():
        model.vision_proj.bias[0] = float("nan")
    assert torch.isnan(baseline_losses(model, slow, make_inputs(), IDX)["ita"])


def test_bagwise_losses_are_the_models():
    model = tiny_model(protocol="original")
    inputs = make_inputs()
    torch.manual_seed(4)
    found = bagwise_losses(model, inputs)
    torch.manual_seed(4)
    own = model(**inputs, return_loss=True)
    for name, value in found.items():
        torch.testing.assert_close(value, own[f"loss_{name}"])
    with pytest.raises(ValueError, match="batch of one"):
        bagwise_losses(model, {name: value[:1] for name, value in inputs.items()})


def test_a_recorded_batch_of_the_baselines(golden):
    compared = 0
    for case, info in cases(golden, "tokenwise", "cls_token"):
        letter = case.name.removeprefix(info["kind"] + "_")[0]
        model = model_of(golden, letter, interaction=info["kind"])
        state = load_file(golden / f"model_{letter}.safetensors")
        momentum = info["config"]["momentum"]
        slow = make_slow(model, state, queue_size=0, momentum=momentum)
        torch.manual_seed(info["torch_manual_seed_before_forward"])
        options = {"alpha": info["alpha"], "distill": info["config"]["distill"]}
        found = baseline_losses(model, slow, case.inputs(), case["idx"].long(), **options)
        for name, value in found.items():
            torch.testing.assert_close(
                value.detach(),
                case[f"loss_{name}"],
                rtol=1e-4,
                atol=2e-4,
                msg=f"{case.name} {name}",
            )
        compared += 1
    assert compared


def _recorded(golden, info):
    """The start of a recorded run, which had no dropout."""
    early = info["fusion_strategy"] == "early_fusion"
    model = model_of(
        golden, info["arch"], interaction=info["kind"], fusion="early" if early else "late"
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def test_recorded_trainings_are_followed(golden):
    described = json.loads((golden / "train.json").read_text(encoding="utf-8"))
    arrays = np.load(golden / "train.npz")
    runs = {name: info for name, info in described.items() if name[0] != "_" and "kind" in info}
    assert runs
    for name, info in runs.items():
        _follow(golden, name, info, arrays)


def _follow(golden, name, info, arrays):
    model = _recorded(golden, info)
    letter = info["arch"]
    processor = BagFormerProcessor.from_config(
        model.config, golden / "tokenizer", golden / f"muge_{letter}" / "entity_dict_small.txt"
    )
    state = load_file(golden / f"model_{letter}.safetensors")
    slow = make_slow(model, state, queue_size=0, momentum=info["momentum"])
    optimizer = make_optimizer(model, info["lr"], info["weight_decay"])
    pictures = torch.from_numpy(arrays[f"{name}|image"])
    expected = arrays[f"{name}|trajectory"]
    forced = Negatives(torch.arange(2), torch.tensor([1, 0]), torch.arange(2), torch.tensor([1, 0]))
    order = ("ita", "itm", "twc")
    steps = 0
    for epoch in range(info["epochs"]):
        for step in range(info["n_iter"]):
            time = schedule_time(epoch, step, info["warmup_epochs"])
            rate = learning_rate(
                time,
                lr=info["lr"],
                epochs=info["epochs"],
                warmup_epochs=info["warmup_epochs"],
                warmup_lr=info["warmup_lr"],
                min_lr=0.0,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs = dict(processor(text=info["texts"][2 * step : 2 * step + 2]))
            inputs["pixel_values"] = pictures[info["image_index"][step]]
            if info["kind"] == "bagwise":
                losses = bagwise_losses(model, inputs, negatives=forced)
            else:
                alpha = alpha_at(info["alpha"], epoch, step, info["n_iter"], True)
                losses = baseline_losses(
                    model,
                    slow,
                    inputs,
                    torch.tensor(info["idx"][step]),
                    alpha=alpha,
                    distill=info["distill"],
                    negatives=forced,
                )
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            found = [float(losses[part].detach()) for part in order if part in losses]
            np.testing.assert_allclose(
                [*found, rate], expected[steps], rtol=5e-3, atol=2e-4, err_msg=f"{name} {steps}"
            )
            steps += 1
    assert steps == len(expected)
    own = model.state_dict()
    for key in (key for key in arrays.files if key.startswith(f"{name}|after/")):
        theirs = key.split("after/")[1]
        ours = from_original(theirs)
        if ours in own:
            np.testing.assert_allclose(own[ours], arrays[key], rtol=5e-3, atol=2e-4, err_msg=theirs)


def test_recorded_groups_and_rates(golden):
    described = json.loads((golden / "train.json").read_text(encoding="utf-8"))
    model = model_of(golden, "A")
    names = {id(value): to_original(name) for name, value in model.named_parameters()}
    without, decayed = ([names[id(p)] for p in g["params"]] for g in param_groups(model, 0.02))
    recorded = described["_param_groups"]
    assert sorted(without) == sorted(recorded["no_decay"])
    assert sorted(decayed) == sorted(recorded["decay"])
    for table in described["_lr_tables"]:
        for time, rate in enumerate(table["lr_after_step_t"]):
            assert learning_rate(
                time,
                lr=table["optimizer_lr"],
                epochs=table["epochs"],
                warmup_epochs=table["warmup_epochs"],
                warmup_lr=table["warmup_lr"],
                min_lr=table["min_lr"],
            ) == pytest.approx(rate, rel=1e-9, abs=1e-15)
