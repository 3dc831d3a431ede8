"""The original's names give the original's results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.compat import make_tokenizer, read_once
from transformers import BertTokenizer

from bagformer import BagSegmenter, compat

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def loss_cases(golden):
    arrays = np.load(golden / "loss.npz")
    for case in json.loads((golden / "loss_cases.json").read_text(encoding="utf-8")):
        name = case["name"]
        found = {
            key.split("/", 1)[1]: torch.from_numpy(np.asarray(arrays[key]))
            for key in arrays.files
            if key.startswith(name + "/")
        }
        yield case, found


def close(actual, expected, what):
    # relative to the largest value: single entries of a gradient may be sums that cancel
    worst = (actual.detach() - expected).abs().max()
    assert worst <= 1e-5 * expected.abs().max(), f"{what}: {worst}"


def test_scores_losses_and_gradients_match_the_original(golden):
    seen = set()
    for case, arrays in loss_cases(golden):
        name = case["name"]
        text = arrays["text"].float().requires_grad_()
        image = arrays["image"].float().requires_grad_()
        if "ngram" in case:
            loss = compat.ngramwise_similarity_loss(text, image)
            similarity = compat.ngramwise_similarity(image[0], text)
            close(similarity, arrays["ngramwise_similarity_0"], f"{name} similarity")
        else:
            mask = arrays.get("mask", torch.ones(text.shape[:2]))[..., None].float()
            i2t, t2i = compat.tokenwise_similarity_martix(text * mask, image)
            close(i2t, arrays["sim_i2t"], f"{name} sim_i2t")
            close(t2i, arrays["sim_t2i"], f"{name} sim_t2i")
            if "loss" not in arrays:
                continue
            loss = compat.tokenwise_similarity_loss(text * mask, image)
        close(loss, arrays["loss"], f"{name} loss")
        loss.backward()
        close(text.grad, arrays["grad_text"], f"{name} grad_text")
        close(image.grad, arrays["grad_image"], f"{name} grad_image")
        seen.add(name)
    assert len(seen) >= 2


def test_pairs_and_sparse_results_match_the_original(golden):
    for case, arrays in loss_cases(golden):
        if "ngram" in case:
            continue
        mask = arrays.get("mask", torch.ones(arrays["text"].shape[:2]))[..., None].float()
        text, image = arrays["text"].float() * mask, arrays["image"].float()
        for key, pair, metric in (
            ("l2_pairwise", (text, image), "l2"),
            ("cosine_pairwise", (text, image), "cosine"),
            ("l2_pairwise_swapped", (image, text), "l2"),
        ):
            if key in arrays:
                first, second = (side[: len(arrays[key])] for side in pair)
                close(compat.tokenwise_similarity(first, second, metric), arrays[key], key)
        k, row = case["sparse_topk"], case["cls_text_row"]
        full = compat.sparse_tokenwise_similarity_martix(text, image, topk=k)
        cls = compat.sparse_cls_token_similarity(image[:, 0], text[:, row], topk=k)
        for kind, (i2t, t2i) in (("sparse", full), ("sparse_cls", cls)):
            for direction, found in (("i2t", i2t), ("t2i", t2i)):
                wanted = arrays[f"{kind}_{direction}_idx"]
                assert [list(one) for one in found] == wanted.tolist()
                values = torch.tensor([list(one.values()) for one in found])
                close(values, arrays[f"{kind}_{direction}_val"], f"{kind}_{direction}")


def sides(texts=4, images=3, seed=0):
    maker = torch.Generator().manual_seed(seed)
    return torch.randn(texts, 5, 8, generator=maker), torch.randn(images, 7, 8, generator=maker)


def test_similarities_follow_plain_pytorch():
    text, image = sides()
    similarity = torch.einsum("atd,bpd->abtp", text, image)
    i2t, t2i = compat.tokenwise_similarity_martix(text, image)
    torch.testing.assert_close(t2i, similarity.amax(3).sum(2), **CLOSE)
    torch.testing.assert_close(i2t, similarity.amax(2).sum(2).t(), **CLOSE)
    one = compat.tokenwise_similarity(text[0], image)
    torch.testing.assert_close(one, t2i[0], **CLOSE)
    pairs = compat.tokenwise_similarity(text[:3], image)
    torch.testing.assert_close(pairs, t2i[:3].diagonal(), **CLOSE)
    distance = torch.cdist(text[:3].double(), image.double()).square().amin(2).sum(1)
    squared = compat.tokenwise_similarity(text[:3], image, "l2")
    torch.testing.assert_close(squared, -distance.float(), **CLOSE)
    with pytest.raises(ValueError, match="similarity_metric must be one of cosine, l2"):
        compat.tokenwise_similarity(text, image, "dot")
    with pytest.raises(ValueError, match="query must be"):
        compat.tokenwise_similarity(text[0, 0], image)


def test_ngrams_follow_plain_pytorch():
    maker = torch.Generator().manual_seed(0)
    text = torch.randn(3, 2, 5, 8, generator=maker, requires_grad=True)
    image = torch.randn(3, 7, 8, generator=maker, requires_grad=True)
    every = torch.einsum("agtd,bpd->abgtp", text, image)
    i2t, t2i = every.amax((2, 4)).sum(2).t(), every.amax((2, 3)).sum(2)
    torch.testing.assert_close(compat.ngramwise_similarity(image[1], text), i2t[1], **CLOSE)
    torch.testing.assert_close(compat.ngramwise_similarity(text[1], image), t2i[1], **CLOSE)
    target = torch.arange(3)
    truth = (F.cross_entropy(i2t, target) + F.cross_entropy(t2i, target)) / 2
    loss = compat.ngramwise_similarity_loss(text, image)
    torch.testing.assert_close(loss, truth, **CLOSE)
    wanted = torch.autograd.grad(truth, (text, image))
    torch.testing.assert_close(torch.autograd.grad(loss, (text, image)), wanted, **CLOSE)
    with pytest.raises(ValueError, match="give"):
        compat.ngramwise_similarity(text, image)


def test_sparse_results_are_the_best_of_the_full_matrix():
    text, image = sides(6, 5)
    i2t, t2i = compat.tokenwise_similarity_martix(text, image)
    for full, sparse in zip(
        (i2t, t2i), compat.sparse_tokenwise_similarity_martix(text, image, topk=3), strict=True
    ):
        for row, found in zip(full, sparse, strict=True):
            values, index = row.topk(3)
            assert list(found) == index.tolist()
            np.testing.assert_allclose(list(found.values()), values, rtol=1e-5)
    cls_i2t, cls_t2i = compat.sparse_cls_token_similarity(image[:, 0], text[:, 0], topk=2)
    assert len(cls_i2t) == 5 and len(cls_t2i) == 6
    best = (text[:, 0] @ image[:, 0].t()).argmax(dim=1).tolist()
    assert [next(iter(one)) for one in cls_t2i] == best


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("compat"))


def test_flat_offsets_and_masks(tokenizer):
    helper = compat.EmbeddingBagHelperAutomaton(tokenizer, tokenizer.dictionary)
    text = tokenizer(["玫瑰红色a", "手机壳"], padding="max_length", max_length=8)
    first, second = text["input_ids"]
    # 玫瑰 and 红色 touch: an empty bag between them; 手机壳 needs 手机 to be an entry
    assert helper.get_offsets(first) == [0, 1, 3, 3, 5, 6, 7]
    assert helper.get_offsets(second) == [0, 1, 2, 3, 4, 5, 6, 7]
    offsets, mask = helper.process(text, return_mask=True)
    assert offsets == [0, 1, 3, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert mask == [[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert helper.process(text) == offsets
    assert helper.process(text.convert_to_tensors("pt")) == offsets
    backward = compat.EmbeddingBagHelper(tokenizer, tokenizer.dictionary, masked_token=["[CLS]"])
    assert backward.get_offsets(second)[:3] == [0, 1, 4]
    masked = backward.process(tokenizer(["手机壳"]), return_mask=True)[1]
    assert masked == [[0, 1, 1]]
    with pytest.raises(ValueError, match="no rows"):
        helper.process({"input_ids": []})


def test_bags_match_the_original(golden, original_data, monkeypatch):
    monkeypatch.setattr(BagSegmenter, "from_dictionary", read_once)
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer")
    dictionary = str(original_data / "entity_dict_20220507")
    helpers = {
        "fwd": compat.EmbeddingBagHelperAutomaton(tokenizer, dictionary),
        "bmm": compat.EmbeddingBagHelper(tokenizer, dictionary),
    }
    arrays = np.load(golden / "offsets.npz")
    batches = json.loads((golden / "offsets_process.json").read_text(encoding="utf-8"))
    checked = 0
    for batch in batches:
        source = batch["source"]
        if f"ids_{source}" not in arrays.files:
            continue
        rows = arrays[f"ids_{source}"][batch["rows"]].tolist()
        offsets, mask = helpers[batch["helper"]].process({"input_ids": rows}, return_mask=True)
        assert offsets == batch["offsets"]
        assert ["".join(map(str, row)) for row in mask] == batch["mask"]
        checked += 1
    assert checked > 20
