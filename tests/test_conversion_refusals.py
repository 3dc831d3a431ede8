"""Checkpoints that ask for too much, or leave too much open, are refused by the converter."""

from __future__ import annotations

import zipfile

import pytest
import torch
from support.checkpoints import HEADS, original_state, refused, save
from support.models import VIT, tiny_model

from bagformer import BagFormerForRetrieval
from bagformer.models.conversion import convert_checkpoint, infer_config, select, to_original


@pytest.mark.parametrize("prefix", ["visual_encoder.blocks.", "text_encoder.encoder.layer."])
def test_a_stray_layer_number_makes_no_layers(tmp_path, prefix):
    # a billion layers would be made, on the meta device, before anything else could refuse them
    state = {**original_state(), prefix + "999999999.norm1.weight": torch.zeros(1)}
    path = save(tmp_path / "a.pth", state)
    refused(tmp_path, path, f"has {prefix}999999999, but no {prefix}", force=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("text_encoder.embeddings.word_embeddings.weight", torch.zeros(1).expand(1 << 40, 24)),
        ("visual_encoder.norm.weight", torch.zeros(32).to_sparse()),
        ("visual_encoder.norm.weight", torch.empty(32, device="meta")),
    ],
)
def test_tensors_without_bytes_of_their_own_are_refused(tmp_path, name, value):
    path = save(tmp_path / "a.pth", {**original_state(), name: value})
    refused(tmp_path, path, f"{name} is no plain tensor")


@pytest.mark.parametrize("shape", [(32, 3, 0, 0), (0, 3, 16, 16)])
def test_empty_tensors_are_refused(tmp_path, shape):
    name = "visual_encoder.patch_embed.proj.weight"
    path = save(tmp_path / "a.pth", {**original_state(), name: torch.zeros(shape)})
    refused(tmp_path, path, f"{name}: expected 4 dimensions, none of them 0")


def test_a_compressed_record_is_not_unfolded(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"(" * 1000 + b".")
        archive.writestr("archive/version", "3")
    refused(tmp_path, path, "record 'archive/data.pkl' is compressed")


def test_heads_are_never_guessed_for_widths_that_64_does_not_divide():
    tensors, _ = select(original_state())
    with pytest.raises(ValueError, match=r"vision_heads must be given: .* does not fit 32"):
        infer_config(tensors, text_heads=2)
    with pytest.raises(ValueError, match=r"text_heads must be given: .* does not fit 24"):
        infer_config(tensors, vision_heads=2)
    wide = tiny_model(vision_config={**VIT, "kwargs": {"embed_dim": 96, "depth": 1}})
    tensors = {to_original(name): value for name, value in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"vision_heads must be given: .* does not fit 96"):
        infer_config(tensors, text_heads=2)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", original_state(), config={"fusion_strategy": "no_fusion"})
    refused(tmp_path, path, "fusion_strategy='no_fusion'")
    path = save(tmp_path / "b.pth", original_state(), config={"image_res": 160_000})
    refused(tmp_path, path, "image_size=160000 is no multiple of the patch size 16 up to 4096")
    state = {**original_state(), "visual_encoder.pos_embed": torch.zeros(1, 1, 32)}
    refused(tmp_path, save(tmp_path / "c.pth", state), "pos_embed must be", image_size=64)


def test_the_current_folder_may_be_the_output(tmp_path, monkeypatch):
    checkpoint = save(tmp_path / "a.pth", original_state())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    convert_checkpoint(checkpoint, ".", **HEADS)
    assert BagFormerForRetrieval.from_pretrained(here).config.protocol == "original"
