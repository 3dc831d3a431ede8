"""The verb train-muge without --evaluate: epochs, log, files, resuming."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import world
from support.checkpoints import original_state, save
from support.models import BERT, write_dictionary, write_tokenizer
from support.retrieval_sets import write_set

from bagformer.cli.main import main
from bagformer.training import muge


@pytest.fixture
def place(tmp_path):
    """A checkpoint of random weights, all three splits, two epochs of three batches."""
    train = write_set(tmp_path / "train")
    valid = write_set(tmp_path / "valid", pictures=10, queries=7)
    test = write_set(tmp_path / "test", pictures=13, queries=9, labels=False)
    tokenizer = write_tokenizer(tmp_path / "bert")
    bert = tmp_path / "bert.json"
    bert.write_text(json.dumps({**BERT, "fusion_layer": 2, "encoder_width": 32}))
    splits = {"train": train, "valid": valid, "test": test}
    files = "".join(
        f"{name}_query_file: {files.queries}\n{name}_image_file: {files.images}\n"
        for name, files in splits.items()
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""{files}
bert_config: {bert}
image_res: 64
vision_width: 32
vision_heads: 2
embed_dim: 16
batch_size_train: 4
batch_size_test: 4
num_workers_train: 0
queue_size: 8
k_test: 5
entity_dict_path: {write_dictionary(tmp_path / "entities.txt")}
optimizer: {{opt: adamW, lr: 1e-3}}
schedular: {{epochs: 2}}
""",
        encoding="utf-8",
    )
    checkpoint = save(tmp_path / "checkpoint.pth", original_state())
    return SimpleNamespace(root=tmp_path, config=config, checkpoint=checkpoint, bert=tokenizer)


