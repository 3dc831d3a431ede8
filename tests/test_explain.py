"""Explanations: the numbers against the reference, the pictures against the numbers."""

from __future__ import annotations

import io
import re
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image
from support import world

from bagformer import reference
from bagformer.retrieval.encode import Stages, encode_images, encode_texts
from bagformer.retrieval.explain import explain_pair, shares
from bagformer.retrieval.heatmap import (
    OUTLINE,
    colour_table,
    colours,
    overlay_choice,
    overlay_heat,
    thumbnail,
)
from bagformer.retrieval.page import data_uri
from bagformer.retrieval.ranking import best_of

NAMES = ["[CLS]", "高领", "毛衣", "女"]
MASK = torch.tensor([False, True, True, True, False])


def _pair(seed=0, rows=3, columns=4):
    generator = torch.Generator().manual_seed(seed)
    text = torch.nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=-1)
    image = torch.randn(1 + rows * columns, 16, generator=generator)
    return text, torch.nn.functional.normalize(image, dim=-1)


@pytest.mark.parametrize("mask_mode", reference.MASK_MODES)
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_an_explanation_agrees_with_the_reference(mask_mode, reduction):
    text, image = _pair()
    ours = explain_pair(
        text, image, NAMES, (3, 4), text_mask=MASK, mask_mode=mask_mode, reduction=reduction
    )
    truth = reference.maxsim_pairs(
        text[None].double(),
        image[None].double(),
        text_mask=MASK[None],
        mask_mode=mask_mode,
        reduction=reduction,
        return_argmax=True,
    )
    assert ours.text_to_image == pytest.approx(float(truth.text_to_image[0]), abs=1e-5)
    assert ours.image_to_text == pytest.approx(float(truth.image_to_text[0]), abs=1e-5)
    assert [match.bag for match in ours.bags] == [1, 2, 3]
    assert [match.text for match in ours.bags] == NAMES[1:]
    for match in ours.bags:
        assert match.patch == int(truth.text_argmax[0, match.bag])
        heat = (text[match.bag].double() @ image[1:].double().T).reshape(3, 4)
        assert torch.allclose(match.heat.double(), heat, atol=1e-6)
        if match.cell is None:
            assert match.patch == 0
        else:
            assert match.patch == 1 + match.cell[0] * 4 + match.cell[1]
            assert match.heat[match.cell] == match.heat.max()
    if reduction == "sum":
        total = sum(match.similarity for match in ours.bags)
        assert total == pytest.approx(ours.text_to_image, abs=1e-5)
    assert ours.patch_bags.tolist() == truth.image_argmax[0, 1:].reshape(3, 4).tolist()
    assert ours.whole_bag == int(truth.image_argmax[0, 0])


def test_the_winner_may_be_the_whole_picture():
    text, image = _pair()
    image[0] = text[1]
    match = explain_pair(text, image, NAMES, (3, 4), text_mask=MASK).bags[0]
    assert (match.patch, match.cell) == (0, None)
    assert match.similarity == pytest.approx(1.0, abs=1e-5)


def test_shares_keep_signs_and_add_up_in_size():
    assert shares([3.0, -1.0]) == [75.0, -25.0]
    assert shares([0.0, 0.0]) == [0.0, 0.0]
    assert sum(shares([0.2, 0.5, 0.9])) == pytest.approx(100.0)


def test_shapes_that_do_not_fit_are_named():
    text, image = _pair()
    with pytest.raises(ValueError, match=r"image: expected \[1 \+ 3 \* 3, D\] for patch_grid"):
        explain_pair(text, image, NAMES, (3, 3), text_mask=MASK)
    with pytest.raises(ValueError, match=r"text: expected \[N, D\], got \[1, 5, 16\]"):
        explain_pair(text[None], image, NAMES, (3, 4))
    with pytest.raises(ValueError, match="bag 3 counts, but only 2 are named"):
        explain_pair(text, image, NAMES[:2], (3, 4), text_mask=MASK)


def test_the_scale_gets_lighter_all_the_way():
    lightness = colour_table().astype(float) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) >= -0.5).all()
    assert lightness[-1] - lightness[0] > 150


def test_colours_are_looked_up_between_the_ends():
    table = colour_table()
    heat = np.array([[-1.0, 0.0], [1.0, 9.0]])
    found = colours(heat, 0.0, 1.0)
    assert found[0].tolist() == [table[0].tolist()] * 2
    assert found[1].tolist() == [table[-1].tolist()] * 2
    assert len(set(map(tuple, colours(heat, 1.0, 1.0).reshape(4, 3).tolist()))) == 1
    with pytest.raises(ValueError, match="heat: NaN has no colour"):
        colours(np.array([[np.nan]]), 0.0, 1.0)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (5, 7), (16, 16)])
