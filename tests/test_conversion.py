"""Checkpoints of the original code become folders that ``from_pretrained`` reads, or errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import HEADS, original_state, refused, save
from support.models import BERT, make_inputs, tiny_model, write_dictionary, write_tokenizer
from support.original import arch, letters

from bagformer import BagFormerForRetrieval, BagFormerProcessor
from bagformer.models import conversion
from bagformer.models.checkpoints import read_original
from bagformer.models.conversion import (
    check_tensors,
    convert_checkpoint,
    infer_config,
    resize_pos_embed,
    select,
)


def test_a_converted_model_computes_the_same(tmp_path):
    model = tiny_model(protocol="original")
    report = convert_checkpoint(
        save(tmp_path / "a.pth", original_state()),
        tmp_path / "out",
        tokenizer=write_tokenizer(tmp_path / "tokenizer"),
        dictionary=write_dictionary(tmp_path / "dictionary.txt"),
        **HEADS,
    )
    assert report.unexpected == [] and report.pos_embed is None
    assert {"config.json", "model.safetensors", "bags.bin"} <= set(report.files)
    assert sorted(report.files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.protocol == "original" and loaded.config.matcher == "original"
    inputs = make_inputs()
    torch.testing.assert_close(loaded(**inputs).image_to_text, model(**inputs).image_to_text)
    processor = BagFormerProcessor.from_pretrained(tmp_path / "out")
    assert processor.segmenter.matcher == "original" and not processor.sep_token
    assert processor.image_processor.size == {"height": 64, "width": 64}
    assert loaded(**processor(text=["红色手机壳"])).text_features.shape[0] == 1
    mode = (tmp_path / "out").stat().st_mode & 0o777
    assert mode == 0o755


def test_what_is_dropped_is_named(tmp_path):
    report = convert_checkpoint(
        save(tmp_path / "a.pth", original_state()), tmp_path / "out", **HEADS
    )
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert len(kept) + len(report.dropped) == len(original_state())
    assert {"temp", "image_queue", "queue_ptr"} - set(report.dropped) == {"temp"}
    assert "text_encoder_m.embeddings.position_ids" in report.dropped
    assert not any("_m." in name for name in kept)


@pytest.mark.parametrize("form", ["bare", "module", "bert", "safetensors", "legacy"])
def test_forms_of_a_checkpoint(tmp_path, form):
    state = original_state()
    path = tmp_path / "a.pth"
    if form == "bare":
        torch.save(state, path)
    elif form == "module":
        save(path, {f"module.{name}": value for name, value in state.items()})
    elif form == "bert":
        renamed = {
            name.replace("text_encoder.", "text_encoder.bert.").replace(
                "text_encoder_m.", "text_encoder_m.bert."
            ): value
            for name, value in state.items()
        }
        renamed["text_encoder.cls.predictions.bias"] = torch.zeros(3)
        save(path, renamed)
    elif form == "safetensors":
        path = tmp_path / "a.safetensors"
        del state["text_queue"]  # shares memory with the other queue
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    convert_checkpoint(path, tmp_path / "out", **HEADS)
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path / "out").state_dict()
    wanted = tiny_model(protocol="original").state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


def test_sizes_come_from_the_tensors_and_heads_from_the_settings(tmp_path):
    bert = {
        **BERT,
        "num_attention_heads": 3,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.25,
        "architectures": ["BertForMaskedLM"],
        "encoder_width": 32,
    }
    (tmp_path / "bert.json").write_text(json.dumps(bert), encoding="utf-8")
    tensors, _ = select(original_state())
    config = infer_config(tensors, bert_config=tmp_path / "bert.json", vision_heads=4)
    assert config.text_config.num_attention_heads == 3
    assert config.text_config.hidden_dropout_prob == 0.25
    assert config.text_config.num_hidden_layers == 4 and config.fusion_layer == 2
    vision = config.vision_config
    assert vision.image_size == 64 and vision.backbone_kwargs["num_heads"] == 4
    assert vision.backbone_kwargs["depth"] == 2 and vision.backbone_kwargs["patch_size"] == 16
    assert config.embed_dim == 16 and config.use_itm_head
    with pytest.raises(ValueError, match="hidden_size is 99, the checkpoint has 24"):
        infer_config(tensors, bert_config={"hidden_size": 99}, **HEADS)
    with pytest.raises(ValueError, match="vision_heads must be given"):
        infer_config(tensors, text_heads=2)
    with pytest.raises(ValueError, match="text_heads must be given"):
        infer_config(tensors, vision_heads=2)
    (tmp_path / "bert.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        infer_config(tensors, bert_config=tmp_path / "bert.json")


def test_odd_widths_of_the_feed_forward_layer_are_met():
    for width, hidden in ((49, 50), (48, 100), (107, 311)):
        tensors, _ = select(original_state())
        tensors["visual_encoder.blocks.0.mlp.fc1.weight"] = torch.zeros(hidden, width)
        tensors["visual_encoder.patch_embed.proj.weight"] = torch.zeros(width, 3, 16, 16)
        config = infer_config(tensors, vision_heads=1, text_heads=2)
        ratio = config.vision_config.backbone_kwargs["mlp_ratio"]
        assert int(width * ratio) == hidden


def test_settings_in_the_checkpoint_are_used(tmp_path):
    settings = {"fusion_strategy": "early_fusion", "image_res": 96}
    path = save(tmp_path / "a.pth", original_state(), config=settings)
    report = convert_checkpoint(path, tmp_path / "out", **HEADS)
    assert report.config.fusion == "early" and report.config.vision_config.image_size == 96
    assert report.pos_embed == (4, 6)
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path / "out")
    assert loaded.vision_model.backbone.pos_embed.shape == (1, 37, 32)
    report = convert_checkpoint(path, tmp_path / "two", image_size=64, fusion="late", **HEADS)
    assert report.config.fusion == "late" and report.pos_embed is None


def test_position_embedding_is_resized():
    pos_embed = torch.randn(1, 17, 8)
    assert resize_pos_embed(pos_embed, 4) is pos_embed
    grown = resize_pos_embed(pos_embed, 6)
    assert grown.shape == (1, 37, 8) and torch.equal(grown[:, 0], pos_embed[:, 0])
    level = torch.ones(1, 10, 2)
    torch.testing.assert_close(resize_pos_embed(level, 5), torch.ones(1, 26, 2))
    with pytest.raises(ValueError, match="pos_embed must be"):
        resize_pos_embed(torch.zeros(1, 18, 8), 6)
    tensors, _ = select(original_state())
    with pytest.raises(ValueError, match="image_size=60 is no multiple of the patch size 16"):
        infer_config(tensors, image_size=60, **HEADS)


def test_unknown_tensors_are_an_error_unless_forced(tmp_path):
    state = original_state()
    state["decoder.weight"] = state["text_encoder.encoder.layer.0.extra"] = torch.zeros(2)
    path = save(tmp_path / "a.pth", state)
    refused(tmp_path, path, r"(?s)does not know these tensors.*decoder\.weight.*layer\.0\.extra")
    report = convert_checkpoint(path, tmp_path / "out", force=True, **HEADS)
    assert report.unexpected == ["decoder.weight", "text_encoder.encoder.layer.0.extra"]


def test_missing_tensors_and_wrong_shapes_are_all_named(tmp_path):
    state = original_state()
    del state["text_encoder.encoder.layer.2.crossattention.self.key.weight"]
    state["visual_encoder.norm.bias"] = torch.zeros(5)
    refused(
        tmp_path,
        save(tmp_path / "a.pth", state),
        r"(?s)missing: text_encoder\.encoder\.layer\.2\.crossattention\.self\.key\.weight"
        r".*wrong shape: visual_encoder\.norm\.bias is \[5\], expected \[32\]",
        force=True,
    )
    state["temp"] = torch.tensor(1)
    refused(tmp_path, save(tmp_path / "a.pth", state), r"wrong type: temp is torch\.int64")
    del state["text_proj.weight"]
    refused(tmp_path, save(tmp_path / "a.pth", state), r"it has no text_proj\.weight")


def test_a_model_without_matching_head(tmp_path):
    state = {name: value for name, value in original_state().items() if "itm_head" not in name}
    refused(tmp_path, save(tmp_path / "a.pth", state), r"layer\.2\.")
    state = {
        name: value
        for name, value in state.items()
        if ".layer.2." not in name and ".layer.3." not in name
    }
    report = convert_checkpoint(save(tmp_path / "a.pth", state), tmp_path / "out", **HEADS)
    assert not report.config.use_itm_head and report.config.fusion_layer == 2


def test_two_tensors_of_one_meaning(tmp_path):
    state = original_state()
    state["module.temp"] = state["temp"]
    refused(tmp_path, save(tmp_path / "a.pth", state), "two tensors of the checkpoint mean temp")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, zipped):
    trace = tmp_path / "trace"
    bomb = {"model": {**original_state(), "bomb": Bomb(f"touch {trace}")}}
    path = tmp_path / "bomb.pth"
    torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, path, r"refused, and nothing in it was run: it asks for (posix|nt)\.system")
    assert not trace.exists()
    # it is a real one
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_files_that_are_no_checkpoints(tmp_path):
    good = save(tmp_path / "good.pth", original_state()).read_bytes()
    for name, content in {
        "half.pth": good[: len(good) // 2],
        "short.pth": good[:-1],
        "text.pth": b"not a checkpoint at all\n" * 50,
        "empty.pth": b"",
        "zip.pth": b"PK\x05\x06" + bytes(18),
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path, tmp_path / name, rf"{name} is not a (readable )?checkpoint")
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    refused(tmp_path, tmp_path / "a.safetensors", "is not a readable safetensors file")
    refused(tmp_path, tmp_path / "nowhere.pth", "no such file", FileNotFoundError)
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path, tmp_path / "list.pth", "holds list, expected a state dict")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pth")
    refused(tmp_path, tmp_path / "numbers.pth", "expected a state dict")
    save(tmp_path / "other.pth", {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(1)})
    refused(
        tmp_path, tmp_path / "other.pth", r"not a BagFormer checkpoint.*conv1\.weight, fc\.bias"
    )


def test_the_output_folder_is_whole_or_absent(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pth", original_state())

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "save_file", fail)
        refused(tmp_path, path, "disk full", OSError)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        convert_checkpoint(path, taken, **HEADS)
    (tmp_path / "out").mkdir()
    convert_checkpoint(path, tmp_path / "out", **HEADS)
    assert (tmp_path / "out" / "config.json").exists()


def test_tokenizer_and_dictionary_must_fit(tmp_path):
    path = save(tmp_path / "a.pth", original_state())
    dictionary = write_dictionary(tmp_path / "dictionary.txt")
    refused(tmp_path, path, "a dictionary needs the tokenizer too", dictionary=dictionary)
    folder = write_tokenizer(tmp_path / "tokenizer")
    convert_checkpoint(path, tmp_path / "one", tokenizer=folder / "vocab.txt", **HEADS)
    assert BagFormerProcessor.from_pretrained(tmp_path / "one").tokenizer.do_lower_case
    (folder / "tokenizer_config.json").unlink()
    for case in (None, False, True):
        out = tmp_path / f"case-{case}"
        convert_checkpoint(path, out, tokenizer=folder, do_lower_case=case, **HEADS)
        loaded = BagFormerProcessor.from_pretrained(out)
        assert bool(loaded.tokenizer.do_lower_case) == bool(case)
    with open(folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("more\n")
    refused(tmp_path, path, "tokenizer: 65 entries, the checkpoint has 64", tokenizer=folder)


RUAMEL = """
import sys, types, torch
for module in ("ruamel", "ruamel.yaml", "ruamel.yaml.scalarint", "ruamel.yaml.scalarfloat",
               "ruamel.yaml.scalarstring"):
    sys.modules[module] = types.ModuleType(module)
