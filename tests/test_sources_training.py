"""The same pairs train the same model, whichever form they come in and whoever reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import source_sets, training

from bagformer.data.records import RecordError
from bagformer.data.rows import Columns, RowPairs
from bagformer.training import data
from bagformer.training.config import ConfigError
from bagformer.training.config_file import from_tree, parse

datasets = source_sets.need("datasets")
source_sets.need("webdataset")
KINDS = ("parquet", "raw", "huggingface", "splits", "webdataset")
AUGMENT = {"flip": 0.5, "rand_augment": {"ops": 1}}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        source_sets.keep_cache_in(tmp_path_factory.mktemp("cache"), patch)
        yield


@pytest.fixture(scope="module")
def files(place):
    rows = source_sets.rows_of(place.queries, place.images)
    return source_sets.write_all(place.root / "sources", rows)


def tree(place, output, files, **changes):
    found = {"steps": 2, "log": {"every": 1}, "valid": {"every": 2}, "checkpoint": {"every": 2}}
    found["schedule"] = {"warmup": 0}
    found["data"] = {"train": files, "valid": files}
    return training.tiny_tree(place, output, augment=AUGMENT, **{**found, **changes})


def result(output):
    rows = [training.read_rows(output, kind) for kind in ("train", "valid")]
    return rows, load_file(output / "last" / "model.safetensors")


def run(place, output, files, **changes):
    training.make_trainer(tree(place, output, files, **changes)).run()
    return result(output)


def same(left, right):
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    assert all(torch.equal(left[1][name], right[1][name]) for name in left[1])


@pytest.fixture(scope="module")
def expected(place, tmp_path_factory):
    muge = {"queries": str(place.queries), "images": str(place.images)}
    found = run(place, tmp_path_factory.mktemp("runs") / "muge", muge)
    assert len(found[0][0]) == 2 and len(found[0][1]) == 1
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_trains_as_muge_files_do(place, files, expected, tmp_path, kind):
    same(run(place, tmp_path / "out", files[kind]), expected)


@pytest.mark.parametrize("kind", ("parquet", "huggingface", "webdataset"))
def test_forked_workers_change_nothing(place, files, expected, tmp_path, kind):
    same(
        run(place, tmp_path / "out", files[kind], workers=2, start_method="fork"),
        expected,
    )


def test_spawned_workers_change_nothing(place, files):
    from bagformer.models.processing_bagformer import BagFormerProcessor

    processor = BagFormerProcessor.from_pretrained(str(place.model))
    muge = {"queries": str(place.queries), "images": str(place.images)}
    parts = []
    for one in (muge, *(files[kind] for kind in ("parquet", "huggingface", "webdataset"))):
        config = from_tree(tree(place, place.root / "none", one), {})
        pairs = data.open_split(config, config.data.train, "train")
        transform = data.make_transform(config.augment, processor.image_processor)
        parts.append(data.TrainPairs(pairs, data.Relations(pairs), transform, config.seed))
    numbers = [list(range(6)), list(range(6, 12))]
    expected = [[parts[0][0, n] for n in some] for some in numbers]
    plan = [[(part, 0, n) for n in some] for part in (1, 2, 3) for some in numbers]
    loader = torch.utils.data.DataLoader(
        source_sets.Several(parts),
        batch_sampler=plan,
        collate_fn=list,
        num_workers=2,
        multiprocessing_context="spawn",
    )
    for number, found in enumerate(loader):
        for left, right in zip(expected[number % 2], found, strict=True):
            assert torch.equal(left["pixels"], right["pixels"])
            assert {**left, "pixels": None} == {**right, "pixels": None}
    assert number == 5


def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(place, files, tmp_path):
    changes = {"steps": 6, "valid": {"every": 3}, "workers": 2, "start_method": "fork"}
    whole = run(place, tmp_path / "whole", files["webdataset"], **changes)

    def stop(step, _):
        if step == 5:
            raise KeyboardInterrupt

    broken = tree(place, tmp_path / "broken", files["webdataset"], **changes)
    with pytest.raises(KeyboardInterrupt):
        training.make_trainer(broken, on_update=stop).run()
    training.make_trainer(broken, resume=True).run()
    (rows, weights) = result(tmp_path / "broken")
    # step 5 was logged before the interruption and again after it
    rows[0] = [row for n, row in enumerate(rows[0]) if row not in rows[0][:n]]
    same((rows, weights), whole)


def test_broken_rows_are_replaced_and_counted(place, tmp_path):
    rows = source_sets.rows_of(place.queries, place.images)
    samples = source_sets.samples_of(rows)
    samples[3]["png"] = samples[3]["png"][:60]
    whole = samples[5]
    samples[5] = {**whole, "json": b"["}
    shard = source_sets.write_tar(tmp_path / "a.tar", samples)
    files = {"queries": str(shard)}
    skip = {"train": files, "valid": files, "on_error": "skip"}
    changes = {"steps": 1, "batch_size": len(rows) - 1, "data": skip, "valid": {"every": 1}}
    run(place, tmp_path / "out", None, **changes)
    output = tmp_path / "out"
    (start,) = training.read_rows(output, "start")
    assert start["skipped"] == {"bad json": 1} and start["pairs"] == len(rows) - 1
    assert [row["broken_pictures"] for row in training.read_rows(output, "train")] == [1]
    assert len(training.read_rows(output, "valid")) == 1
    with pytest.raises(RecordError, match=r"a.tar: sample 000005: json: not a JSON object"):
        run(place, tmp_path / "other", files)
    samples[5] = whole
    source_sets.write_tar(tmp_path / "a.tar", samples)
    options = {"steps": 4, "workers": 2, "start_method": "fork"}
    with pytest.raises(RecordError, match=r"^\S*a.tar: sample 000003: image: truncated or damaged"):
        run(place, tmp_path / "third", files, **options)


@pytest.mark.parametrize(
    "files,kind,message",
    [
        (
            {"queries": "none.parquet"},
            FileNotFoundError,
            "data.train.queries: no such file: .*none",
        ),
        (
            {"queries": "https://a/b.tar"},
            ConfigError,
            "data.train.queries: .*nothing is downloaded",
        ),
        ({"queries": "me/cats", "source": "huggingface"}, FileNotFoundError, "no such folder"),
        (
            {"queries": "e.parquet"},
            ConfigError,
            "data.train: .*e.parquet: no rows",
        ),
        (
            {"queries": "x.tar"},
            ConfigError,
            "data.train: .*x.tar has no query with a known",
        ),
        (
            {"queries": "n.parquet"},
            ConfigError,
            "data.train: .*n.parquet: there is no column 'text'",
        ),
    ],
)
def test_splits_that_cannot_be_opened(place, tmp_path, files, kind, message):
    import pyarrow
    import pyarrow.parquet as parquet

    text, binary = pyarrow.array([], pyarrow.string()), pyarrow.array([], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": text, "image": binary}), tmp_path / "e.parquet")
    parquet.write_table(pyarrow.table({"txt": text, "image": binary}), tmp_path / "n.parquet")
    source_sets.write_tar(tmp_path / "x.tar", [])
    config = from_tree(tree(place, tmp_path / "out", files, folder=str(tmp_path)), {})
    with pytest.raises(kind, match=message):
        data.open_split(config, config.data.train, "train")


def test_the_documented_examples_train(place, expected, tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text("utf-8")
    section = re.search(r"^## Other sources\n(.*?)^## ", page, re.M | re.S)
    blocks = re.findall(r"^```yaml\n(.*?)^```", section[1], re.M | re.S)
    assert len(blocks) == 3
    rows = source_sets.rows_of(place.queries, place.images)
    source_sets.write_documented(tmp_path / "here", rows)
    for number, block in enumerate(blocks):
        found, _ = parse(block, "docs/training.md")
        changes = {"folder": str(tmp_path / "here"), "data": found["data"]}
        same(run(place, tmp_path / f"out{number}", None, **changes), expected)


def test_without_ids_equal_texts_are_one_text(tmp_path):
    rows = [
        {"text": text, "image": source_sets.png((n, 0, 0))}
        for n, text in enumerate(("红色", "蓝色", "红色", "绿色"))
    ]
    source_sets.dataset(rows).to_parquet(tmp_path / "a.parquet")
    from bagformer.data.tables import open_parquet

    pairs = RowPairs(open_parquet([tmp_path / "a.parquet"], Columns()))
    relations = data.Relations(pairs)
    texts = torch.as_tensor(relations.text_of_query)
    found = relations.positives(texts, torch.arange(4)).tolist()
    assert found == [[a["text"] == b["text"] for b in rows] for a in rows]
    assert [pairs[n]["query_id"] for n in range(4)] == list(pairs.images) == [0, 1, 2, 3]
