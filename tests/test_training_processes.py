"""Whole runs in two processes over gloo, against one process with the same pairs."""

from __future__ import annotations

import socket

import pytest
import torch
from safetensors.torch import load_file
from support import training, world

BASE = {
    "steps": 3,
    "accumulate": 2,
    "clip": 2.0,
    "augment": {"crop": None},
    "log": {"every": 1},
    "valid": {"every": 2},
    "schedule": {"warmup": 1},
}
RUNS = {
    "local": {"batch_size": 3, "loss": {"gather": "local"}},
    "pieces": {"batch_size": 3, "mini_batch": 2, "loss": {"gather": "ring"}},
    "matching": {"batch_size": 3, "loss": {"twc": 0, "ita": 0}},
}


def _ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the runs of two processes, and of one with the doubled batch."""
    place = world.make_place(tmp_path_factory.mktemp("world"))
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = world.read_json(place.model / "config.json")["text_config"]
    text |= {name: config[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    plain = place.root / "plain"
    world.make_model(plain, text_config=text, temperature="learn", use_itm_head=False)
    trees = []
    for name, changes in RUNS.items():
        tree = training.tiny_tree(place, place.root / name, **BASE | changes)
        trees.append(tree if name == "matching" else {**tree, "model": str(plain)})
    torch.multiprocessing.spawn(training.run_as_process, (trees, _ports(len(trees))), nprocs=2)
    alone = training.tiny_tree(place, place.root / "alone", **BASE, batch_size=6)
    training.make_trainer({**alone, "model": str(plain)}).run()
    return place.root


@pytest.mark.parametrize("name", ["local", "pieces"])
def test_two_processes_train_as_one(runs, name):
    found = training.read_rows(runs / name, "train")
    wanted = training.read_rows(runs / "alone", "train")
    assert [row["step"] for row in found] == [1, 2, 3]
    for row, other in zip(found, wanted, strict=True):
        for key in ("loss", "loss_twc", "loss_ita", "grad_norm", "temperature", "lr"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
    ours, theirs = (load_file(runs / one / "last" / "model.safetensors") for one in (name, "alone"))
    start = load_file(runs / "plain" / "model.safetensors")
    moved = sum((theirs[key] - start[key]).norm() ** 2 for key in start) ** 0.5
    apart = sum((ours[key] - theirs[key]).norm() ** 2 for key in start) ** 0.5
    assert apart < 0.01 * moved
    assert training.read_rows(runs / name, "valid")[0]["recall_t2i_mean"] > 0


def test_the_matching_loss_alone_trains_in_two_processes(runs):
    rows = training.read_rows(runs / "matching", "train")
    assert len(rows) == 3 and all(row["loss"] == row["loss_itm"] > 0 for row in rows)
