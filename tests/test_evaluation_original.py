"""The protocol ``original``: against the original's outputs, and against a restatement of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.original import letters, model_of
from support.retrieval_sets import model_and_processor, read, restated_tables, write_set

from bagformer import BagFormerProcessor
from bagformer.evaluation import evaluate, run
from bagformer.evaluation.sets import SetFiles, read_set
from bagformer.evaluation.tables import descending, table_ranks

KINDS, SHORT = ("recall", "rank", "merge"), {"text_to_image": "t2i", "image_to_text": "i2t"}
CASES = {
    "bagwise": {},
    "early": {"fusion": "early"},
    "tokenwise": {"interaction": "tokenwise"},
    "cls_token": {"interaction": "cls_token"},
}


@pytest.fixture
def tables(monkeypatch):
    """The score tables of an evaluation by (kind, direction), as they are ranked."""
    kept: dict[tuple[str, str], torch.Tensor] = {}
    ranked = run.table_ranks

    def keep(scores, relevant, listed):
        kept[KINDS[len(kept) // 2], tuple(SHORT)[len(kept) % 2]] = scores.clone()
        return ranked(scores, relevant, listed)

    monkeypatch.setattr(run, "table_ranks", keep)
    return kept


def metrics_of(scores, relevant) -> list[float]:
    """R@1, R@5, R@10 and mean; the later of equal scores first, as a stable sort turned round."""
    hits = {1: 0, 5: 0, 10: 0}
    for row, wanted in zip(scores.tolist(), relevant, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], -item))
        place = min((order.index(item) for item in wanted), default=len(row))
        for cutoff in hits:
            hits[cutoff] += place < cutoff
    found = [100 * count / len(relevant) for count in hits.values()]
    return [*found, sum(found) / 3]


@pytest.mark.parametrize("batch, k", [(11, 11), (4, 6)])
@pytest.mark.parametrize("case", CASES)
def test_the_evaluation_is_the_restated_one(tmp_path, tables, case, batch, k):
    model, processor = model_and_processor(tmp_path, protocol="original", **CASES[case])
    dataset = read(write_set(tmp_path / "set"))
    expected = restated_tables(model, processor, dataset, batch, k)
    report = evaluate(model, processor, dataset, batch_size=batch, k_test=k)
    assert report.protocol == "original" and report.counts["images_without_queries"] >= 3
    place = {key: number for number, key in enumerate(dataset.images)}
    relevant = [[place[item] for item in query.item_ids] for query in dataset.queries]
    flipped = [[t for t, items in enumerate(relevant) if i in items] for i in range(len(place))]
    for (kind, direction), found in tables.items():
        atol = 1e-4 if kind == "recall" else 5e-3
        torch.testing.assert_close(
            found.double(),
            expected[kind][direction],
            atol=atol,
            rtol=1e-5,
            msg=f"{kind} {direction}",
        )
        wanted = relevant if direction == "text_to_image" else flipped
        names = [f"{kind}_{SHORT[direction]}_{end}" for end in ("r1", "r5", "r10", "mean")]
        assert [report.metrics[n] for n in names] == pytest.approx(metrics_of(found, wanted))
    means = report.metrics["rank_t2i_mean"], report.metrics["rank_i2t_mean"]
    assert report.metrics["rank_r_mean"] == pytest.approx(sum(means) / 2)


def test_batches_cut_bags_and_transparency_is_dropped(tmp_path):
    """Both change the scores; neither does under the other protocol's pictures and matcher."""
    model, processor = model_and_processor(tmp_path, protocol="original")
    dataset = read(write_set(tmp_path / "set"))
    scores = {}
    for size in (1, 11):
        original = run._original
        report = {}

        def keep(job, texts, chunks, store, report=report):
            report["texts"] = texts
            report["images"] = torch.cat([chunk.features for chunk in chunks])
            return {}, {}

        try:
            run._original = keep
            evaluate(model, processor, dataset, batch_size=size)
        finally:
            run._original = original
        scores[size] = report
    widths = [scores[size]["texts"].features.shape[1] for size in (1, 11)]
    assert widths[0] > widths[1]
    laid_on_white = processor(images=[dataset.images[key] for key in dataset.images])
    with torch.inference_mode():
        other = model.get_image_features(laid_on_white["pixel_values"]).image_features
    moved = (other - scores[1]["images"]).abs().amax((1, 2)) > 1e-3
    assert moved.nonzero().flatten().tolist() == [4, 9]


