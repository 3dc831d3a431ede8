"""The configuration file: read strictly, changed from the command line, translated."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import pytest

from bagformer.training.config import ConfigError, TrainConfig, _numbers
from bagformer.training.config_file import dump, from_tree, load

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = """\
model: some/folder
output: runs/first
data:
  train: {queries: q.jsonl, images: i.tsv}
epochs: 3
"""

ORIGINAL = """\
train_query_file: ./data/MR_train_queries.jsonl
train_image_file: ./data/MR_train_imgs.tsv
valid_query_file: ./data/MR_valid_queries.jsonl
valid_image_file: ./data/MR_valid_imgs.tsv
test_query_file: ./data/MR_test_queries.jsonl
test_image_file: ./data/MR_test_imgs.tsv
dataset: muge
bert_config: configs/config_bert.json
image_res: 384
batch_size_train: 16
batch_size_test: 32
num_workers_train: 4
num_workers_test: 0
queue_size: 65536
momentum: 0.995
vision_width: 768
embed_dim: 256
temp: 0.07
k_test: 128
fusion_strategy: early_fusion
entity_dict_path: ./data/entity_dict.txt
alpha: 0.0
distill: False
warm_up: True
optimizer: {opt: adamW, lr: 1e-5, weight_decay: 0.02}
schedular: {sched: cosine, lr: 1e-5, epochs: 6, min_lr: 0, decay_rate: 1, warmup_lr: 1e-5,
  warmup_epochs: 1, cooldown_epochs: 0}
