"""Recall: against a plain sort, against the original's evaluation, and on inputs that are wrong."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from bagformer.retrieval.metrics import (
    first_relevant_ranks,
    recall_at,
    retrieval_recall,
    topk_ranks,
)


def _plain_ranks(scores, relevant):
    ranks = []
    for row, wanted in zip(scores.tolist(), relevant, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item))
        ranks.append(min((order.index(item) for item in wanted), default=-1))
    return ranks


def _case(seed, n_texts, n_images, levels):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (n_texts, n_images), generator=generator).float()
    relevant = [
        rng.sample(range(n_images), rng.randint(0, min(4, n_images))) for _ in range(n_texts)
    ]
    return scores, relevant


@pytest.mark.parametrize("seed", range(30))
def test_ranks_equal_a_plain_sort_with_ties_to_the_lower_index(seed):
    scores, relevant = _case(seed, 1 + 5 * seed, 1 + 3 * seed, levels=2 + seed)
    assert first_relevant_ranks(scores, relevant).tolist() == _plain_ranks(scores, relevant)


@pytest.mark.parametrize("seed", range(10))
def test_ranks_from_the_best_k_agree_with_ranks_from_all(seed):
    scores, relevant = _case(seed, 40, 30, levels=9)
    k = 1 + 3 * seed
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    full = first_relevant_ranks(scores, relevant)
    assert topk_ranks(best, relevant, 30).tolist() == full.clamp_max(k).tolist()


def test_many_pairs_cross_the_chunk_border():
    scores = torch.randn(700, 50, generator=torch.Generator().manual_seed(0))
    relevant = [[row % 50, (row * 7) % 50] for row in range(700)]
    assert first_relevant_ranks(scores, relevant).tolist() == _plain_ranks(scores, relevant)


def test_recall_of_known_ranks():
    ranks = torch.tensor([0, 1, 4, 5, 9, 10, 99, 0])
    recall = recall_at(ranks)
    assert recall == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "mean": 50.0}


def test_a_query_without_relevant_item_is_an_error_a_miss_or_left_out():
    ranks = torch.tensor([0, -1, 0, 3])
    with pytest.raises(
        ValueError, match="1 of 4 queries have no relevant item, the first is number 1"
    ):
        recall_at(ranks)
    assert recall_at(ranks, [1], without_relevant="miss")["R@1"] == 50.0
    assert recall_at(ranks, [1], without_relevant="skip")["R@1"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="no query is left"):
        recall_at(ranks[1:2], without_relevant="skip")
    with pytest.raises(ValueError, match="without_relevant: expected one of"):
        recall_at(ranks, without_relevant="ignore")


def test_a_cutoff_beyond_the_best_k_is_an_error():
    ranks = topk_ranks(torch.tensor([[3, 1]]), [[1]], 9)
    assert recall_at(ranks, [1, 2], k=2) == {"R@1": 0.0, "R@2": 100.0, "mean": 50.0}
    with pytest.raises(ValueError, match="expected 1 to 2, got 5"):
        recall_at(ranks, k=2)


def test_bad_input_names_the_argument():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="relevant: expected one collection for each of 2 queries"):
        first_relevant_ranks(scores, [[0]])
    with pytest.raises(
        ValueError, match=r"relevant\[1\]: expected item numbers from 0 to 2, got 3"
    ):
        first_relevant_ranks(scores, [[0], [3]])
    with pytest.raises(ValueError, match="scores: row 1 holds NaN"):
        first_relevant_ranks(torch.tensor([[0.0], [float("nan")]]), [[0], [0]])
    with pytest.raises(TypeError, match="scores: expected a float tensor"):
        first_relevant_ranks(scores.long(), [[0], [0]])
    with pytest.raises(ValueError, match=r"scores: expected \[queries, items\], got \[3\]"):
        first_relevant_ranks(scores[0], [[0]])
    with pytest.raises(TypeError, match="indices: expected an int tensor"):
        topk_ranks(scores, [[0], [0]], 3)
    with pytest.raises(ValueError, match=r"image_to_text: expected \[3, 2\], got \[2, 3\]"):
        retrieval_recall(scores, scores, [[0], [0]])


def _itm_names(recall):
    names = {}
    for short, direction in (("txt", "image_to_text"), ("img", "text_to_image")):
        for cutoff in (1, 5, 10):
            names[f"{short}_r{cutoff}"] = recall[direction][f"R@{cutoff}"]
        names[f"{short}_r_mean"] = recall[direction]["mean"]
    return {**names, "r_mean": recall["mean"]}


def _argsort_evaluation(scores_i2t, scores_t2i, txt2img):
    """The original's rule in words: place of the best right one in the reversed argsort."""
    img2txt = [[t for t, images in txt2img.items() if i in images] for i in range(len(scores_i2t))]
    names = {}
    for short, scores, right in (("txt", scores_i2t, img2txt), ("img", scores_t2i, txt2img)):
        places = []
        for row in range(len(scores)):
            order = np.argsort(scores[row])[::-1].tolist()
            places.append(min((order.index(item) for item in right[row]), default=10**9))
        for cutoff in (1, 5, 10):
            names[f"{short}_r{cutoff}"] = 100 * sum(p < cutoff for p in places) / len(places)
        names[f"{short}_r_mean"] = sum(names[f"{short}_r{c}"] for c in (1, 5, 10)) / 3
    return {**names, "r_mean": (names["txt_r_mean"] + names["img_r_mean"]) / 2}


def test_both_directions_equal_the_rule_of_the_original_on_data_made_here():
    generator = np.random.default_rng(7)
    for n_texts, n_images in ((23, 31), (60, 12)):
        forward = generator.normal(size=(n_texts, n_images)).astype(np.float32)
        backward = generator.normal(size=(n_images, n_texts)).astype(np.float32)
        relevant = {t: generator.choice(n_images, 1 + t % 3).tolist() for t in range(n_texts)}
        ours = retrieval_recall(
            torch.from_numpy(forward), torch.from_numpy(backward), [*relevant.values()]
        )
        expected = _argsort_evaluation(backward, forward, relevant)
        assert _itm_names(ours) == pytest.approx(expected, abs=1e-9)


def test_both_directions_equal_the_original(golden):
    cases = json.loads((golden / "metrics.json").read_text(encoding="utf-8"))
    arrays = np.load(golden / "metrics.npz")
    assert cases
    for number, case in enumerate(cases):
        forward = torch.from_numpy(arrays[f"case{number}/scores_t2i"])
        backward = torch.from_numpy(arrays[f"case{number}/scores_i2t"])
        relevant = [case["txt2img"][str(text)] for text in range(len(forward))]
        ours = _itm_names(retrieval_recall(forward, backward, relevant))
        assert ours == pytest.approx(case["itm_eval"], abs=1e-9)
        # a ranking cut to its best entries gives the same recalls as long as it holds ten of them
        best = torch.sort(forward, dim=1, descending=True, stable=True).indices
        ranks = topk_ranks(best[:, : case["sparse_topk"]], relevant, forward.shape[1])
        sparse = recall_at(ranks, k=case["sparse_topk"])
        assert sparse["mean"] == pytest.approx(case["sparse_itm_eval"]["img_r_mean"], abs=1e-9)
        for row, predicted in enumerate(case["t2i_pred"]):
            assert [5000 + item for item in best[row, :10].tolist()] == predicted["item_ids"]
