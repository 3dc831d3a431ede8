"""What an update does to the weights, restated from the batches that it saw."""

from __future__ import annotations

import copy

import pytest
import torch
from support import training, world

from bagformer.training.config import LossConfig
from bagformer.training.step import TrainStep

RATE = 0.5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    place = world.make_place(root)
    config = world.read_json(place.model / "config.json")["text_config"]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    text = {name: config[name] for name in (*names, "intermediate_size")}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    world.make_model(place.model, text_config=text, use_itm_head=False, temperature="learn")
    return place


@pytest.mark.parametrize("clip", [None, 0.01])
def test_updates_are_steps_along_the_mean_gradient(place, tmp_path, clip):
    tree = training.tiny_tree(
        place,
        tmp_path / "run",
        steps=2,
        batch_size=3,
        accumulate=2,
        clip=clip,
        ema=0.5,
        optim={"name": "momentum", "lr": RATE, "weight_decay": 0.0, "options": {"momentum": 0.0}},
        schedule={"name": "none"},
    )
    rows = []
    trainer = training.make_trainer(tree, on_update=lambda _, values: rows.append(values))
    model, seen = copy.deepcopy(trainer.model), []
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.plain_step.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    trainer.run()
    assert len(seen) == 4
    step = TrainStep(model, LossConfig()).train()
    for update, row in enumerate(rows):
        model.zero_grad()
        losses = [step(*inputs)["loss"] / 2 for inputs in seen[2 * update : 2 * update + 2]]
        sum(losses).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
        factor = 1.0 if clip is None else clip / norm
        assert clip is None or factor < 0.5
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= RATE * factor * grads.get(name, torch.zeros(()))
        # of the average, timm's warm-up: 1 - (1 + update) ** (-2 / 3), at most ema
        decay = min(0.5, 1 - (1 + update) ** (-2 / 3))
        for name, value in model.state_dict().items():
            averaged[name] = decay * averaged[name] + (1 - decay) * value
    ours, found = trainer.model.state_dict(), trainer.averaged.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
        if value.is_floating_point():
            torch.testing.assert_close(found[name], averaged[name], rtol=1e-3, atol=1e-5)
