"""The input pipeline: order, augmentation, workers, and which pairs are negatives."""

from __future__ import annotations

import pickle
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from support import training, world

from bagformer.data.muge import (
    MugeDataset,
    MugeError,
    MugeImages,
    read_queries,
    write_jsonl,
    write_tsv,
)
from bagformer.models.processing_bagformer import BagFormerProcessor
from bagformer.training import data
from bagformer.training.config import AugmentConfig, ConfigError, RandAugmentConfig
from bagformer.training.config_file import from_tree


@pytest.fixture(scope="module")
def processor(place):
    return BagFormerProcessor.from_pretrained(str(place.model))


def configure(place, **changes):
    return from_tree(training.tiny_tree(place, place.root / "out", **changes), {})


def loader(config, processor, start=0, rank=0, size=1):
    pairs = data.open_split(config, config.data.train, "train")
    transform = data.make_transform(config.augment, processor.image_processor)
    kept = data.TrainPairs(pairs, data.Relations(pairs), transform, config.seed)
    batches = data.Batches(config, len(pairs), rank, size, start)
    return data.make_loader(config, kept, batches, processor, pin=False)


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in left["inputs"].items():
        assert torch.equal(value, right["inputs"][name]), name
    assert (left["ids"], left["replaced"]) == (right["ids"], right["replaced"])


AUGMENT = {"flip": 0.5, "rand_augment": {"ops": 2, "magnitude": 9, "probability": 0.7}}


def test_workers_change_nothing(place, processor):
    alone = configure(place, steps=6, augment=AUGMENT)
    many = configure(place, steps=6, augment=AUGMENT, workers=2, start_method="fork")
    expected = list(loader(alone, processor))
    found = list(loader(many, processor, start=2))
    assert len(expected) == 6 and len(found) == 4
    for left, right in zip(expected[2:], found, strict=True):
        same(left, right)


def test_what_a_spawned_worker_is_sent_works_there(place, processor):
    """Spawned workers get dataset and collate function as bytes; open files stay behind."""
    here = loader(configure(place, augment=AUGMENT), processor)
    expected = here.collate_fn([here.dataset[(0, n)] for n in range(4)])
    sent = pickle.loads(bytes(ForkingPickler.dumps((here.dataset, here.collate_fn))))
    same(sent[1]([sent[0][(0, n)] for n in range(4)]), expected)


