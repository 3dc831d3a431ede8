"""Whole runs: what they write, how they stop, and what a full disk or a NaN leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from support import training, world

from bagformer import BagFormerForRetrieval, BagFormerProcessor
from bagformer.training import checkpoint
from bagformer.training.checkpoint import CheckpointError, Checkpoints, Snapshot
from bagformer.training.config import ConfigError
from bagformer.training.log import Meter, cut
from bagformer.training.loop import NonFiniteError
from bagformer.training.packing import pack, unpack


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run over its whole length, and what its updates reported."""
    output, seen = tmp_path_factory.mktemp("runs") / "first", []
    tree = training.tiny_tree(place, output, clip=5.0, steps=40, optim={"lr": 5e-3})
    trainer = training.make_trainer(tree, on_update=lambda step, values: seen.append(values))
    return trainer.run(), output, seen, trainer


def test_a_run_learns_and_writes_what_it_should(finished):
    result, output, seen, _ = finished
    assert result["step"] == 40 and not result["stopped"]
    assert sum(v["loss"] for v in seen[-8:]) < sum(v["loss"] for v in seen[:8]) - 2
    rows = training.read_rows(output, "train")
    assert [row["step"] for row in rows] == [*range(3, 40, 3), 40]
    mean = sum(v["loss"] for v in seen[3:6]) / 3
    assert rows[1]["loss"] == pytest.approx(mean) and rows[1]["epoch"] == 1
    valid = training.read_rows(output, "valid")
    best = max(valid, key=lambda row: row["recall_t2i_mean"])
    assert result["best"] == {"value": best["recall_t2i_mean"], "step": best["step"]}
    state = json.loads((output / "best" / "state.json").read_text())
    assert state["step"] == best["step"]
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert {"step-00000036", "step-00000040"} <= set(kept) and len(kept) <= 3


def test_the_saved_model_is_the_trained_one(finished, place):
    _, output, _, trainer = finished
    model = BagFormerForRetrieval.from_pretrained(str(output / "last")).eval()
    processor = BagFormerProcessor.from_pretrained(str(output / "last"))
    inputs = processor(text=["红色毛衣"], images=[world.picture((200, 0, 0), 0)])
    trainer.model.eval()
    with torch.inference_mode():
        ours, theirs = model(**inputs), trainer.model(**inputs)
    assert torch.equal(ours.text_to_image, theirs.text_to_image)


def test_nothing_written_is_pickled(finished):
    _, output, _, _ = finished
    suffixes = {path.suffix for path in (output / "last").resolve().iterdir()}
    assert suffixes <= {".json", ".safetensors", ".bin"}
    assert [p.name for p in (output / "last").resolve().glob("*.bin")] == ["bags.bin"]


def test_a_run_is_not_overwritten_nor_resumed_as_another(finished, place):
    _, output, _, _ = finished
    tree = training.tiny_tree(place, output, clip=5.0, steps=40, optim={"lr": 5e-3})
    with pytest.raises(ConfigError, match=r"already holds a run; go on with it"):
        training.make_trainer(tree)
    with pytest.raises(ConfigError, match=r"batch_size \(6 there, 5 here\)"):
        training.make_trainer({**tree, "batch_size": 5}, resume=True)
    trainer = training.make_trainer(tree, resume=True)
    assert trainer.run()["step"] == 40
    trainer = training.make_trainer({**tree, "steps": 42}, resume=True)
    assert trainer.run()["step"] == 42


def test_not_a_number_stops_the_run_and_keeps_the_last_good_checkpoint(place, tmp_path):
    tree = training.tiny_tree(place, tmp_path / "run")

    def poison(step, _):
        if step == 6:
            with torch.no_grad():
                trainer.model.vision_proj.bias[0] = float("nan")

    trainer = training.make_trainer(tree, on_update=poison)
    with pytest.raises(NonFiniteError, match=r"step 7: .*loss is nan.*query/picture ids") as caught:
        trainer.run()
    assert "step-00000004" in str(caught.value)
    record = json.loads((tmp_path / "run" / "nonfinite-step-7.json").read_text())
    assert len(record["query_and_item_ids"]) == 6 and record["step"] == 7
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_the_old_checkpoint(place, tmp_path, monkeypatch, after):
    """The second save finds no room after ``after`` of its files."""
    trainer = training.make_trainer(training.tiny_tree(place, tmp_path / "run"))
    written, save_file = [], checkpoint.save_file

    def full(tensors, path, **options):
        if trainer.step > 4 and len(written) >= 2 + after:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step 8 could not be written, the disk of .* full"):
        trainer.run()
    assert len(written) == 2 + after
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert checkpoint.read_snapshot(tmp_path / "run" / "last").step == 4
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    tree = training.tiny_tree(place, tmp_path / "run")
    assert training.make_trainer(tree, resume=True).run()["step"] == 30


def test_a_polite_signal_saves_first(place, tmp_path):
    tree = training.tiny_tree(place, tmp_path / "run")

    def ask(step, _):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    result = training.make_trainer(tree, on_update=ask).run()
    assert (result["step"], result["stopped"]) == (7, True)
    assert checkpoint.read_snapshot(tmp_path / "run" / "last").step == 7


def test_an_unknown_metric_names_those_there_are(place, tmp_path):
    tree = training.tiny_tree(place, tmp_path / "run", valid={"every": 1, "metric": "recall"})
    with pytest.raises(ConfigError, match=r"'recall' is none of .*recall_t2i_r1"):
        training.make_trainer(tree).run()


def test_checkpoints_that_cannot_be_read(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint to resume from"):
        checkpoint.read_snapshot(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        kept.save(Snapshot(step, {}, {}), lambda folder: None, best=step == 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000005", "step-00000006"]
    assert kept.path("best").name == names[0] and kept.path("last").name == names[2]


def test_packing_is_exact():
    value = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3, dtype=torch.float64)}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 1e-300), "none": None, "big": float("inf")}],
        "text": "红色",
        "flag": True,
        "dtype": torch.bfloat16,
    }
    tensors = {}
    text = json.dumps(pack(value, tensors), allow_nan=False)
    found = unpack(json.loads(text), tensors)
    assert found["groups"] == value["groups"] and found["text"] == "红色" and found["flag"] is True
    assert found["dtype"] is torch.bfloat16
    for name, tensor in value["state"][0].items():
        assert torch.equal(found["state"][0][name], tensor)
        assert found["state"][0][name].dtype == tensor.dtype
    with pytest.raises(TypeError, match=r"a.b: set cannot be stored"):
        pack({"b": {1}}, {}, "a")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2, "kind": "valid"}\n{"step"')
    cut(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "kind": "valid"}\n'


def test_the_meter_tells_waiting_from_working():
    meter = Meter()
    meter.add({"loss": 1.0})
    meter.add({"loss": 4.0})
    meter.spent(3.0, 1.0, 8, 40)
    meter.spent(1.0, 3.0, 8, 40)
    assert meter.means() == {"loss": 2.5}
    assert meter.speed() == {
        "pictures_per_s": 2.0,
        "tokens_per_s": 10.0,
        "data_s": 2.0,
        "step_s": 2.0,
    }
    other = Meter()
    other.load(meter.state())
    assert other.means() == meter.means() and other.speed()["data_s"] == 0
