"""The protocol ``corrected`` against a plain ranking of all scores, and what bad input gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.retrieval_sets import FIRST_ID, model_and_processor, read, write_set

from bagformer import reference
from bagformer.data.muge import MugeError
from bagformer.evaluation import evaluate, metric_names, with_protocol
from bagformer.evaluation.candidates import Candidates, merge, reorder
from bagformer.evaluation.images import TokenStore
from bagformer.evaluation.sets import find_files, read_set

KINDS = ("recall", "rank", "merge")
CASES = {
    "bagwise": {},
    "mean": {"reduction": "mean"},
    "early": {"fusion": "early"},
    "tokenwise": {"interaction": "tokenwise"},
    "cls_token": {"interaction": "cls_token"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


def plain_scores(model, processor, dataset):
    """Scores and logits of every pair from one batch of everything."""
    texts = processor(text=[query.text for query in dataset.queries])
    pixels = processor(images=[dataset.images[key] for key in dataset.images])["pixel_values"]
    with torch.inference_mode():
        text, image = model.get_text_features(**texts), model.get_image_features(pixels)
        scores = reference.maxsim(
            text.text_features.double(),
            image.image_features.double(),
            text_mask=text.text_mask,
            mask_mode=model.config.mask_mode,
            reduction=model.config.reduction,
        )
        n_texts, n_images = scores.text_to_image.shape
        rows, columns = torch.meshgrid(torch.arange(n_texts), torch.arange(n_images), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        logits = model.match_pairs(
            text.text_embeds[rows], text.text_attention_mask[rows], image.image_embeds[columns]
        )[:, 1].view(n_texts, n_images)
    return {
        "text_to_image": (scores.text_to_image, logits),
        "image_to_text": (scores.image_to_text, logits.t()),
    }


def plain_orders(scores, logits, k):
    """Each row's items, best first, for the three kinds."""
    orders = {"recall": [], "rank": [], "merge": []}
    for row, heads in zip(scores.tolist(), logits.tolist(), strict=True):
        recall = sorted(range(len(row)), key=lambda item: (-row[item], item))
        first, rest = recall[:k], recall[k:]
        orders["recall"].append(recall)
        orders["rank"].append(sorted(first, key=lambda item: (-heads[item], item)) + rest)
        summed = sorted(first, key=lambda item: (-(heads[item] + row[item]), item))
        orders["merge"].append(summed + rest)
    return orders


def plain_recall(orders, relevant):
    """R@1, R@5, R@10 and mean over the rows that have a relevant item."""
    places = [
        min(order.index(item) for item in wanted)
        for order, wanted in zip(orders, relevant, strict=True)
        if wanted
    ]
    found = [100 * sum(place < cutoff for place in places) / len(places) for cutoff in (1, 5, 10)]
    return [*found, sum(found) / 3]


@pytest.mark.parametrize("batch, k", [(64, 11), (3, 4)])
@pytest.mark.parametrize("case", CASES)
def test_the_evaluation_ranks_all_pairs(tmp_path, place, case, batch, k):
    model, processor = model_and_processor(tmp_path, **CASES[case])
    dataset = read(place)
    report = evaluate(model, processor, dataset, batch_size=batch, k_test=k, store_dtype="float32")
    keys = {key: number for number, key in enumerate(dataset.images)}
    relevant = [[keys[item] for item in query.item_ids] for query in dataset.queries]
    flipped = [[t for t, items in enumerate(relevant) if i in items] for i in range(len(keys))]
    assert sum(not row for row in flipped) == report.counts["images_without_queries"] > 0
    plain = plain_scores(model, processor, dataset)
    for short, direction, wanted in (
        ("t2i", "text_to_image", relevant),
        ("i2t", "image_to_text", flipped),
    ):
        for kind, orders in plain_orders(*plain[direction], k).items():
            names = [f"{kind}_{short}_{end}" for end in ("r1", "r5", "r10", "mean")]
            found = [report.metrics[name] for name in names]
            assert found == pytest.approx(plain_recall(orders, wanted)), (kind, short)
            if short == "t2i":
                listed = [order[:10] for order in orders]
                assert report.rankings[kind].tolist() == listed
                ids = [[FIRST_ID + item for item in row] for row in listed]
                assert report.predictions(kind) == ids
    both = ["text_to_image", "image_to_text"]
    assert list(report.metrics) == [n for kind in KINDS for n in metric_names(kind, both)]


