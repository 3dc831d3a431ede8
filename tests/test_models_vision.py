"""Any timm backbone: what counts as patch 0, as a patch, and where the patches lie."""

from __future__ import annotations

import pytest
import timm
import torch
from support.models import make_inputs, tiny_config, tiny_model
from torch import nn

from bagformer import BagFormerForRetrieval
from bagformer.models.configuration_bagformer import BagFormerVisionConfig
from bagformer.models.vision import VisionEncoder, find_layout

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}
# backbone, size, arguments, kind, prefix, has CLS, grid
BACKBONES = [
    ("vit_base_patch16_224", 64, SMALL, "tokens", 1, True, (4, 4)),
    ("vit_small_patch14_reg4_dinov2", 56, SMALL, "tokens", 5, True, (4, 4)),
    ("vit_base_patch16_siglip_224", 64, SMALL, "tokens", 0, False, (4, 4)),
    ("deit_tiny_distilled_patch16_224", 64, {"depth": 1}, "tokens", 2, True, (4, 4)),
    ("eva02_tiny_patch14_224", 56, {"depth": 1}, "tokens", 1, True, (4, 4)),
    ("resnet10t", 64, {}, "nchw", 0, False, (2, 2)),
    ("mobilenetv3_small_050", 64, {}, "nchw", 0, False, (2, 2)),
    ("convnext_atto", 64, CONVNEXT, "nchw", 0, False, (2, 2)),
    (
        "swin_tiny_patch4_window7_224",
        64,
        {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        "nhwc",
        0,
        False,
        (8, 8),
    ),
]


def encoder_of(name, size, options) -> VisionEncoder:
    torch.manual_seed(0)
    config = BagFormerVisionConfig(backbone=name, image_size=size, kwargs=options)
    return VisionEncoder(config).eval()


@pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case[0])
def test_tokens_of_every_kind_of_backbone(case):
    name, size, options, kind, prefix, has_cls, grid = case
    encoder = encoder_of(name, size, options)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens, found = encoder(pixels)
        raw = encoder.backbone.forward_features(pixels)
    assert encoder.layout[:4] == (kind, prefix, has_cls, grid) and found == grid
    assert tokens.shape == (2, 1 + grid[0] * grid[1], encoder.width)
    if kind == "nchw":
        patches = raw.flatten(2).transpose(1, 2)
    elif kind == "nhwc":
        patches = raw.flatten(1, 2)
    else:
        patches = raw[:, prefix:]
    assert torch.equal(tokens[:, 1:], patches)
    first = raw[:, 0] if has_cls else patches.mean(dim=1)
    torch.testing.assert_close(tokens[:, 0], first)


@pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case[0])
def test_whole_model_on_every_backbone(case, tmp_path):
    name, size, options = case[:3]
    model = tiny_model(vision_config={"backbone": name, "image_size": size, "kwargs": options})
    inputs = make_inputs(size=size)
    model.train()
    model(**inputs, return_loss=True).loss.backward()
    assert [n for n, value in model.named_parameters() if value.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        # not to the bit: a convolution may sum in another order where memory is aligned otherwise
        torch.testing.assert_close(model(**inputs).image_to_text, loaded(**inputs).image_to_text)


def test_buffers_that_no_file_holds_are_restored(tmp_path):
    name, size, options = "eva02_tiny_patch14_224", 56, {"depth": 1}
    model = tiny_model(vision_config={"backbone": name, "image_size": size, "kwargs": options})
    saved = model.vision_model.backbone.state_dict()
    unsaved = [n for n, _ in model.vision_model.backbone.named_buffers() if n not in saved]
    assert unsaved, "a backbone with such buffers is needed here"
    model.save_pretrained(tmp_path)
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path)
    ours = dict(model.vision_model.backbone.named_buffers())
    for buffer, value in loaded.vision_model.backbone.named_buffers():
        assert torch.equal(value, ours[buffer]), buffer


def test_missing_picture_weights_get_timms_initial_values(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    removed = "vision_model.backbone.blocks.1.norm1.weight"
    del tensors[removed], tensors["itm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = BagFormerForRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {removed, "itm_head.weight"}
    assert torch.equal(loaded.vision_model.backbone.blocks[1].norm1.weight, torch.ones(32))
    bound = 1 / model.itm_head.in_features**0.5
    assert 0 < loaded.itm_head.weight.abs().max() <= bound
    assert torch.equal(loaded.itm_head.bias, model.itm_head.bias)


def test_the_originals_encoder():
    encoder = encoder_of("vit_base_patch16_224", 256, {"depth": 1})
    assert encoder.width == 768 and encoder.layout.grid == (16, 16)
    block = encoder.backbone.blocks[0]
    assert block.attn.num_heads == 12 and block.norm1.eps == 1e-6
    assert encoder.backbone.pos_embed.shape == (1, 257, 768)
    assert isinstance(encoder.backbone.head, nn.Identity)


def test_map_backbones_take_other_sizes():
    encoder = encoder_of("resnet10t", 64, {})
    tokens, grid = encoder(torch.randn(1, 3, 96, 64))
    assert grid == (3, 2) and tokens.shape[1] == 7


def test_dynamic_vits_say_their_grid():
    encoder = encoder_of("vit_base_patch16_224", 64, {**SMALL, "dynamic_img_size": True})
    tokens, grid = encoder(torch.randn(1, 3, 96, 64))
    assert grid == (6, 4) and tokens.shape[1] == 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vit_of_nowhere"}, "timm has no model named 'vit_of_nowhere'"),
        ({"kwargs": {"embed_size": 3}}, "timm cannot make 'vit_base_patch16_224'"),
        ({"backbone": "swin_tiny_patch4_window7_224", "image_size": 3}, "vision_config"),
    ],
)
def test_bad_backbones_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder(BagFormerVisionConfig(**changes))


def test_outputs_that_are_no_patches_are_refused():
    model = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="must give"):
        find_layout(model, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="does not say how they are laid out"):
        find_layout(nn.Linear(1, 1), torch.zeros(2, 11, 8))


def test_no_weights_are_drawn_on_the_meta_device():
    with torch.device("meta"):
        model = BagFormerForRetrieval(tiny_config())
    assert all(value.is_meta for value in model.parameters())
