"""Runs that something befalls: what is kept, what is said, and what a resumed run takes up."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import training, world

from bagformer.data.muge import MugeImages, write_tsv
from bagformer.training.checkpoint import CheckpointError, Checkpoints, Snapshot
from bagformer.training.config import ConfigError
from bagformer.training.loop import NonFiniteError


@pytest.fixture
def ended(place, tmp_path):
    """The configuration of a run of 8 updates that is over, saved at 4 and 8."""
    tree = training.tiny_tree(place, tmp_path / "run", steps=8)
    training.make_trainer(tree).run()
    return tree, tmp_path / "run"


def test_other_data_of_the_same_size_are_no_resumption(ended, place, tmp_path):
    tree, _ = ended
    changed = place.queries.read_text(encoding="utf-8").replace("红色", "黄色", 1)
    other = tmp_path / "other.jsonl"
    other.write_text(changed, encoding="utf-8")
    files = {"queries": str(other), "images": str(place.images)}
    data = {**tree["data"], "train": files}
    with pytest.raises(ConfigError, match=r"queries of data\.train \(\w+ there, \w+ here\)"):
        training.make_trainer({**tree, "data": data}, resume=True)
    files["queries"] = str(place.queries)
    assert training.make_trainer({**tree, "data": data}, resume=True).run()["step"] == 8


def recoloured(place, path, count=1, **png):
    """The set's pictures, of which ``count`` from the last are other ones."""
    images = MugeImages(place.images)
    rows = [(key, images.encoded(key)) for key in images]
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(file, "PNG", **png)
    write_tsv(path, [*rows[:-count], *((key, file.getvalue()) for key, _ in rows[-count:])])
    return path


def test_other_pictures_under_the_same_ids_are_no_resumption(ended, place, tmp_path):
    tree, output = ended
    before = (output / "log.jsonl").read_text()
    files = {"queries": str(place.queries), "images": str(recoloured(place, tmp_path / "i.tsv"))}
    data = {**tree["data"], "train": files}
    with pytest.raises(ConfigError, match=r"pictures of data\.train \(\w+ there, \w+ here\)"):
        training.make_trainer({**tree, "data": data}, resume=True)
    assert (output / "log.jsonl").read_text() == before


def test_what_a_resumed_run_may_change(ended, place, tmp_path):
    tree, _ = ended
    moved = tmp_path / "moved"
    shutil.copytree(place.root / "muge", moved / "muge")
    changes = {"folder": str(moved), "workers": 1, "log": {"every": 1}, "steps": 9, "threads": 2}
    changes |= {"checkpoint": {"every": 3, "keep": 1}, "valid": {"every": 9, "batch_size": 4}}
    assert training.make_trainer({**tree, **changes}, resume=True).run()["step"] == 9
    words = {"dictionary": str(place.dictionary)}
    with pytest.raises(ConfigError, match=r"processor \(.*entities"):
        training.make_trainer({**tree, "processor": words}, resume=True)


@pytest.mark.parametrize("changed", [False, True])
def test_other_validation_data_start_the_best_anew(ended, place, tmp_path, changed):
    """On other pictures a recall is not comparable; on the same ones, elsewhere, it is."""
    tree, output = ended
    if changed:
        images = recoloured(place, tmp_path / "i.tsv", 11)
    else:
        images = shutil.copy(place.images, tmp_path / "i.tsv")
    state = (output / "last").resolve() / "state.json"
    described = json.loads(state.read_text())
    described["run"]["best"] = {"value": 99.5, "step": 4}
    state.write_text(json.dumps(described))
    valid = {"queries": str(place.queries), "images": str(images)}
    data = {**tree["data"], "valid": valid}
    changes = {"steps": 9, "valid": {"every": 9}, "data": data}
    best = training.make_trainer({**tree, **changes}, resume=True).run()["best"]
    assert best["step"] == (9 if changed else 4)


