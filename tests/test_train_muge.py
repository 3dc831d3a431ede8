"""The verb train-muge with --evaluate: the original's flags, files and formats."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import world
from support.checkpoints import original_state, save
from support.models import BERT, write_dictionary, write_tokenizer
from support.original import arch, letters
from support.retrieval_sets import write_set

from bagformer.cli.main import main
from bagformer.evaluation.muge_config import read_config, write_config

FILES = ["recall_t2i.jsonl", "rank_t2i.jsonl", "merge_t2i.jsonl"]


@pytest.fixture
def run(run):
    return lambda *arguments: run("train-muge", *arguments)


@pytest.fixture
def place(tmp_path):
    """A checkpoint of random weights as the original saves it, two splits, and a config."""
    valid = write_set(tmp_path / "valid")
    test = write_set(tmp_path / "test", pictures=13, queries=9, labels=False)
    tokenizer = write_tokenizer(tmp_path / "bert")
    bert = tmp_path / "bert.json"
    bert.write_text(json.dumps({**BERT, "fusion_layer": 2, "encoder_width": 32}))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
valid_query_file: {valid.queries}
valid_image_file: {valid.images}
test_query_file: {test.queries}
test_image_file: {test.images}
bert_config: {bert}
image_res: 64
vision_width: 32
vision_heads: 2
embed_dim: 16
batch_size_test: 4
k_test: 9
entity_dict_path: {write_dictionary(tmp_path / "entities.txt")}
optimizer: {{opt: adamW, lr: 1e-5, weight_decay: 0.02}}
""",
        encoding="utf-8",
    )
    checkpoint = save(tmp_path / "checkpoint.pth", original_state())
    return SimpleNamespace(
        root=tmp_path,
        config=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        arguments=[
            *("--config", config, "--checkpoint", checkpoint, "--text_encoder", tokenizer),
            *("--output_dir", tmp_path / "out", "--device", "cpu", "--evaluate"),
        ],
    )


def test_evaluate_and_testing_write_the_originals_files(run, place):
    code, printed, _ = run(*place.arguments, "--testing", "--json")
    out = place.root / "out"
    result = json.loads(printed)
    assert code == 0 and result["protocol"] == "original"
    assert sorted(result["files"]) == sorted(path.name for path in out.iterdir())
    assert sorted(result["files"]) == sorted(["config.yaml", "eval.log", *FILES])
    first, second = (out / "eval.log").read_text(encoding="utf-8").splitlines()
    assert first == "evaluate start"
    logged = json.loads(second)
    assert list(logged)[:9] == [
        *(f"recall_val_{side}_{end}" for side in ("txt", "img") for end in ENDS),
        "recall_val_r_mean",
    ]
    assert list(logged)[-1] == "epoch" and logged["epoch"] == 0 and len(logged) == 28
    assert logged == result["metrics"]
    for name in FILES:
        rows = [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]
        assert [row["query_id"] for row in rows] == list(range(40, 49))
        assert all(list(row) == ["query_id", "query_text", "item_ids"] for row in rows)
        assert all(len(set(row["item_ids"])) == 10 for row in rows)
    written = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert written["vision_heads"] == 2 and written["k_test"] == 9
    # run again: the log grows
    assert run(*place.arguments)[0] == 0
    assert (out / "eval.log").read_text(encoding="utf-8").splitlines() == [first, second] * 2


ENDS = ("r1", "r5", "r10", "r_mean")


def test_a_converted_folder_gives_the_same_numbers(run, place):
    log = place.root / "out" / "eval.log"
    assert run(*place.arguments)[0] == 0
    expected = log.read_text()
    folder = place.root / "folder"
    words = ("--vocabulary", place.tokenizer, "--dictionary", place.root / "entities.txt")
    heads = ("--vision-heads", 2, "--text-heads", 2)
    converting = ("convert", place.checkpoint, folder, *words, *heads)
    assert main([str(argument) for argument in converting]) == 0
    shutil.rmtree(place.root / "out")
    place.arguments[3] = folder
    assert run(*place.arguments)[0] == 0
    assert log.read_text() == expected