def test_reading_leaves_the_callers_generator_alone(place, processor):
    pairs = loader(configure(place, augment=AUGMENT), processor).dataset
    torch.manual_seed(3)
    before = torch.get_rng_state()
    pairs[(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_by_epoch_and_pair_alone(place, processor):
    pairs = loader(configure(place, augment=AUGMENT), processor).dataset
    first = pairs[(0, 3)]["pixels"]
    assert torch.equal(first, pairs[(0, 3)]["pixels"])
    assert not torch.equal(first, pairs[(1, 3)]["pixels"])


def test_an_epoch_is_every_pair_once_over_all_processes(place):
    config = configure(place, batch_size=3, accumulate=2, steps=None, epochs=2)
    parts = [list(data.Batches(config, 25, rank, 2)) for rank in range(2)]
    assert [len(part) for part in parts] == [8, 8]
    for epoch in range(2):
        seen = [key for part in parts for batch in part[epoch * 4 : epoch * 4 + 4] for key in batch]
        assert {e for e, _ in seen} == {epoch}
        assert len({index for _, index in seen}) == 24
    resumed = data.Batches(config, 25, 1, 2, start=3)
    assert list(resumed) == parts[1][6:] and len(resumed) == 2
    with pytest.raises(ConfigError, match=r"10 pairs, too few .* set batch_size to 2 or less"):
        data.Batches(config, 10, 0, 2)


def small_set(folder, queries, items):
    pictures = world.write_pictures(folder / "png")
    write_tsv(folder / "i.tsv", ((n, pictures[n].read_bytes()) for n in items))
    rows = [{"query_id": n, "query_text": t, "item_ids": i} for n, (t, i) in enumerate(queries)]
    write_jsonl(folder / "q.jsonl", rows)
    return MugeDataset(read_queries(folder / "q.jsonl"), MugeImages(folder / "i.tsv"))


def test_same_product_and_same_text_are_never_negatives(tmp_path):
    queries = [("红色", [0, 1]), ("蓝色", [1, 2]), ("红色", [3]), ("绿色", [4])]
    pairs = small_set(tmp_path, queries, range(5))
    relations = data.Relations(pairs)
    texts = torch.tensor([int(relations.text_of_query[q]) for q in (0, 1, 2, 3)])
    items = torch.tensor([relations.row_of_item[i] for i in (1, 2, 3, 4, 0)])
    right = {"红色": {0, 1, 3}, "蓝色": {1, 2}, "绿色": {4}}
    expected = [[item in right[queries[q][0]] for item in (1, 2, 3, 4, 0)] for q in range(4)]
    assert relations.positives(texts, items).tolist() == expected


def test_transform_without_augmentation_is_the_processors(processor):
    picture = world.picture((200, 10, 30), 1, size=70)
    plain = data.make_transform(AugmentConfig(crop=None), processor.image_processor)(picture)
    expected = processor.image_processor.one(picture)
    torch.testing.assert_close(plain, expected, atol=0.02, rtol=0)
    augment = AugmentConfig(crop=[0.2, 0.3], flip=1.0, rand_augment=RandAugmentConfig(1, 5, 0.5))
    found = data.make_transform(augment, processor.image_processor)(picture)
    assert found.shape == expected.shape and found.dtype == torch.float32


def test_broken_pictures_and_dangling_labels(place, processor, tmp_path):
    pictures = [path.read_bytes() for path in world.write_pictures(tmp_path / "png")]
    pictures[1] = pictures[1][:60]
    write_tsv(tmp_path / "i.tsv", enumerate(pictures))
    rows = [{"query_id": n, "query_text": "红色", "item_ids": [n]} for n in range(6)]
    write_jsonl(tmp_path / "q.jsonl", rows)
    files = {"queries": "q.jsonl", "images": "i.tsv"}
    changes = {"folder": str(tmp_path), "data": {"train": files}, "batch_size": 6, "steps": 1}
    with pytest.raises(MugeError, match=r"i\.tsv:2: image"):
        list(loader(configure(place, **changes), processor))
    changes["data"] = {"train": files, "on_error": "skip"}
    config = configure(place, **changes)
    pairs = data.open_split(config, config.data.train, "train")
    transform = data.make_transform(config.augment, processor.image_processor)
    kept = data.TrainPairs(pairs, data.Relations(pairs), transform, 0, skip=True)
    (batch,) = data.make_loader(
        config, kept, data.Batches(config, len(pairs)), processor, pin=False
    )
    assert batch["replaced"] == 1
    assert Counter(item for _, item in batch["ids"]) == {0: 1, 2: 2, 3: 1, 4: 1, 5: 1}


@pytest.mark.parametrize(
    "rows,message",
    [
        ([], "has no query with a known picture"),
        ([{"query_id": 7, "query_text": "红色", "item_ids": []}], "query 7 has no item_ids"),
        ([{"query_id": 7, "query_text": "红色", "item_ids": [99]}], "no picture in .* for 99"),
    ],
)
def test_labels_without_pictures(place, tmp_path, rows, message):
    write_jsonl(tmp_path / "q.jsonl", rows)
    files = {"queries": str(tmp_path / "q.jsonl"), "images": str(place.images)}
    config = configure(place, data={"train": files})
    with pytest.raises(ValueError, match=message):
        data.open_split(config, config.data.train, "train")
    missing = configure(place, data={"train": {**files, "images": "nowhere.tsv"}})
    with pytest.raises(FileNotFoundError, match=r"data.train.images: no such file: .*nowhere.tsv"):
        data.open_split(missing, missing.data.train, "train")