def test_batches_workers_and_stores_change_nothing(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    dataset = read(place)
    first = evaluate(model, processor, dataset, k_test=5)
    spill = tmp_path / "spill"
    spill.mkdir()
    for options in (
        {"batch_size": 1},
        {"batch_size": 4, "num_workers": 2},
        {"spill": spill},
        {"spill": spill, "store_dtype": "bfloat16"},
        {"store_dtype": "float32"},
    ):
        other = evaluate(model, processor, dataset, **{"k_test": 5, **options})
        assert other.metrics.keys() == first.metrics.keys()
        assert torch.equal(other.rankings["recall"], first.rankings["recall"]), options
        if options.get("store_dtype") != "bfloat16":
            assert other.metrics == first.metrics, options
    assert list(spill.iterdir()) == []


def test_one_direction_gives_the_same_numbers(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    both = evaluate(model, processor, read(place), k_test=4)
    for direction, short in (("text_to_image", "t2i"), ("image_to_text", "i2t")):
        one = evaluate(model, processor, read(place), k_test=4, directions=direction)
        assert list(one.metrics) == [n for k in KINDS for n in metric_names(k, [direction])]
        assert all(both.metrics[name] == value for name, value in one.metrics.items())
        assert ("recall" in one.rankings) == (short == "t2i")


def test_the_model_comes_back_in_its_own_mode(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    seen = []
    model.vision_proj.register_forward_pre_hook(lambda module, _: seen.append(model.training))
    model.train()
    evaluate(model, processor, read(place))
    assert model.training and seen and not any(seen)


def test_modes_of_parts_and_random_numbers_are_as_they_were(tmp_path, place):
    """A frozen tower that was in evaluation mode stays in it, and training draws what it would."""
    model, processor = model_and_processor(tmp_path)
    model.train()
    model.vision_model.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    evaluate(model, processor, read(place))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_that_their_store_cannot_hold_are_named(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    with torch.no_grad():
        model.vision_model.backbone.norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"store_dtype.*float16.*bfloat16 or float32"):
        evaluate(model, processor, read(place), k_test=2)
    assert evaluate(model, processor, read(place), k_test=2, store_dtype="bfloat16").metrics


def test_a_model_in_bfloat16_keeps_its_tokens_so(tmp_path, place, monkeypatch):
    model, processor = model_and_processor(tmp_path)
    wide = evaluate(model, processor, read(place), k_test=5)
    kept = []
    make = TokenStore._make

    def keep(self, shape):
        kept.append(self.dtype)
        return make(self, shape)

    monkeypatch.setattr(TokenStore, "_make", keep)
    narrow = evaluate(model.bfloat16(), processor, read(place), k_test=5)
    assert kept == [torch.bfloat16] and narrow.metrics.keys() == wide.metrics.keys()
    same = (narrow.rankings["recall"] == wide.rankings["recall"]).float().mean()
    assert same > 0.5


def test_equal_scores_come_in_the_order_of_the_set(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    with torch.no_grad():
        # every picture has the same features now
        model.vision_proj.weight.zero_()
        model.itm_head.weight.zero_()
    for batch in (1, 4, 64):
        report = evaluate(model, processor, read(place), batch_size=batch, k_test=6)
        for kind in KINDS:
            assert report.rankings[kind].tolist() == [list(range(10))] * 11, (batch, kind)


def test_candidates_from_chunks_are_those_of_the_whole():
    scores = torch.randint(0, 4, (6, 23), generator=torch.Generator().manual_seed(1)).float()
    best = None
    for start in range(0, 23, 5):
        best = merge(best, scores[:, start : start + 5], start, 7)
    for row, found in zip(scores.tolist(), best.indices.tolist(), strict=True):
        assert found == sorted(range(23), key=lambda item: (-row[item], item))[:7]


def test_equal_scores_are_re_ordered_by_the_lower_number():
    found = Candidates(torch.tensor([[9.0, 8, 7, 6, 5]]), torch.tensor([[4, 2, 7, 0, 1]]))
    again = reorder(found, torch.tensor([[1.0, 1.0, 1.0]]))
    assert again.indices.tolist() == [[2, 4, 7, 0, 1]]
    again = reorder(found, torch.tensor([[1.0, 1.0, 3.0, 1.0]]))
    assert again.indices.tolist() == [[7, 0, 2, 4, 1]]


def test_a_query_without_pictures_is_left_out(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    dataset = read(place)
    lone = SimpleNamespace(query_id=1, text="玫瑰", item_ids=())
    wider = SimpleNamespace(queries=[*dataset.queries, lone], images=dataset.images)
    report = evaluate(model, processor, wider)
    assert report.counts["queries_without_images"] == 1
    alone = evaluate(model, processor, dataset)
    for end in ("r1", "r5", "r10", "mean"):
        assert report.metrics[f"recall_t2i_{end}"] == alone.metrics[f"recall_t2i_{end}"]


def test_bad_input_is_an_error_that_says_what_to_do(tmp_path, place):
    model, processor = model_and_processor(tmp_path)
    dataset = read(place)
    with pytest.raises(ValueError, match=r"11 queries and 14 images: take at most k_test=11"):
        evaluate(model, processor, dataset, k_test=12)
    evaluate(model, processor, dataset, k_test=14, directions="text_to_image")
    with pytest.raises(ValueError, match="k_test: expected a whole number"):
        evaluate(model, processor, dataset, k_test=-1)
    for options, match in (
        ({"directions": "sideways"}, "directions: expected both"),
        ({"store_dtype": "int8"}, "store_dtype: expected one of float16"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(model, processor, dataset, **options)
    with pytest.raises(NotADirectoryError, match="spill"):
        evaluate(model, processor, dataset, k_test=3, spill=tmp_path / "none")
    lost = SimpleNamespace(query_id=3, text="玫瑰", item_ids=(5,))
    with pytest.raises(ValueError, match=r"query 3 names the item 5, .* mend the query file"):
        evaluate(model, processor, SimpleNamespace(queries=[lost], images=dataset.images))
    with pytest.raises(ValueError, match="0 queries and 14 images"):
        evaluate(model, processor, SimpleNamespace(queries=[], images=dataset.images))
    headless, same = model_and_processor(tmp_path, use_itm_head=False)
    with pytest.raises(ValueError, match="needs a matching head"):
        evaluate(headless, same, dataset, k_test=3)
    with torch.no_grad():
        model.itm_head.bias[1] = float("nan")
    evaluate(model, processor, dataset)
    with pytest.raises(ValueError, match="the matching head's row 0 has a score that is NaN"):
        evaluate(model, processor, dataset, k_test=2)
    with torch.no_grad():
        model.text_proj.bias[0] = float("nan")
    with pytest.raises(ValueError, match="query number 0 has a score that is NaN"):
        evaluate(model, processor, dataset)


def test_a_broken_picture_names_its_line_from_a_worker_too(tmp_path):
    files = write_set(tmp_path / "set")
    lines = files.images.read_bytes().splitlines()
    lines[6] = b"706\tAAAA"
    files.images.write_bytes(b"\n".join(lines) + b"\n")
    model, processor = model_and_processor(tmp_path)
    for workers in (0, 2):
        with pytest.raises(MugeError, match=r"imgs\.tsv:7: image: "):
            evaluate(model, processor, read(files), num_workers=workers)
    # the transparent pictures are read by another way
    original = model_and_processor(tmp_path, protocol="original")
    with pytest.raises(MugeError, match=r"imgs\.tsv:7: image: "):
        evaluate(*original, read(files))
    skipped = read_set(find_files(tmp_path / "set"), on_error="skip")
    assert skipped.skipped["unknown format"] == 1
    assert evaluate(model, processor, skipped).counts["images"] == 13


def test_files_of_a_split_are_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"MR_test_queries\.jsonl with MR_test_imgs\.tsv"):
        find_files(tmp_path, "test")
    for prefix in ("", "valid_", "MR_valid_"):
        for end in ("queries.jsonl", "imgs.tsv"):
            (tmp_path / f"{prefix}{end}").touch()
        assert find_files(tmp_path).queries.name == f"{prefix}queries.jsonl"
        if not prefix:
            with pytest.raises(FileNotFoundError, match="valid_queries"):
                find_files(tmp_path, "valid")


def test_a_protocol_changes_bags_masks_and_nothing_else(tmp_path, place):
    model, processor = model_and_processor(tmp_path, protocol="original")
    dictionary = tmp_path / "entities.txt"
    assert with_protocol(model, processor, "auto") == (model, processor)
    assert with_protocol(model, processor, "original") == (model, processor)
    with pytest.raises(ValueError, match="--dictionary FILE"):
        with_protocol(model, processor, "corrected")
    with pytest.raises(ValueError, match="protocol must be one of"):
        with_protocol(model, processor, "right")
    changed, fresh = with_protocol(model, processor, "corrected", dictionary)
    assert changed.config.protocol == "corrected" and fresh.segmenter.matcher == "leftmost_longest"
    assert model.config.protocol == "original" and processor.segmenter.matcher == "original"
    assert changed.text_proj.weight is model.text_proj.weight
    own, other = (
        evaluate(one, reader, read(place), k_test=6)
        for one, reader in ((model, processor), (changed, fresh))
    )
    assert (own.protocol, other.protocol) == ("original", "corrected")
    # the same as a model that was corrected from the start
    born, reader = model_and_processor(tmp_path, protocol="corrected", temperature=None)
    born.load_state_dict(model.state_dict())
    assert evaluate(born, reader, read(place), k_test=6).metrics == other.metrics
    # and back again
    back = with_protocol(changed, fresh, "original", dictionary)
    assert evaluate(*back, read(place), k_test=6).metrics == own.metrics