def test_another_metric_starts_the_best_anew(ended):
    """A recall at 1 is never above the mean of recalls, so it could not become the best."""
    tree, output = ended
    changes = {"steps": 10, "valid": {"every": 10, "metric": "recall_t2i_r1"}}
    result = training.make_trainer({**tree, **changes}, resume=True).run()
    valid = training.read_rows(output, "valid")[-1]
    assert result["best"] == {"value": valid["recall_t2i_r1"], "step": 10}
    assert (output / "best").resolve().name == "step-00000010"


@pytest.mark.parametrize(
    "valid,message",
    [
        ({"metric": "recall"}, r"valid\.metric: 'recall' is none of .*recall_t2i_r1"),
        ({"metric": "rank_t2i_r1"}, r"valid\.metric: .* valid\.k_test"),
        ({"k_test": 13}, r"valid\.k_test: .*12 images: take at most k_test=12"),
    ],
)
def test_a_validation_that_cannot_work_is_refused_before_training(place, tmp_path, valid, message):
    with pytest.raises(ConfigError, match=message):
        training.make_trainer(training.tiny_tree(place, tmp_path / "run", valid=valid))
    assert not (tmp_path / "run").exists()


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


def spoil(trainer, at, value):
    """Let the update after ``at`` others leave a weight that is not finite."""
    step = trainer.optimizer.step

    def spoiled(*arguments):
        step(*arguments)
        if trainer.step == at:
            with torch.no_grad():
                trainer.model.vision_proj.bias[0] = value

    trainer.optimizer.step = spoiled


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": {"every": 4, "keep": 1}, "valid": {"every": 100}},
        {"checkpoint": {"every": 4, "keep": 1}, "valid": {"every": 8}, "ema": 0.5},
    ],
)
def test_weights_that_an_update_broke_are_not_saved(place, tmp_path, changes):
    changes = {"steps": 10, **changes}
    trainer = training.make_trainer(training.tiny_tree(place, tmp_path / "run", **changes))
    spoil(trainer, 7, float("inf"))
    with pytest.raises(NonFiniteError, match=r"step 8: .*vision_proj\.bias.*ids of the batch: \d"):
        trainer.run()
    assert json.loads((tmp_path / "run" / "last" / "state.json").read_text())["step"] == 4
    record = json.loads((tmp_path / "run" / "nonfinite-step-8.json").read_text())
    assert len(record["query_and_item_ids"]) == 6
    tree = training.tiny_tree(place, tmp_path / "run", **changes)
    assert training.make_trainer(tree, resume=True).run()["step"] == 10


def test_a_signal_saves_no_broken_weights(place, tmp_path):
    ask = lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None  # noqa: E731
    tree = training.tiny_tree(place, tmp_path / "run")
    trainer = training.make_trainer(tree, on_update=ask)
    spoil(trainer, 5, float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 6: .*The last checkpoint is .*step-00000004"):
        trainer.run()


def test_hard_negatives_of_a_model_that_broke(tmp_path_factory, tmp_path):
    """They are drawn by scores, and no draw by NaN must hide what happened."""
    place = world.make_place(tmp_path_factory.mktemp("hard"))
    world.make_model(place.model, hard_negatives=True)
    trainer = training.make_trainer(training.tiny_tree(place, tmp_path / "run"))
    spoil(trainer, 5, float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 7: .*loss is nan"):
        trainer.run()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And what ``last`` stands for is not moved, not even to put the same in its place."""
    events, sync, rename = [], os.fsync, os.rename

    def synced(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def renamed(source, target):
        events.append(f"{os.path.basename(source)} -> {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    snapshot = Snapshot(3, {"m": torch.ones(2)}, {})
    for _ in range(2):
        Checkpoints(tmp_path, keep=1).save(snapshot, lambda folder: None, best=False)
    moves = [place for place, event in enumerate(events) if "->" in event]
    assert [events[place] for place in moves] == [".draft-step-00000003 -> step-00000003"]
    written = [os.path.basename(event) for event in events[: moves[0]]]
    assert written == ["state.json", "optimizer.safetensors", ".draft-step-00000003"]


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
