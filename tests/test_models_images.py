"""Pictures of every kind to pixel values."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bagformer.data.images import to_rgb
from bagformer.models.image_processing_bagformer import BagFormerImageProcessor


def test_pixels_are_bicubic_and_normalised_as_in_clip():
    image = Image.effect_noise((31, 17), 90).convert("RGB")
    pixels = BagFormerImageProcessor(24)(image)["pixel_values"][0]
    resized = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(pixels.permute(1, 2, 0), (resized - mean) / std, atol=1e-5)


def test_pictures_of_every_mode():
    level = {"1": 255, "L": 100, "P": 100, "I": 100, "F": 100.0, "I;16": 100 * 257}
    modes = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
    for mode in (*modes, "LAB", "I", "I;16", "I;16B", "F"):
        image = Image.new(mode, (6, 4), level.get(mode, 0))
        assert to_rgb(image).mode == "RGB" and to_rgb(image).size == (6, 4)
        if mode != "La":  # Pillow alone makes nothing of it
            dropped = to_rgb(image, "drop")
            assert dropped.tobytes() == image.convert("RGB").tobytes(), mode
    deep = Image.new("I;16", (2, 2), 100 * 257)
    assert to_rgb(deep).getpixel((0, 0)) == (100, 100, 100)
    assert to_rgb(Image.new("I", (2, 2), 65535)).getpixel((0, 0)) == (255, 255, 255)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(clear, "drop").getpixel((0, 0)) == (10, 20, 30)
    with pytest.raises(ValueError, match="transparency must be one of white, drop, got 'black'"):
        to_rgb(clear, "black")


def test_arrays_and_tensors_are_pictures_too():
    one = BagFormerImageProcessor(8)
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    wanted = one(Image.fromarray(array))["pixel_values"]
    assert torch.equal(one(array)["pixel_values"], wanted)
    assert torch.equal(one(torch.from_numpy(array).permute(2, 0, 1))["pixel_values"], wanted)
    grey = array[:, :, 0]
    assert torch.equal(one(grey.astype(np.uint16) * 257)["pixel_values"], one(grey)["pixel_values"])
    assert torch.equal(one(grey[:, :, None])["pixel_values"], one(grey)["pixel_values"])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("photo.jpg", TypeError, r"images\[0\] must be a PIL image, an array or a tensor, got str"),
        (np.zeros((4, 4, 3)), ValueError, "an array must be uint8"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "has no pixels"),
        (torch.zeros(3, 4, 4), ValueError, "a tensor must be uint8"),
        ([], ValueError, "images is empty"),
    ],
)
def test_what_is_no_picture_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        BagFormerImageProcessor(8)(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be"),
        ({"size": {"shortest_edge": 3}}, "size must be"),
        ({"image_std": (1, 1, 0)}, "image_std"),
        ({"resample": "cubic"}, "resample must be one of"),
        ({"transparency": "black"}, "transparency must be one of white, drop"),
    ],
)
def test_bad_image_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BagFormerImageProcessor(**options)
    with pytest.raises(TypeError, match="unknown arguments: do_resize"):
        BagFormerImageProcessor(8).preprocess(Image.new("L", (2, 2)), do_resize=False)


def test_pictures_match_the_original(golden):
    arrays = np.load(golden / "resize.npz")
    cases = json.loads((golden / "resize.json").read_text(encoding="utf-8"))
    for index, case in enumerate(cases):
        raw = base64.urlsafe_b64decode(case["png_urlsafe_base64"])
        image = Image.open(io.BytesIO(raw))
        processor = BagFormerImageProcessor(case["image_res"], transparency="drop")
        pixels = processor(image)["pixel_values"][0]
        corner = torch.from_numpy(arrays[f"case{index}/normalized_corner"])
        # 8 levels of 255 between versions of Pillow, divided by the smallest deviation
        assert (pixels[:, :8, :8] - corner).abs().max() < 8 / 255 / 0.26