@pytest.mark.parametrize("interaction", ["tokenwise", "cls_token"])
def test_the_interaction_is_that_of_the_flag(run, place, interaction):
    code, printed, _ = run(*place.arguments, "--interaction", interaction, "--json")
    assert code == 0 and json.loads(printed)["interaction"] == interaction


def test_the_corrected_protocol_is_one_flag_away(run, place):
    found = {}
    for protocol in ("original", "corrected"):
        code, printed, _ = run(*place.arguments, "--protocol", protocol, "--json")
        assert code == 0
        found[protocol] = json.loads(printed)
        assert found[protocol]["protocol"] == protocol
    assert found["original"]["metrics"] != found["corrected"]["metrics"]


def test_bad_input_is_one_line(run, place):
    config = place.config.read_text(encoding="utf-8")
    valid_image = next(line for line in config.splitlines() if line.startswith("valid_image"))

    def fails(message, *, change=("", ""), arguments=None):
        place.config.write_text(config.replace(*change), encoding="utf-8")
        world.fails_with_one_line(run(*(arguments or place.arguments)), 2, "train-muge", message)
        assert not (place.root / "out").exists()

    fails("k_test=12 is larger than the set", change=("k_test: 9", "k_test: 12"))
    fails("unknown key 'ktest', did you mean 'k_test'", change=("k_test:", "ktest:"))
    fails("k_test: expected a whole number", change=("k_test: 9", "k_test: nine"))
    fails("late_fusion or early_fusion", change=("k_test: 9", "fusion_strategy: middle"))
    for wrong, message in (
        ("temp: .inf", "temp: expected a number above 0, got inf"),
        ("temp: nan", "temp: expected a number above 0, got 'nan'"),
        ("momentum: 1.5", "momentum: expected a number from 0 to 1, got 1.5"),
        ("alpha: -1", "alpha: expected a number from 0 to 1, got -1"),
        ("optimizer: {lr: 0}", "optimizer.lr: expected a number above 0, got 0"),
        ("optimizer: {lr: 1e999}", "optimizer.lr: expected a number above 0, got inf"),
        (
            "optimizer: {weight_decay: true}",
            "optimizer.weight_decay: expected a number of at least",
        ),
        ("schedular: {epochs: 0}", "schedular.epochs: expected a whole number from 1, got 0"),
        ("schedular: {epochs: 1.5}", "schedular.epochs: expected a whole number from 1, got 1.5"),
        ("schedular: {min_lr: -1}", "schedular.min_lr: expected a number of at least 0, got -1"),
        ("queue_size: -1", "queue_size: expected a whole number from 0, got -1"),
    ):
        name = wrong.partition(":")[0]
        there = next((line for line in config.splitlines() if line.startswith(name)), "k_test: 9")
        fails(message, change=(there, wrong if there.startswith(name) else f"k_test: 9\n{wrong}"))
    fails("the key 'k_test' occurs twice", change=("k_test: 9", "k_test: 9\nk_test: 8"))
    fails("vision_heads must be given", change=("vision_heads: 2\n", ""))
    fails("valid_query_file: there is no file", change=("/valid/queries", "/none/queries"))
    fails("the config has no valid_image_file", change=(valid_image, ""))
    fails("bert_config: there is no", change=("bert.json", "none.json"))
    fails("no YAML", change=("image_res: 64", "image_res: ]"))
    place.config.write_text(config, encoding="utf-8")
    swapped = list(place.arguments)
    swapped[3] = place.root / "none.pth"
    fails("--checkpoint: there is no", arguments=swapped)
    swapped = list(place.arguments)
    swapped[5] = "bert-large"
    fails("--text_encoder: there is no folder bert-large", arguments=swapped)
    fails("the config has no train_query_file", arguments=place.arguments[:-1])
    fails("--resume", arguments=[*place.arguments, "--resume"])
    fails("--config: there is no file", arguments=["--config", "none.yaml", "--evaluate"])


def test_a_key_that_nothing_reads_is_named(run, place):
    text = place.config.read_text().replace("optimizer: {", "optimizer: {nesterov: true, ")
    place.config.write_text(f"{text}colour: red\n")
    code, _, err = run(*place.arguments)
    assert code == 0 and "nothing reads colour, optimizer.nesterov" in err


