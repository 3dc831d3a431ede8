"""The verbs train and plot-log."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys

import pytest
import yaml
from support import training
from support.world import fails_with_one_line


@pytest.fixture
def write(place, tmp_path):
    def call(**changes):
        tree = training.tiny_tree(place, tmp_path / "run", **{"steps": 8, **changes})
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return path

    return call


def test_train_then_resume_then_plot(run, write, tmp_path):
    config, output = write(), tmp_path / "run"
    code, out, _ = run("train", config, "--set", "steps=6", "--json", "--quiet")
    result = json.loads(out)
    assert code == 0 and result["step"] == 6 and result["metric"] == "recall_t2i_mean"
    assert result["model"] == str(output / "best")
    assert yaml.safe_load((output / "config.yaml").read_text())["steps"] == 6
    fails_with_one_line(run("train", config), 2, "train", "already holds a run")
    code, out, _ = run("train", config, "--resume", "--set", "steps=7")
    assert code == 0 and "done at step 7" in out and "best: recall_t2i_mean" in out
    steps = [row["step"] for row in training.read_rows(output, "train")]
    assert steps == [3, 6, 7]
    pytest.importorskip("matplotlib", reason="SKIPPED LOUDLY: matplotlib is not installed")
    picture = tmp_path / "curves.svg"
    code, out, _ = run("plot-log", output, output / "log.jsonl", "-o", picture)
    assert code == 0 and "8 curves of 2 logs" in out
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_dry_run_prints_the_resolved_configuration(run, write):
    code, out, _ = run("train", write(), "--dry-run", "--set", "optim.lr=2e-5")
    found = yaml.safe_load(out)
    assert code == 0 and found["optim"]["lr"] == 2e-5 and found["schedule"]["name"] == "cosine"
    code, out, _ = run("train", write(), "--dry-run", "--json")
    assert code == 0 and json.loads(out)["batch_size"] == 6


def test_a_configuration_that_is_not_there_is_named(run):
    fails_with_one_line(run("train", "no.yaml"), 2, "train", "CONFIG: there is no file no.yaml")


@pytest.mark.parametrize(
    "changes,arguments,message",
    [
        ({}, ["--set", "optim.rl=1"], "--set optim.rl=1: optim.rl: unknown key"),
        ({"batch_size": 25}, [], "data.train has 24 pairs, too few for one update of 25"),
        ({"model": "nowhere"}, [], "model: nowhere is no model folder"),
        ({"folder": "nowhere"}, [], "data.train.queries: no such file: nowhere/muge/queries"),
        ({"device": "tpu"}, [], "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"freeze": ["visoin"]}, [], "freeze: 'visoin' matches no parameter"),
        ({"optim": {"name": "adamwww"}}, [], "optim.name: timm.optim has no 'adamwww'"),
        ({"mini_batch": 2}, [], "mini_batch: the matching loss cannot be computed in pieces"),
    ],
)
def test_mistakes_are_one_line(run, write, changes, arguments, message):
    result = run("train", write(**changes), "--quiet", *arguments)
    fails_with_one_line(result, 2, "train", message)


def test_a_missing_configuration(run, tmp_path):
    fails_with_one_line(run("train", tmp_path / "no.yaml"), 2, "train", "no.yaml")


def test_what_is_no_log(run, tmp_path):
    def fails(message, *arguments):
        fails_with_one_line(run("plot-log", *arguments), 2, "plot-log", message)

    log = tmp_path / "log.jsonl"
    fails("no such file", log)
    for line in ('{"step": 1}', '{"kind": ["a"], "step": 1}', '{"kind": "train", "step": 1e400}'):
        log.write_text(line + '\n{"kind": "train", "step": 2}\n')
        fails("log.jsonl:1: not a line of a training log", log)
    log.write_text('{"kind": "start", "step": 0}\n')
    fails("no step has been logged yet", log)
    fails("--out: expected a name in .svg, .png, .pdf", log, "-o", "curves.txt")


def test_plotting_without_matplotlib(run, tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 2, "loss": 1.5}\n')
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = run("plot-log", tmp_path, "-o", tmp_path / "c.svg")
    fails_with_one_line(result, 2, "plot-log", "pip install 'bagformer[plot]'")


@pytest.mark.slow
def test_two_processes(write, tmp_path):
    """torchrun: the processes end with one model, and log the loss over the pairs of both."""
    config = write(
        batch_size=3,
        steps=4,
        loss={"gather": "local"},
        valid={"every": 3},
        checkpoint={"every": 4},
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(20000 + os.getpid() % 20000)]
    command += ["-m", "bagformer.cli", "train", str(config), "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 4
    start = training.read_rows(tmp_path / "run", "start")[0]
    assert (start["processes"], start["steps_per_epoch"]) == (2, 4)
    assert [row["step"] for row in training.read_rows(tmp_path / "run", "train")] == [3, 4]
