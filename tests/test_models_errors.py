"""What the models refuse, and in which words."""

from __future__ import annotations

import pytest
import torch
from support.models import make_inputs, tiny_config, tiny_model

EVERY = torch.tensor([1, 2, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bag_mask": None}, "needs bag_offsets"),
        (
            {"bag_offsets": torch.zeros(3, 1, dtype=torch.int32)},
            r"bag_offsets must be \[3, N \+ 1\]",
        ),
        ({"bag_mask": torch.ones(3, 4, dtype=torch.bool)}, r"bag_mask must be \[3, 5\]"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"input_ids must be \[B, T\]"),
        ({"pixel_values": torch.zeros(3, 64, 64)}, r"pixel_values must be \[B, 3, H, W\]"),
        ({"itm_negatives": (EVERY, torch.tensor([0, 1, 3]))}, "text_idx must hold 3 rows"),
        ({"itm_negatives": (EVERY[:2], EVERY)}, "image_idx must hold 3 rows"),
        ({"positives": torch.zeros(3, 3, dtype=torch.bool)}, "no True in row 0"),
    ],
)
def test_bad_inputs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**make_inputs(), **changes}, return_loss=True)


def test_integer_pixels_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        tiny_model()(pixel_values=torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "middle"}, "fusion must be one of late, early"),
        ({"interaction": "wordwise"}, "interaction must be one of"),
        ({"protocol": "new"}, "protocol must be one of"),
        ({"matcher": "longest"}, "matcher must be one of"),
        ({"mask_mode": "drop"}, "mask_mode must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"embed_dim": 0}, "embed_dim must be a positive int"),
        ({"fusion_layer": 4}, "leaves no layer for the matching head"),
        ({"max_text_length": 41}, "exceeds text_config.max_position_embeddings=40"),
        ({"fusion": "early", "interaction": "tokenwise"}, "needs interaction='bagwise'"),
        ({"cls_temperature": 0.0}, "cls_temperature must be above 0"),
        ({"vision_config": {"image_size": 0}}, "vision_config.image_size"),
        ({"vision_config": {"backbone": ""}}, "vision_config.backbone"),
    ],
)
def test_bad_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
    with pytest.raises(TypeError, match="text_config must be a dict or BertConfig"):
        tiny_config(text_config=3)


def test_misspelt_arguments_are_refused():
    with pytest.raises(ValueError, match="'interactions', did you mean 'interaction'"):
        tiny_config(interactions="tokenwise")
    with pytest.raises(ValueError, match="'imagesize', did you mean 'image_size'"):
        tiny_config(vision_config={"imagesize": 64})
    assert tiny_config(note="kept, as transformers does").note


def test_a_text_encoder_call_must_make_sense():
    model = tiny_model().text_model
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="mode must be one of"):
        model(ids, mode="image")
    with pytest.raises(ValueError, match="exactly one of"):
        model(mode="text")
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        model(ids)