"""


@pytest.fixture
def write(tmp_path):
    def call(text):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "c.yaml"

    return call


def test_defaults_and_a_round_trip(write):
    config, remarks = load(write(MINIMAL), ["optim.lr=1e-5", "optim.betas=[0.9, 0.98]", "clip=1"])
    assert remarks == []
    assert (config.optim.lr, config.optim.betas, config.clip) == (1e-5, [0.9, 0.98], 1.0)
    assert isinstance(config.clip, float)
    assert config.schedule == TrainConfig().schedule
    assert load(write(dump(config)))[0] == config


@pytest.mark.parametrize(
    "text,changes,message",
    [
        ("epohcs: 3\n", [], "c.yaml:6: epohcs: unknown key, the nearest known one is 'epochs'"),
        ("lr: 1\n", [], "c.yaml:6: lr: unknown key, the nearest known one is 'optim.lr'"),
        ("optim:\n  rl: 1\n", [], "c.yaml:7: optim.rl: unknown key, the nearest known one is 'lr'"),
        ("optim: 3\n", [], "c.yaml:6: optim: expected keys and values, got 3"),
        ("batch_size: many\n", [], "c.yaml:6: batch_size: expected a whole number, got 'many'"),
        ("batch_size: true\n", [], "batch_size: expected a whole number, got True"),
        ("optim: {lr: [1]}\n", [], r"optim.lr: expected a number, got \[1\]"),
        ("freeze: vision_model\n", [], "freeze: expected a list of text, got 'vision_model'"),
        ("clip: x\n", [], "c.yaml:6: clip: expected a number or null, got 'x'"),
        ("batch_size: 0\n", [], "c.yaml:6: batch_size: expected a number above 0, got 0"),
        ("precision: fp16\n", [], "c.yaml:6: precision: expected one of fp32, bf16, got 'fp16'"),
        ("steps: 4\n", [], "epochs: set exactly one of steps and epochs"),
        ("ema: 1\n", [], "ema: expected a number between 0 and 1"),
        ("optim: {lr: 0}\n", [], "c.yaml:6: optim.lr: expected a number above 0, got 0.0"),
        ("optim: {eps: 0}\n", [], "optim.eps: expected a number above 0, got 0.0"),
        ("optim: {betas: [0.9, 1]}\n", [], "optim.betas: expected two or three numbers from 0 to"),
        ("optim: {betas: [0.9]}\n", [], r"optim.betas: expected two or three .* got \[0.9\]"),
        ("optim: {betas: [-1, 0.9]}\n", [], "optim.betas: expected two or three numbers from 0 to"),
        ("threads: 1000000\n", [], "threads: expected at most 1024, got 1000000"),
        ("augment: {crop: [0.5, 2]}\n", [], "augment.crop: expected two numbers .* up to 1, got"),
        ("augment: {crop: [0, 0]}\n", [], "augment.crop: expected two numbers in rising order"),
        ("augment: {ratio: [0, 1]}\n", [], "augment.ratio: expected two numbers in rising order"),
        (
            "augment: {rand_augment: {magnitude: 31}}\n",
            [],
            "magnitude: expected at most 30, got 31",
        ),
        ("start_method: thread\n", [], "start_method: expected one of .* or null, got 'thread'"),
        ("clip: .inf\n", [], "c.yaml:6: clip: expected a finite number, got inf"),
        ("optim:\n  lr: 1e999\n", [], "c.yaml:7: optim.lr: expected a finite number, got inf"),
        ("", ["loss.twc=.inf"], "--set loss.twc=.inf: loss.twc: expected a finite number"),
        ("optim: {options: {momentum: .inf}}\n", [], "optim.options.momentum: expected a finite"),
        ("augment: {crop: [1, 0.5]}\n", [], "augment.crop: expected two numbers in rising order"),
        ("model: x\n", [], "c.yaml:6: model was already set at .*c.yaml:1"),
        ("a: [1\n", [], "c.yaml:7: not YAML"),
        ("", ["optim.lr=x"], "--set optim.lr=x: optim.lr: expected a number, got 'x'"),
        ("", ["optim.l=1"], "--set optim.l=1: optim.l: unknown key, the nearest known one is 'lr'"),
        ("", ["lr"], "--set lr: expected a.b=value"),
        ("", ["output=null"], "--set output=null: output: name the folder to write to"),
        ("", ["data.train.images=null"], "data.train.images: name the file of training data"),
        ("", ["data.valid.images=a"], "data.valid: give both queries and images"),
        ("", ["data.train.source=csv"], "data.train.source: expected one of muge, parquet, hugg"),
        ("", ["data.train.queries=a.parquet"], "data.train.images: a row of parquet holds its pic"),
        ("", ["data.train.split=x"], "data.train.split: muge has none, only a folder of hugging"),
        ("", ["data.train.columns.text=x"], "data.train.columns: muge has none, only parquet, hu"),
        (
            "",
            ["data.train.columns.txt=x"],
            "data.train.columns.txt: .*the nearest known one is 'te",
        ),
        ("", ["data.train.queries=[a, b]"], "data.train.queries: muge takes one, got 2"),
        ("", ["data.train={queries: me/cats}"], "or set data.train.source if me/cats is not MUGE"),
        ("", ["data.train.queries=[]"], "data.train.queries: name the file of training data"),
        ("", ["data.train.queries=1"], "data.train.queries: expected text or a list of text or"),
    ],
)
def test_mistakes_name_key_and_place(write, text, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(write(MINIMAL + text), changes)


FLOATS = (
    *("clip", "ema", "optim.lr", "optim.weight_decay", "optim.eps", "schedule.warmup"),
    *("schedule.warmup_lr", "schedule.min_lr", "loss.twc", "loss.ita", "loss.itm"),
    *("augment.flip", "augment.rand_augment.probability", "schedule.options.decay_rate"),
    *("model.cls_temperature", "model.temperature", "model.text_config.hidden_dropout_prob"),
)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_other_than_finite(number):
    """Also not in a configuration that was no file, where nothing reads YAML."""
    tree = {
        "output": "o",
        "steps": 1,
        "model": {"embed_dim": 8},
        "data": {"train": {"queries": "q", "images": "i"}},
    }
    from_tree(tree, {})
    for key in FLOATS:
        changed = copy.deepcopy(tree)
        *parents, last = key.split(".")
        target = changed
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = number
        with pytest.raises(ConfigError, match=f"{key}: expected a finite number, got {number}"):
            from_tree(changed, {})
    for key in ("optim.betas", "augment.crop", "augment.ratio"):
        part, name = key.split(".")
        with pytest.raises(ConfigError, match=f"{key}: expected a finite number, got {number}"):
            from_tree({**tree, part: {name: [0.5, number]}}, {})


def test_every_number_of_the_configuration_is_known_here():
    """A new float needs no check of its own, but a place in the list above."""
    found = {key for key, _ in _numbers(from_tree(
        {"model": "m", "output": "o", "steps": 1, "clip": 1, "ema": 0.5, "optim": {"eps": 1e-8},
         "data": {"train": {"queries": "q", "images": "i"}}}, {}), "")}  # fmt: skip
    lists = {"augment.crop", "augment.ratio"}
    assert found - lists <= set(FLOATS)


def test_what_is_no_configuration(write):
    for text, message in (("- a\n", "c.yaml:1: expected keys"), ("", "epochs: set exactly one")):
        with pytest.raises(ConfigError, match=message):
            load(write(text))
    file = write("")
    file.write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"not UTF-8"):
        load(file)


def test_the_originals_file_is_read_unchanged(write):
    config, remarks = load(write(ORIGINAL), ["batch_size=8"])
    assert config.data.train.queries == "./data/MR_train_queries.jsonl"
    assert config.data.test.images == "./data/MR_test_imgs.tsv"
    assert config.model["fusion"] == "early" and config.model["protocol"] == "original"
    assert config.model["text_config"] == "configs/config_bert.json"
    assert config.model["vision_config"]["image_size"] == 384
    assert (config.batch_size, config.valid.batch_size, config.valid.k_test) == (8, 32, 128)
    assert (config.optim.name, config.optim.lr) == ("adamw", 1e-5)
    assert config.optim.param_groups == "original"
    assert (config.epochs, config.schedule.warmup, config.schedule.warmup_lr) == (6, 1, 1e-5)
    assert config.schedule.unit == "original"
    assert config.loss.positives == "pair" and config.processor.dictionary.endswith("dict.txt")
    assert len(remarks) == 1 and "queue_size, momentum, vision_width" in remarks[0]
    with pytest.raises(ConfigError, match=r"c.yaml:9: image_rse: .* 'image_res'"):
        load(write(ORIGINAL.replace("image_res", "image_rse")))
    with pytest.raises(ConfigError, match=r"c.yaml:26: schedular.shced: .* 'sched'"):
        load(write(ORIGINAL.replace("sched:", "shced:")))


def test_the_originals_model(write, tmp_path):
    """Its BERT file becomes our text_config; the keys for its own code go."""
    from bagformer.training.build import model_config

    bert = tmp_path / "bert.json"
    bert.write_text(
        '{"vocab_size": 21128, "num_hidden_layers": 4, "hidden_size": 24, "fusion_layer": 3, '
        '"num_attention_heads": 2, "encoder_width": 768, "intermediate_size": 8}'
    )
    config, _ = load(write(ORIGINAL), [f"model.text_config={bert}"])
    made = model_config(config.model, 21128)
    assert (made.fusion_layer, made.fusion, made.protocol) == (3, "early", "original")
    assert (made.temperature, made.sep_token, made.cls_temperature) == (None, False, 0.07)
    with pytest.raises(ConfigError, match=r"vocab_size is 21128, the vocabulary has 30000"):
        model_config(config.model, 30000)
    with pytest.raises(FileNotFoundError, match=r"model.text_config"):
        model_config({"text_config": "nowhere.json"}, 10)
    with pytest.raises(ConfigError, match=r"model.embed_dmi: .* one is 'embed_dim'"):
        model_config({"embed_dmi": 8}, 10)
    with pytest.raises(ConfigError, match=r"model.text_config.hiden_size: .* 'hidden_size'"):
        model_config({"text_config": {"hiden_size": 8}}, 10)
    with pytest.raises(ConfigError, match=r"model: .*embed_dim"):
        model_config({"embed_dim": 0}, 10)


def test_mappings_need_no_file():
    tree = {"model": "m", "output": "o", "steps": 1, "data": {"train": {"queries": "q"}}}
    with pytest.raises(ConfigError, match=r"config: data.train.images: name the file"):
        from_tree(tree, {})


def test_the_example_and_the_documentation_are_read(tmp_path):
    from bagformer.training.build import model_config

    config, _ = load(ROOT / "examples" / "train_iconpark.yaml", ["folder=SET"])
    made = model_config(config.model, 21128)
    assert (made.reduction, made.vision_config.backbone) == ("mean", "resnet10t")
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S)
    (tmp_path / "c.yaml").write_text(block[1])
    config, _ = load(tmp_path / "c.yaml")
    assert (config.model, config.epochs) == ("FOLDER", 6)


def test_the_documented_recall_is_the_logged_one():
    lines = (ROOT / "examples" / "train_iconpark.log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if row["kind"] == "valid"][-1]
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"{rows[0]['pairs']:,} pairs" in text and f"after {last['step']} updates" in text
    for name in ("recall_t2i_r1", "recall_t2i_r10"):
        assert f"{last[name]:.1f} %" in text
