"""The tiny model that ships: its size, that it loads, how well it finds pictures of the sample."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from bagformer import BagFormerForRetrieval, BagFormerProcessor, maxsim
from bagformer.assets import sample_path, tiny_model_path, vocabulary_path
from bagformer.data.muge import MugeImages, read_queries
from bagformer.retrieval.metrics import first_relevant_ranks, recall_at

# What examples/train_tiny.py measured on the model that it saved, in percent of the queries.
MEASURED = json.loads((tiny_model_path() / "metrics.json").read_text(encoding="utf-8"))
KINDS = {"sample": "queries.jsonl", "sample_unseen": "unseen_queries.jsonl"}
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
    queries = {kind: read_queries(sample_path() / name) for kind, name in KINDS.items()}
    return list(images), [images[item] for item in images], queries


@pytest.fixture(scope="module")
def texts(model, processor, sample):
    with torch.no_grad():
        return {
            kind: model.get_text_features(**processor(text=[query.text for query in queries]))
            for kind, queries in sample[2].items()
        }


@pytest.fixture(scope="module")
def pictures(model, processor, sample):
    pictures = sample[1]
    with torch.no_grad():
        parts = [
            model.get_image_features(**processor(images=pictures[start : start + 100]))
            for start in range(0, len(pictures), 100)
        ]
    return torch.cat([part.image_features for part in parts]), parts[0].patch_grid


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
    # transformers strips the two lines that hold a line separator, which is never part of a word
    assert processor.tokenizer.get_vocab() == {word.strip(): n for n, word in enumerate(words)}
    upper, lower = processor(text="T恤"), processor(text="t恤")
    assert upper["input_ids"].equal(lower["input_ids"])
    assert processor.tokenizer.unk_token_id not in upper["input_ids"]


def test_features_are_unit_vectors_and_heatmaps_have_a_grid(texts, pictures):
    text, (image, grid) = texts["sample"], pictures
    assert image.shape[1] == 1 + grid[0] * grid[1] and grid[0] * grid[1] >= 16
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(image.shape[:2]))
    counted = text.text_features[text.text_mask]
    torch.testing.assert_close(counted.norm(dim=-1), torch.ones(len(counted)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_sample_as_well_as_when_it_was_trained(texts, pictures, sample, kind):
    items, queries = sample[0], sample[2][kind]
    text, image = texts[kind], pictures[0]
    scores = maxsim(
        text.text_features,
        image,
        text_mask=text.text_mask,
        directions="text_to_image",
        reduction="mean",
    ).text_to_image
    place = {item: column for column, item in enumerate(items)}
    relevant = [[place[item] for item in query.item_ids] for query in queries]
    recall = recall_at(first_relevant_ranks(scores, relevant))
    assert MEASURED[kind]["pictures"] == len(items) and MEASURED[kind]["queries"] == len(queries)
    for k in (1, 5, 10):
        assert abs(recall[f"R@{k}"] - MEASURED[kind][f"R@{k}"]) <= SLACK


def test_it_reaches_what_the_project_promises():
    for kind in KINDS:
        assert MEASURED[kind]["R@1"] >= 60 and MEASURED[kind]["R@10"] >= 90


def test_many_queries_have_several_bags(processor, sample):
    queries = [query for rows in sample[2].values() for query in rows]
    bags = processor.bag_texts([query.text for query in queries])
    several = sum(len(row) > 1 for row in bags) / len(bags)
    assert several > 0.5
    for query, row in zip(queries, bags, strict=True):
        assert "".join(row) == query.text.replace(" ", "")