def test_a_bare_vocabulary_lower_cases_as_the_original_does(run, place):
    (place.tokenizer / "tokenizer_config.json").unlink()
    code, _, err = run(*place.arguments)
    assert code == 0 and "texts are lower-cased" in err


def test_numbers_of_a_config_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "optimizer: {opt: adamW, lr: 1e-5, weight_decay: 2E-2}\ntemp: .07\nalpha: 0\n"
        "vision_width: 1280\nschedular: {lr: 1.5e+1, sched: cosine}\n"
    )
    config = read_config(path)
    assert config["optimizer"] == {"opt": "adamW", "lr": 1e-5, "weight_decay": 0.02}
    assert (config["temp"], config["vision_heads"], config["k_test"]) == (0.07, 20, 256)
    assert (config["schedular"]["lr"], config["schedular"]["epochs"]) == (15.0, 6)
    write_config(config, tmp_path / "again.yaml")
    assert read_config(tmp_path / "again.yaml") == config


def _flips(found: list[str], expected: list[str]) -> int:
    """Places at which two rankings of one query differ; a flip of neighbours is two."""
    return sum(a != b for a, b in zip(found, expected, strict=True))


def test_the_files_are_the_originals(golden, run, tmp_path):
    compared = 0
    for letter in letters(golden):
        for case in sorted((golden / f"muge_{letter}").glob("cli_evaluate_*")):
            info = json.loads((case / "info.json").read_text(encoding="utf-8"))
            out = tmp_path / f"{letter}_{case.name}"
            out.mkdir()
            config = _golden_config(golden, letter, out, info)
            state = load_file(golden / f"model_{letter}.safetensors")
            if case.name.endswith("_bert_prefix"):
                state = {
                    k.replace("text_encoder.", "text_encoder.bert."): v for k, v in state.items()
                }
            torch.save({"model": state}, out / "checkpoint.pth")
            code, *_ = run(
                *(*info["argv"], "--config", config, "--checkpoint", out / "checkpoint.pth"),
                *("--text_encoder", golden / "tokenizer", "--output_dir", out, "--device", "cpu"),
            )
            assert code == 0
            _compare(case, out)
            compared += 1
    assert compared


def _golden_config(golden, letter, out, info):
    described = arch(golden, letter)
    (out / "bert.json").write_text(json.dumps(described["bert_config"]))
    place = golden / f"muge_{letter}"
    sizes = described["arch"]
    values = {
        f"{split}_{side}_file": str(place / f"MR_{split}_{end}")
        for split in ("train", "valid", "test")
        for side, end in (("query", "queries.jsonl"), ("image", "imgs.tsv"))
    }
    values |= {"bert_config": str(out / "bert.json"), "image_res": sizes["image_res"]}
    values |= {"vision_width": sizes["vit"], "vision_heads": sizes["vit_heads"]}
    values |= {"entity_dict_path": str(place / "entity_dict_small.txt")}
    (out / "c.yaml").write_text(yaml.safe_dump({**values, **info["config_overrides"]}))
    return out / "c.yaml"


def _compare(case, out):
    lines = [(path / "eval.log").read_text("utf-8").splitlines() for path in (out, case)]
    assert lines[0][0] == lines[1][0] == "evaluate start"
    found, expected = (json.loads(part[1]) for part in lines)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert abs(found[name] - value) <= 5, name
    assert sum(found[name] != value for name, value in expected.items()) <= 4
    for name in FILES:
        if not (case / name).exists():
            continue
        rows = [
            [json.loads(line) for line in (path / name).read_text("utf-8").splitlines()]
            for path in (out, case)
        ]
        assert [r["query_id"] for r in rows[0]] == [r["query_id"] for r in rows[1]]
        assert [r["query_text"] for r in rows[0]] == [r["query_text"] for r in rows[1]]
        flips = [_flips(a["item_ids"], b["item_ids"]) for a, b in zip(*rows, strict=True)]
        assert sum(flips) <= 2, (case, name, flips)