@pytest.mark.parametrize("size", [97, 192])
def test_every_cell_is_drawn_where_it_lies_and_the_winner_is_outlined(grid, size):
    heat = torch.arange(grid[0] * grid[1], dtype=torch.float32).reshape(grid)
    cell = (grid[0] - 1, 0)
    canvas = overlay_heat(
        Image.new("RGB", (10, 10), "white"), heat, cell, low=0.0, high=1e9, size=size, strength=1.0
    )
    drawn = np.asarray(canvas)
    assert drawn.shape == (size, size, 3)
    marked = np.argwhere((drawn == OUTLINE).all(axis=-1))
    top, left = marked.min(axis=0)
    bottom, right = marked.max(axis=0)
    assert top >= round(cell[0] * size / grid[0]) and bottom == size - 1
    assert left == 0 and right < round(size / grid[1])


def test_the_whole_picture_is_outlined_where_it_won():
    heat = torch.zeros(3, 3)
    drawn = np.asarray(
        overlay_heat(Image.new("RGB", (9, 9)), heat, None, low=0.0, high=1.0, size=90)
    )
    for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
        assert (edge == OUTLINE).all()


def test_patches_take_the_colour_of_the_bag_they_chose():
    palette = [(250, 0, 0), (0, 250, 0)]
    chosen = torch.tensor([[0, 1], [1, -1]])
    drawn = np.asarray(
        overlay_choice(Image.new("RGB", (4, 4)), chosen, palette, size=40, strength=1.0)
    )
    corners = [drawn[y, x].tolist() for y, x in ((0, 0), (0, 39), (39, 0), (39, 39))]
    assert corners == [[250, 0, 0], [0, 250, 0], [0, 250, 0], [128, 128, 128]]


@pytest.mark.parametrize("shape", [(10_000, 1), (1, 10_000), (1, 1), (300, 200)])
def test_a_thumbnail_of_any_shape_has_pixels(shape):
    small = thumbnail(Image.new("RGB", shape), 128)
    assert max(small.size) == 128 and min(small.size) >= 1
    assert data_uri(small).startswith("data:image/png")


def test_a_data_uri_holds_the_picture():
    for picture in (world.picture((9, 9, 200), 0), Image.effect_noise((200, 200), 90)):
        kind, payload = re.fullmatch(
            r"data:image/(png|jpeg);base64,(.+)", data_uri(picture)
        ).groups()
        again = Image.open(io.BytesIO(b64decode(payload)))
        assert again.size == picture.size
        assert again.format.lower() == kind


def test_the_best_of_a_row_break_ties_by_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert best_of(scores, 3).indices.tolist() == [[1, 2, 3]]
    assert best_of(scores, 9).scores.tolist() == [[3.0, 3.0, 2.0, 1.0]]
    with pytest.raises(ValueError, match="row 0 holds NaN"):
        best_of(scores / 0 * 0, 1)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        best_of(scores, 0)


def test_encoding_in_batches_equals_encoding_at_once(tmp_path):
    from bagformer import BagFormerForRetrieval, BagFormerProcessor

    folder = world.make_model(tmp_path)
    model = BagFormerForRetrieval.from_pretrained(folder).eval()
    processor = BagFormerProcessor.from_pretrained(folder)
    texts = ["红色毛衣", "", "高领的毛衣红色t恤", "背包"]
    stages, seen = Stages(), []
    once = encode_texts(model, processor, texts, stages=stages, with_names=True)
    parts = encode_texts(model, processor, texts, batch_size=1, progress=seen.append)
    assert seen == [1, 1, 1, 1]
    assert once.bags[:2] == [["红色", "毛衣"], []]
    assert torch.equal(once.mask.sum(dim=1), parts.mask.sum(dim=1))
    counted = parts.features.shape[1]
    assert torch.allclose(once.features[:, :counted], parts.features, atol=1e-5)
    pictures = [world.picture((200, 30, 30), 0), world.picture((30, 200, 30), 1)]
    whole = encode_images(model, processor, pictures, stages=stages)
    single = encode_images(model, processor, iter(pictures), batch_size=1)
    assert whole.patch_grid == single.patch_grid == (4, 4)
    assert torch.allclose(whole.features, single.features, atol=1e-5)
    assert set(stages) == {
        "tokenise",
        "segment",
        "encode_texts",
        "read_pictures",
        "encode_pictures",
    }
    with pytest.raises(ValueError, match="texts: none given"):
        encode_texts(model, processor, [])
    with pytest.raises(ValueError, match="pictures: none given"):
        encode_images(model, processor, [])
