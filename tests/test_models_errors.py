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
        ({"input_ids": torch.ones(0, 8).long()}, "input_ids must be .* at least one text"),
        ({"input_ids": torch.full((3, 8), 64)}, r"input_ids must lie within 0\.\.63, got 64\.\.64"),
        ({"input_ids": torch.full((3, 8), -1)}, r"input_ids must lie within 0\.\.63, got -1"),
        ({"input_ids": torch.ones(3, 41).long()}, "input_ids: 41 tokens, the model has 40"),
        # on another device an embedding reads memory that is not there
        ({"input_ids": torch.ones(3, 8, device="meta").long()}, "input_ids is on meta"),
        ({"bag_mask": torch.ones(3, 5, device="meta").bool()}, "bag_mask is on meta"),
        ({"pixel_values": torch.ones(3, 3, 64, 64, device="meta")}, "pixel_values is on meta"),
        # these shapes would be broadcast
        ({"attention_mask": torch.ones(3, 1)}, r"attention_mask must be \[3, 8\] as input_ids"),
        ({"attention_mask": torch.ones(1, 8)}, r"attention_mask must be \[3, 8\] as input_ids"),
        ({"pixel_values": torch.ones(3, 3, 64, 32)}, r"pixel_values must be \[B, 3, 64, 64\]"),
        ({"pixel_values": torch.zeros(3, 64, 64)}, r"pixel_values must be \[B, 3, H, W\]"),
        ({"itm_negatives": (EVERY, torch.tensor([0, 1, 3]))}, "text_idx must hold 3 rows"),
        ({"itm_negatives": (EVERY[:2], EVERY)}, "image_idx must hold 3 rows"),
        ({"positives": torch.zeros(3, 3, dtype=torch.bool)}, "no True in row 0"),
    ],
)
def test_bad_inputs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**make_inputs(), **changes}, return_loss=True)


@pytest.mark.parametrize(
    "name, value",
    [
        ("input_ids", [[1, 2]]),
        ("input_ids", torch.ones(3, 8)),
        ("bag_offsets", [[0, 1]]),
        ("pixel_values", [0.0]),
    ],
)
def test_bad_types_are_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be"):
        tiny_model()(**{**make_inputs(), name: value})


def test_positives_are_checked_where_there_is_no_bag_wise_loss():
    model = tiny_model(interaction="cls_token")
    none = torch.zeros(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no True in row 0"):
        model(**make_inputs(), positives=none, return_loss=True)


def test_losses_of_a_double_model_are_double():
    inputs = make_inputs()
    output = tiny_model().double()(**inputs, return_loss=True, itm_negatives=(EVERY, EVERY))
    assert output.loss_ita.dtype == output.loss_itm.dtype == torch.float64


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
        (
            {"fusion": "early", "interaction": "tokenwise"},
            "^early fusion encodes bags of embeddings, so there are bags to compare or nothing: "
            "fusion='early' needs interaction='bagwise', got 'tokenwise'$",
        ),
        (
            {"fusion": "early", "interaction": "cls_token"},
            "bags to compare or nothing: .* needs interaction='bagwise', got 'cls_token'$",
        ),
        ({"cls_temperature": 0.0}, "cls_temperature must be above 0"),
        ({"cls_temperature": float("nan")}, "cls_temperature must be above 0"),
        ({"masked_tokens": "[CLS]"}, "masked_tokens must be a list of tokens"),
        ({"use_itm_head": "no"}, "use_itm_head must be True or False, got 'no'"),
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