@pytest.fixture
def run(place, capsys):
    """Trains into a folder; gives exit code, standard output and standard error."""

    def call(out, *more, interaction="bagwise"):
        arguments = (
            *("--config", place.config, "--checkpoint", place.checkpoint, "--device", "cpu"),
            *("--text_encoder", place.bert, "--output_dir", place.root / out),
            *("--interaction", interaction, *more),
        )
        code = main(["train-muge", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def log_of(folder: Path) -> tuple[list[dict], str]:
    *lines, last = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], last


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


@pytest.mark.parametrize("interaction", ["bagwise", "tokenwise", "cls_token"])
def test_a_run_leaves_the_originals_files(place, run, interaction):
    code, printed, _ = run("out", "--testing", "--json", interaction=interaction)
    assert code == 0
    out, result = place.root / "out", json.loads(printed)
    lines, last = log_of(out)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert list(lines[0])[:4] == [
        "train_lr", "train_loss_itm", "train_loss_ita", "train_loss_twc",
    ]  # fmt: skip
    assert [line["train_lr"] for line in lines] == ["0.0010000", "0.0005000"]
    parts = [float(lines[0][f"train_loss_{part}"]) for part in ("itm", "ita", "twc")]
    assert all(0 < part < 1000 for part in parts)
    if interaction == "cls_token":
        assert parts[2] == pytest.approx(parts[0] + parts[1], abs=2e-6)
    means = [line["recall_val_r_mean"] for line in lines]
    best = means.index(max(means)) if max(means) > 0 else -1
    assert last == f"best epoch: {best}" and result["best_epoch"] == best
    assert {"recall_t2i.jsonl", "rank_t2i.jsonl", "merge_t2i.jsonl"} <= set(result["files"])
    assert len((out / "merge_t2i.jsonl").read_text().splitlines()) == 9
    again = run("again", "--evaluate", "--checkpoint", out / "best", interaction=interaction)
    assert again[0] == 0, again[2]
    logged = json.loads((place.root / "again" / "eval.log").read_text().splitlines()[1])
    kept = {name: value for name, value in lines[best].items() if "_val_" in name}
    assert {name: logged[name] for name in kept} == kept


@pytest.mark.parametrize("interaction", ["bagwise", "tokenwise"])
def test_a_resumed_run_is_the_uninterrupted_one(place, run, monkeypatch, interaction):
    assert run("whole", interaction=interaction)[0] == 0
    save = muge.MugeRun._save

    def stop(self, epoch, best):
        save(self, epoch, best)
        raise KeyboardInterrupt

    monkeypatch.setattr(muge.MugeRun, "_save", stop)
    assert run("parts", interaction=interaction)[0] == 130
    monkeypatch.undo()
    world.fails_with_one_line(
        run("parts", interaction=interaction), 2, "train-muge", "holds a training already"
    )
    assert run("parts", "--resume", interaction=interaction)[0] == 0
    assert log_of(place.root / "parts") == log_of(place.root / "whole")
    one, other = (weights(place.root / name) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_epoch_that_was_logged_but_not_saved_is_logged_once(place, run, monkeypatch):
    save = muge.MugeRun._save

    def stop(self, epoch, best):
        if epoch:
            raise KeyboardInterrupt
        save(self, epoch, best)

    monkeypatch.setattr(muge.MugeRun, "_save", stop)
    assert run("out")[0] == 130
    monkeypatch.undo()
    for _ in range(2):
        assert run("out", "--resume")[0] == 0
        lines, last = log_of(place.root / "out")
        assert [line["epoch"] for line in lines] == [0, 1] and last.startswith("best epoch: ")


@pytest.fixture
def begun(place, run, monkeypatch):
    """The first of two epochs is over."""
    save = muge.MugeRun._save

    def stop(self, epoch, best):
        save(self, epoch, best)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(muge.MugeRun, "_save", stop)
        assert run("out")[0] == 130


def test_a_run_goes_on_as_itself_alone(place, run, begun):
    config = place.config.read_text(encoding="utf-8")
    train, words = place.root / "train", place.root / "entities.txt"

    def refused(message, *more):
        result = run("out", "--resume", *more)
        world.fails_with_one_line(result, 2, "train-muge", message)
        assert "these differ: " in result[2] and "start a new run with --checkpoint" in result[2]
        assert result[2].count(" here)") == 1, result[2]

    for old, new, message in (
        ("lr: 1e-3", "lr: 2e-3", "optimizer.lr (0.001 there, 0.002 here)"),
        ("batch_size_train: 4", "batch_size_train: 5", "batch_size_train (4 there, 5 here)"),
        ("epochs: 2", "epochs: 2, warmup_epochs: 1", "schedular.warmup_epochs (0 there, 1 here)"),
    ):
        place.config.write_text(config.replace(old, new), encoding="utf-8")
        refused(message)
    place.config.write_text(config, encoding="utf-8")
    refused("--seed (42 there, 7 here)", "--seed", 7)
    for file, change, message in (
        (train / "queries.jsonl", _other_text, "queries of the training files"),
        (train / "imgs.tsv", _other_picture, "pictures of the training files"),
        (words, lambda raw: raw + "毛\n".encode(), "the dictionary's bags"),
    ):
        raw = file.read_bytes()
        file.write_bytes(change(raw))
        assert file.read_bytes() != raw
        refused(message)
        file.write_bytes(raw)
    # what only decides how it is run, and how long
    shutil.copytree(train, place.root / "moved")
    text = config.replace(str(train), str(place.root / "moved")).replace("epochs: 2", "epochs: 3")
    text = text.replace("num_workers_train: 0", "num_workers_train: 1").replace(
        "k_test: 5", "k_test: 4"
    )
    place.config.write_text(text, encoding="utf-8")
    assert run("out", "--resume")[0] == 0
    assert [line["epoch"] for line in log_of(place.root / "out")[0]] == [0, 1, 2]


def _other_text(raw):
    return raw.replace(b'"query_text": "', b'"query_text": "t', 1)


def _other_picture(raw):
    """Each id gets the picture of the id before."""
    rows = [line.split(b"\t") for line in raw.splitlines()]
    return b"".join(row[0] + b"\t" + rows[n - 1][1] + b"\n" for n, row in enumerate(rows))


@pytest.mark.parametrize("changed", [False, True])
def test_a_best_epoch_of_other_validation_files_is_forgotten(place, run, begun, changed):
    state = (place.root / "out" / "last").resolve() / "state.json"
    described = json.loads(state.read_text())
    described["run"] |= {"best": 99.5, "best_epoch": 0}
    state.write_text(json.dumps(described))
    if changed:
        file = place.root / "valid" / "imgs.tsv"
        file.write_bytes(_other_picture(file.read_bytes()))
    assert run("out", "--resume")[0] == 0
    lines, last = log_of(place.root / "out")
    assert lines[1]["recall_val_r_mean"] > 0
    assert last == f"best epoch: {1 if changed else 0}"


def test_the_model_learns_what_it_is_shown(place, run):
    text = place.config.read_text().replace("epochs: 2", "epochs: 6")
    place.config.write_text(text, encoding="utf-8")
    assert run("out")[0] == 0
    lines, _ = log_of(place.root / "out")
    first, last = (float(lines[row]["train_loss_twc"]) for row in (0, -1))
    assert last < 0.9 * first


def test_what_cannot_be_trained_is_one_line(place, run):
    config = place.config.read_text(encoding="utf-8")

    def fails(message, change, *more):
        place.config.write_text(config.replace(*change), encoding="utf-8")
        world.fails_with_one_line(run("none", *more), 2, "train-muge", message)

    fails("has no checkpoint to go on from", ("", ""), "--resume")
    fails("--checkpoint", ("", ""), "--checkpoint", "")
    fails("too few for one update", ("batch_size_train: 4", "batch_size_train: 4000"))
    fails("schedular.sched must be cosine", ("epochs: 2", "epochs: 2, sched: step"))


def test_a_loss_that_is_no_number_stops_the_run(place, run, monkeypatch):
    bagwise = muge.bagwise_losses

    def broken(*arguments):
        return {name: value * float("nan") for name, value in bagwise(*arguments).items()}

    monkeypatch.setattr(muge, "bagwise_losses", broken)
    code, _, error = run("out")
    assert code == 1 and "the loss is nan in step 0 of epoch 0" in error
    assert not (place.root / "out" / "last").exists()


@pytest.mark.parametrize("protocol", ["original", "corrected"])
def test_training_lays_transparency_as_the_evaluation_does(place, run, monkeypatch, protocol):
    kept, seen = muge.TrainPairs, []

    def keep(pairs, *rest):
        seen.append(pairs)
        return kept(pairs, *rest)

    monkeypatch.setattr(muge, "TrainPairs", keep)
    matched = ("--protocol", protocol) if protocol == "corrected" else ()
    code, _, err = run("out", *matched)
    assert code == 0, err
    (pairs,) = seen
    clear = 0
    for index in range(len(pairs)):
        raw = Image.open(io.BytesIO(pairs.encoded(index)))
        wanted = raw.convert("RGB")
        if raw.mode == "RGBA":
            clear += 1
            white = Image.new("RGBA", raw.size, "white")
            if protocol == "corrected":
                wanted = Image.alpha_composite(white, raw).convert("RGB")
        assert pairs[index]["image"].tobytes() == wanted.tobytes()
    assert clear
