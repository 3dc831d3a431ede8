"""A run that is killed again and again ends as one that was left alone, to the last bit."""

from __future__ import annotations

import multiprocessing
import random
import signal

import pytest
import torch
from safetensors.torch import load_file
from support import training

KILLS = 20


@pytest.fixture(scope="module")
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["support.training", "bagformer.training.loop", "timm.models"])
    return found


def weights(output, link):
    return load_file(output / link / "model.safetensors")


def test_twenty_kills_change_nothing(place, context, tmp_path):
    """Kills after random updates and at random moments inside a save, each followed by a resume."""
    changes = {
        "ema": 0.9,
        "clip": 5.0,
        "accumulate": 2,
        "batch_size": 4,
        "augment": {"flip": 0.5, "rand_augment": {"ops": 1}},
    }
    whole = training.tiny_tree(place, tmp_path / "whole", **changes)
    killed = training.tiny_tree(place, tmp_path / "killed", **changes)
    draw = random.Random(20261125)
    plans = [("update", draw.randint(1, 4)) for _ in range(KILLS // 2)]
    plans += [("save", draw.randint(1, 34)) for _ in range(KILLS - len(plans))]
    draw.shuffle(plans)
    alone = context.Process(target=training.run_until_killed, args=(whole, ("never", 0)))
    alone.start()
    inside = 0
    for plan in plans:
        child = context.Process(target=training.run_until_killed, args=(killed, plan))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, plan
        drafts = (tmp_path / "killed" / "checkpoints").glob(".draft-*")
        inside += plan[0] == "save" and any(drafts)
    last = context.Process(target=training.run_until_killed, args=(killed, ("never", 0)))
    last.start()
    last.join(60)
    alone.join(60)
    assert (alone.exitcode, last.exitcode) == (0, 0)
    assert inside >= 3, "too few kills hit a save half done"
    for kind in ("train", "valid"):
        expected = training.read_rows(tmp_path / "whole", kind)
        assert training.read_rows(tmp_path / "killed", kind) == expected
    for link in ("last", "best"):
        ours, theirs = weights(tmp_path / "killed", link), weights(tmp_path / "whole", link)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(training.read_rows(tmp_path / "killed", "start")) > KILLS // 4
