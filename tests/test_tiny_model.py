"""The tiny model that ships: its size, that it loads, how well it finds pictures of the sample."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from bagformer import BagFormerForRetrieval, BagFormerProcessor, maxsim
from bagformer.assets import sample_path, tiny_model_path, vocabulary_path
from bagformer.data.muge import MugeImages, read_queries

# Measured when the model was trained (examples/train_tiny.log.jsonl), in per cent of the queries.
MEASURED = {1: 0.0, 10: 0.0}
SLACK = 1.0


@pytest.fixture(scope="module")
def model():
    return BagFormerForRetrieval.from_pretrained(tiny_model_path()).eval()


@pytest.fixture(scope="module")
def processor():
    return BagFormerProcessor.from_pretrained(tiny_model_path())


@pytest.fixture(scope="module")
def sample():
    images = MugeImages(sample_path() / "imgs.tsv")
    return (
        list(images),
        [images[item] for item in images],
        read_queries(sample_path() / "queries.jsonl"),
    )


@pytest.fixture(scope="module")
def features(model, processor, sample):
    _, pictures, queries = sample
    with torch.no_grad():
        text = model.get_text_features(**processor(text=[query.text for query in queries]))
        parts = [
            model.get_image_features(**processor(images=pictures[start : start + 100]))
            for start in range(0, len(pictures), 100)
        ]
    return text, torch.cat([part.image_features for part in parts]), parts[0].patch_grid


def test_the_file_is_small_and_holds_half_precision_matrices():
    path = tiny_model_path() / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in tensors.values() if t.dim() > 1} == {torch.float16}
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_it_computes_in_float32(model):
    floating = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float32}
    assert json.loads((tiny_model_path() / "config.json").read_text())["dtype"] == "float32"


def test_its_tokenizer_is_the_shipped_vocabulary_and_lower_cases(processor):
    words = vocabulary_path().read_text("utf-8").removesuffix("\n").split("\n")
    assert len(words) == 21128
    assert processor.tokenizer.get_vocab() == {word: n for n, word in enumerate(words)}
    upper, lower = processor(text="T恤"), processor(text="t恤")
    assert upper["input_ids"].equal(lower["input_ids"])
    assert processor.tokenizer.unk_token_id not in upper["input_ids"]


def test_features_are_unit_vectors_and_heatmaps_have_a_grid(features):
    text, image, grid = features
    assert image.shape[1] == 1 + grid[0] * grid[1] and grid[0] * grid[1] >= 16
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(image.shape[:2]))
    counted = text.text_features[text.text_mask]
    torch.testing.assert_close(counted.norm(dim=-1), torch.ones(len(counted)))


def test_it_finds_the_sample_as_well_as_when_it_was_trained(features, sample):
    items, _, queries = sample
    text, image, _ = features
    scores = maxsim(
        text.text_features,
        image,
        text_mask=text.text_mask,
        directions="text_to_image",
        reduction="mean",
    ).text_to_image
    place = {item: column for column, item in enumerate(items)}
    ranks = []
    for row, query in zip(scores, queries, strict=True):
        own = row[[place[item] for item in query.item_ids]]
        # a picture that scores the same as the best relevant one counts against it
        ranks.append(int((row >= own.max()).sum()) - int((own == own.max()).sum()))
    for k, measured in MEASURED.items():
        recall = 100 * sum(rank < k for rank in ranks) / len(ranks)
        assert recall >= measured - SLACK, f"R@{k} is {recall:.1f}, was {measured}"


def test_many_queries_have_several_bags(processor, sample):
    bags = processor.bag_texts([query.text for query in sample[2]])
    several = sum(len(row) > 1 for row in bags) / len(bags)
    assert several > 0.5
    for query, row in zip(sample[2], bags, strict=True):
        assert "".join(row) == query.text