def scalar(module, name, base):
    made = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made
number = scalar("ruamel.yaml.scalarint", "ScalarInt", int)(64)
number._width = 3
share = scalar("ruamel.yaml.scalarfloat", "ScalarFloat", float)(0.5)
share._prec = 1
text = scalar("ruamel.yaml.scalarstring", "DoubleQuotedScalarString", str)("early_fusion")
text.comment = None
settings = {"image_res": number, "temp": share, "fusion_strategy": text}
torch.save({"model": {"a": torch.zeros(2)}, "config": settings}, sys.argv[1])
"""


def test_settings_with_ruamels_numbers_are_read_without_ruamel(tmp_path):
    path = tmp_path / "a.pth"
    subprocess.run([sys.executable, "-c", RUAMEL, str(path)], check=True)
    found = read_original(path).settings
    assert found == {"image_res": 64, "temp": 0.5, "fusion_strategy": "early_fusion"}
    assert not any(name.partition(".")[0] == "ruamel" for name in sys.modules)


def test_the_full_size_checkpoint_is_accounted_for(golden):
    """Every one of the 831 tensors of the published size is used or dropped on purpose."""
    listed = json.loads((golden / "state_dict_fullsize.json").read_text(encoding="utf-8"))
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for name, (shape, dtype) in listed.items()
    }
    kept, dropped = select(tensors)
    config = infer_config(kept)
    assert check_tensors(config, kept) == []
    assert len(kept) + len(dropped) == len(listed)
    assert sum(value.numel() for value in kept.values()) == 202_100_483
    assert config.text_config.num_attention_heads == 12 and config.fusion_layer == 6
    assert config.vision_config.backbone_kwargs["num_heads"] == 12
    assert config.vision_config.image_size == 256 and config.embed_dim == 256


def test_position_embedding_matches_the_original(golden):
    arrays = np.load(golden / "train.npz")
    pairs = [key.split("|")[0] for key in arrays.files if key.endswith("|in")]
    pairs = [name for name in pairs if name.startswith("pos_embed_")]
    assert pairs
    for name in pairs:
        grid = int(name.rpartition("to")[2])
        got = resize_pos_embed(torch.from_numpy(arrays[f"{name}|in"]), grid)
        torch.testing.assert_close(got, torch.from_numpy(arrays[f"{name}|out"]))


def test_recorded_models_convert(golden, tmp_path):
    for letter in letters(golden):
        info = arch(golden, letter)
        report = convert_checkpoint(
            golden / f"model_{letter}.safetensors",
            tmp_path / letter,
            bert_config=info["bert_config"],
            vision_heads=info["arch"]["vit_heads"],
            tokenizer=golden / "tokenizer",
        )
        assert report.unexpected == []
        config = BagFormerForRetrieval.from_pretrained(tmp_path / letter).config
        assert config.vision_config.image_size == info["arch"]["image_res"]
        assert config.fusion_layer == info["arch"]["fusion_layer"]
        assert not BagFormerProcessor.from_pretrained(tmp_path / letter).tokenizer.do_lower_case
