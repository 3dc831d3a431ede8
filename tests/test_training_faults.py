"""Runs that something befalls: what is kept, what is said, and what a resumed run takes up."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support import training, world

from bagformer.training.checkpoint import CheckpointError, Checkpoints, Snapshot


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return world.make_place(tmp_path_factory.mktemp("world"))


@pytest.fixture
def ended(place, tmp_path):
    """The configuration of a run of 8 updates that is over, saved at 4 and 8."""
    tree = training.tiny_tree(place, tmp_path / "run", steps=8)
    training.make_trainer(tree).run()
    return tree, tmp_path / "run"


@pytest.mark.parametrize(
    "damage",
    [
        lambda last: (last / "state.json").unlink(),
        lambda last: last.rename(last.with_name("moved")),
        lambda last: os.truncate(last / "model.safetensors", 1000),
        lambda last: (last / "model.safetensors").unlink(),
        lambda last: os.truncate(last / "optimizer.safetensors", 1000),
    ],
)
def test_a_damaged_checkpoint_is_neither_passed_over_nor_lost(ended, damage):
    tree, output = ended
    before = (output / "log.jsonl").read_text()
    damage((output / "last").resolve())
    with pytest.raises(CheckpointError, match=r"step-00000008.*ln -sfn .*step-00000004") as caught:
        training.make_trainer(tree, resume=True)
    assert str(output / "last") in str(caught.value)
    assert (output / "log.jsonl").read_text() == before
    (output / "last").unlink()
    (output / "last").symlink_to("checkpoints/step-00000004")
    assert training.make_trainer(tree, resume=True).run()["step"] == 8
    assert json.loads((output / "last" / "state.json").read_text())["step"] == 8


def test_a_folder_that_no_link_names_is_not_taken_for_this_runs(place, tmp_path):
    """A first run dies before it links its first checkpoint; the next run is another one."""
    tree = training.tiny_tree(place, tmp_path / "run", steps=4)
    trainer = training.make_trainer(tree)
    trainer.checkpoints._link = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").is_file()
    other = training.make_trainer({**tree, "seed": 7, "optim": {"lr": 5e-3}})
    other.run()
    saved = load_file(tmp_path / "run" / "last" / "model.safetensors")
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(saved[name], tensor), name


def test_best_is_linked_before_last(tmp_path, monkeypatch):
    """Killed between the two links, a run goes on from before and links both again."""
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(Snapshot(1, {}, {}), lambda folder: None, best=True)
    link, done = kept._link, []

    def killed(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments)
        link(*arguments)

    monkeypatch.setattr(kept, "_link", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.save(Snapshot(2, {}, {}), lambda folder: None, best=True)
    assert kept.path("best").name == "step-00000002"
    assert kept.path("last").name == "step-00000001"