def test_queries_without_labels_give_rankings_alone(tmp_path):
    model, processor = model_and_processor(tmp_path, protocol="original")
    dataset = read(write_set(tmp_path / "set", labels=False))
    report = evaluate(model, processor, dataset, k_test=4)
    assert report.metrics == {} and set(report.rankings) == set(KINDS)
    assert report.rankings["rank"].shape == (11, 10)


# np.argsort(row)[::-1] of NumPy 1.24.4, whose sort is not stable
RECORDED_ROW = [0, 2, 1, 1, 0, 2, 0, 1, 2, 2, 0, 1, 1, 1, 0, 2, 2, 0, 0, 1, 2, 1, 0, 1]
RECORDED_ORDER = [
    9,
    1,
    20,
    5,
    16,
    15,
    8,
    23,
    2,
    3,
    7,
    11,
    12,
    13,
    19,
    21,
    22,
    10,
    14,
    6,
    17,
    4,
    18,
    0,
]


def test_equal_scores_are_ordered_as_numpy_1_24_ordered_them():
    row = np.array(RECORDED_ROW, dtype=np.float32)
    assert descending(row).tolist() == RECORDED_ORDER
    short = np.array([1, 3, 3, 2, 3, 1], dtype=np.float32)
    assert descending(short).tolist() == [4, 2, 1, 3, 5, 0]


@pytest.mark.parametrize("levels, items", [(2, 30), (4, 50), (9, 9), (1000, 40)])
def test_ranks_are_those_of_whole_sorted_rows(levels, items):
    maker = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (60, items), generator=maker).float()
    relevant = [torch.randperm(items, generator=maker)[: n % 4].tolist() for n in range(60)]
    ranks, best = table_ranks(scores, relevant, 10)
    for row, wanted, rank, first in zip(
        scores.numpy(), relevant, ranks.tolist(), best.tolist(), strict=True
    ):
        order = descending(row).tolist()
        exact = min((order.index(item) for item in wanted), default=-1)
        assert first == order[:10]
        assert rank == exact if exact < 10 else rank >= 10


def _golden_cases(golden):
    for letter in letters(golden):
        place = golden / f"muge_{letter}"
        if not (place / "eval.json").exists():
            continue
        recorded = json.loads((place / "eval.json").read_text(encoding="utf-8"))
        arrays = np.load(place / "eval.npz")
        for tag in recorded:
            if not tag.startswith("_"):
                yield letter, place, tag, recorded[tag], arrays


def test_scores_and_metrics_are_the_originals(golden, tables):
    compared = 0
    for letter, place, tag, recorded, arrays in _golden_cases(golden):
        name, fusion = (tag.split("_late_fusion"), "late")
        if "_early_fusion" in tag:
            name, fusion = (tag.split("_early_fusion"), "early")
        batch, k = (int(part[2 - n :]) for n, part in enumerate(name[1].strip("_").split("_")))
        model = model_of(golden, letter, fusion=fusion, interaction=name[0])
        processor = BagFormerProcessor.from_config(
            model.config, golden / "tokenizer", place / "entity_dict_small.txt"
        )
        dataset = read_set(SetFiles(place / "MR_valid_queries.jsonl", place / "MR_valid_imgs.tsv"))
        tables.clear()
        report = evaluate(model, processor, dataset, batch_size=batch, k_test=k)
        for (kind, direction), found in tables.items():
            expected = torch.from_numpy(arrays[f"{tag}|{kind}_{SHORT[direction]}"])
            atol, rtol = (1e-5, 1e-4) if kind == "recall" else (5e-3, 0)
            torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
        logged = report.original_metrics()
        flip = 100 / min(found.shape[0] for found in tables.values())
        for kind, values in recorded.items():
            for end, value in values.items():
                assert abs(logged.pop(f"{kind}_val_{end}") - value) <= flip + 1e-3, (tag, kind, end)
        assert not logged
        compared += 1
    assert compared
