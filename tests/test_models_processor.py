"""Texts and pictures to model inputs, scores and explanations."""

from __future__ import annotations

import copy
import json
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import ENTITIES, tiny_config, tiny_model, write_dictionary, write_tokenizer

from bagformer import BagFormerProcessor, BagSegmenter, reference
from bagformer.models.image_processing_bagformer import BagFormerImageProcessor
from bagformer.models.tokens import MAX_CHARACTERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    write_tokenizer(folder / "tokenizer")
    write_dictionary(folder / "dictionary.txt")
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return make(folder)


def make(folder, dictionary=True, **changes):
    path = folder / "dictionary.txt" if dictionary else None
    return BagFormerProcessor.from_config(tiny_config(**changes), folder / "tokenizer", path)


def test_fields_shapes_and_types(processor):
    inputs = processor(text=["红色手机壳", "a"], images=[Image.new("RGB", (9, 5))] * 2)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 25)
    assert inputs["input_ids"].dtype == torch.int64
    bags = inputs["bag_mask"].shape[1]
    assert inputs["bag_offsets"].shape == (2, bags + 1)
    assert inputs["bag_offsets"].dtype == torch.int32 and inputs["bag_mask"].dtype == torch.bool
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert inputs["pixel_values"].dtype == torch.float32
    output = tiny_model()(**inputs)
    assert output.text_to_image.shape == (2, 2)


def test_special_tokens_and_masks_by_protocol(folder, processor):
    corrected = processor(text="红色手机壳")
    tokens = processor.tokenizer.convert_ids_to_tokens(corrected["input_ids"][0].tolist())
    assert tokens[:8] == ["[CLS]", "红", "色", "手", "机", "壳", "[SEP]", "[PAD]"]
    assert corrected["bag_mask"].sum() == 2
    original = make(folder, protocol="original")(text="红色手机壳")
    assert original["input_ids"][0, 6].item() == 0, "no [SEP]"
    assert corrected["attention_mask"].sum() == 7 and original["attention_mask"].sum() == 6


def test_padding_to_the_longest(processor):
    inputs = processor(text=["红色", "红色手机壳"], padding="longest")
    assert inputs["input_ids"].shape == (2, 7)
    with pytest.raises(ValueError, match="padding must be one of max_length, longest"):
        processor(text=["红"], padding="none")


def test_truncation_is_visible(processor):
    texts = ["红色" * 30, "红色", "红" * 23, "红" * 24]
    inputs = processor(text=texts, return_truncated=True)
    assert inputs["truncated"].tolist() == [True, False, False, True]
    assert inputs["input_ids"][0, -1].item() == processor.tokenizer.sep_token_id
    assert "truncated" not in processor(text=texts)
    with pytest.raises(ValueError, match=r"text\[0\] has more tokens than max_length allows"):
        processor(text=texts, truncation=False)
    assert processor(text="红色红色", max_length=4)["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="leaves no room"):
        processor(text="红", max_length=2)


ODD = ["", " \t\n\u3000", "\x00\x01", "😀👩\u200d👧", "\ud800", "\udfff\ud800a", "\ufffd"]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_strings_have_an_answer(processor, text):
    inputs = processor(text=[text, "红色"])
    assert inputs["input_ids"].shape == (2, 25)
    output = tiny_model().get_text_features(**inputs)
    assert torch.isfinite(output.text_features).all() and torch.isfinite(output.text_cls).all()


def test_lone_surrogates_are_replacement_characters(processor):
    joined = processor(text="a\ud83d\ude00红")
    assert torch.equal(joined["input_ids"], processor(text="a😀红")["input_ids"])
    lone = processor(text="a\ud800红")
    assert torch.equal(lone["input_ids"], processor(text="a\ufffd红")["input_ids"])


def test_an_empty_text_counts_no_bag_and_scores_zero(processor):
    inputs = processor(text=["", "红色"], images=[Image.new("RGB", (4, 4))] * 2)
    assert not inputs["bag_mask"][0].any()
    output = tiny_model()(**inputs)
    assert output.text_to_image[0].tolist() == [0.0, 0.0]


LONG = {
    "words": "红色手机壳 " * 2_000_000,
    "one word": "a" * 10**7,
    "blanks": " " * 10**7,
    "special tokens": "[CLS]" * 2_000_000,
    "controls": "\x00" * 10**7,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_ten_megabytes_are_cut_quickly(processor, text):
    start = time.perf_counter()
    inputs = processor(text=text, return_truncated=True)
    assert time.perf_counter() - start < 5
    assert inputs["truncated"].item() and inputs["input_ids"].shape == (1, 25)


def test_long_texts_have_the_tokens_of_the_whole_text(processor):
    """Read in pieces, a text gives the tokens it would give at once."""
    maker = np.random.default_rng(0)
    alphabet = ["红", "a", "nikes", " ", "\x00", "é", "[SEP]", "。", "b" * 150, "12"]
    tokenizer = processor.tokenizer
    for lengths, size in ((1, 4000), (3, 2000), (40, 400)):
        for _ in range(10):
            words = maker.choice(alphabet, size=size)
            text = "".join(word * int(maker.integers(1, lengths + 1)) for word in words)
            assert 4096 < len(text) < MAX_CHARACTERS
            whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for room in (10, 600):
                got = processor(text=text, max_length=room, padding="longest")["input_ids"][0]
                assert got[1:-1].tolist() == whole[: room - 2]


def test_what_is_no_text_is_refused(processor):
    with pytest.raises(TypeError, match=r"text\[1\] must be a str, got bytes"):
        processor(text=["a", b"b"])
    with pytest.raises(ValueError, match="text is empty"):
        processor(text=[])
    with pytest.raises(ValueError, match="give text, images or both"):
        processor()
    with pytest.raises(ValueError, match="return_tensors"):
        processor(text="a", return_tensors="np")


def test_case_follows_the_tokenizer_and_is_saved(folder, processor, tmp_path):
    assert processor.bag_texts("NIKE鞋") == [["NIKE鞋"]]
    kept = tmp_path / "cased"
    write_tokenizer(kept)
    (kept / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    cased = BagFormerProcessor.from_config(tiny_config(), kept, folder / "dictionary.txt")
    assert cased.bag_texts("NIKE鞋") == [["NIKE", "鞋"]]
    cased.save_pretrained(tmp_path / "saved")
    loaded = BagFormerProcessor.from_pretrained(tmp_path / "saved")
    assert loaded.bag_texts(["NIKE鞋", "nike鞋"]) == [["NIKE", "鞋"], ["nike鞋"]]


def test_texts_of_bags(processor):
    texts = ["玫瑰金手机壳 红色", "", "玫瑰\ud800置物架🙂女"]
    assert processor.bag_texts(texts) == [
        ["玫瑰金", "手机壳", "红色"],
        [],
        ["玫瑰", "置物架", "🙂", "女"],
    ]
    every = processor.bag_texts("红色鞋", counted_only=False, padding="longest")
    assert every == [["[CLS]", "红色", "鞋", "[SEP]"]]
    counts = processor(text=texts)["bag_mask"].sum(dim=1).tolist()
    assert [len(row) for row in processor.bag_texts(texts)] == counts


def test_empty_bags_of_the_original_are_empty_strings(folder):
    original = make(folder, protocol="original")
    found = original.bag_texts("玫瑰红色", counted_only=False, padding="longest")
    assert found == [["[CLS]", "玫瑰", "", "红色", ""]]


def test_without_a_dictionary_every_token_is_a_bag(folder):
    plain = make(folder, dictionary=False)
    assert plain.bag_texts("玫瑰金") == [["玫", "瑰", "金"]]
    made = BagFormerProcessor(plain.image_processor, plain.tokenizer)
    assert made.bag_texts("玫瑰金") == [["玫", "瑰", "金"]]


def test_a_segmenter_of_another_rule_is_refused(folder):
    segmenter = BagSegmenter([[1, 2]], matcher="original")
    with pytest.raises(ValueError, match="segmenter's matcher is 'original'"):
        BagFormerProcessor.from_config(tiny_config(), folder / "tokenizer", segmenter)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert described["bags_sha256"] == processor.segmenter.sha256
    loaded = BagFormerProcessor.from_pretrained(tmp_path)
    texts = ["玫瑰金手机壳", "", "a123"]
    images = [Image.effect_noise((20, 30), 60)] * 3
    ours, theirs = processor(text=texts, images=images), loaded(text=texts, images=images)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert twin.bag_texts(texts) == processor.bag_texts(texts)
    assert "BagFormerProcessor" in repr(loaded)


def damage(path, change):
    described = json.loads(path.read_text(encoding="utf-8"))
    change(described)
    path.write_text(json.dumps(described), encoding="utf-8")


def test_a_changed_bags_file_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    other = BagSegmenter([[5, 6]])
    other.save(tmp_path / "bags.bin")
    with pytest.raises(ValueError, match=r"bags\.bin is not the file that was saved: sha256"):
        BagFormerProcessor.from_pretrained(tmp_path)
    config = tmp_path / "processor_config.json"
    damage(config, lambda described: described.update(bags_file="../bags.bin"))
    with pytest.raises(ValueError, match="must be a plain file name"):
        BagFormerProcessor.from_pretrained(tmp_path)
    damage(config, lambda described: described.pop("bags_sha256"))
    with pytest.raises(ValueError, match="is not a BagFormer processor"):
        BagFormerProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a BagFormer processor"):
        BagFormerProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(OSError, match=r"processor_config\.json"):
        BagFormerProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        BagFormerProcessor.from_pretrained(tmp_path / "nowhere")


def test_retrieval_scores(processor):
    maker = torch.Generator().manual_seed(0)
    queries = [torch.randn(n, 8, generator=maker) for n in (1, 4, 3)]
    passages = [torch.randn(n, 8, generator=maker) for n in (5, 2)]
    wanted = torch.tensor([[(q @ p.t()).amax(dim=1).sum() for p in passages] for q in queries])
    for batch_size in (1, 2, 128):
        got = processor.score_retrieval(queries, passages, batch_size=batch_size)
        torch.testing.assert_close(got, wanted)
    padded = torch.nn.utils.rnn.pad_sequence(queries, batch_first=True)
    torch.testing.assert_close(processor.score_retrieval(padded, passages), wanted)
    half = [one.bfloat16() for one in queries], [one.bfloat16() for one in passages]
    assert processor.score_retrieval(*half).dtype == torch.bfloat16
    assert processor.score_retrieval(*half, output_dtype=torch.float32).dtype == torch.float32
    for bad, message in (
        (([], passages), "query_embeddings is empty"),
        ((queries, [torch.zeros(3)]), r"passage_embeddings\[0\] must be"),
        ((queries, half[1]), "must have one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.score_retrieval(*bad)


def test_scores_of_the_model_and_the_processor_agree(processor):
    images = [Image.new("RGB", (4, 4)), Image.effect_noise((9, 9), 50)]
    inputs = processor(text=["玫瑰金手机壳", "女鞋"], images=images)
    output = tiny_model()(**inputs)
    scores = processor.score_retrieval(output.text_features, output.image_features)
    torch.testing.assert_close(scores, output.text_to_image)


def test_explanation_shows_the_winning_patch(processor):
    inputs = processor(text=["玫瑰金手机壳", ""], images=[Image.effect_noise((64, 64), 80)] * 2)
    with torch.no_grad():
        output = tiny_model()(**inputs)
    found = processor.explain(
        output.text_features, output.image_features, output.patch_grid, output.text_mask
    )
    bags = output.text_mask.shape[1]
    assert found.heatmap.shape == (2, bags, 4, 4) and found.position.shape == (2, bags, 2)
    scores = reference.maxsim_pairs(
        output.text_features,
        output.image_features,
        text_mask=output.text_mask,
        return_argmax=True,
    )
    assert torch.equal(found.best.int(), scores.text_argmax)
    torch.testing.assert_close(found.score.sum(dim=1), scores.text_to_image)
    for row, bag in output.text_mask.nonzero().tolist():
        patch = found.best[row, bag].item()
        if patch == 0:
            assert found.position[row, bag].tolist() == [-1, -1]
            assert found.score[row, bag] == found.cls[row, bag]
        else:
            place = tuple(found.position[row, bag].tolist())
            assert place == divmod(patch - 1, 4)
            assert found.heatmap[row, bag][place] == found.score[row, bag]
    assert (found.best[1] == -1).all() and (found.position[1] == -1).all()
    single = processor.explain(output.text_features[0], output.image_features[0], (4, 4))
    assert single.heatmap.shape == (1, bags, 4, 4)
    with pytest.raises(ValueError, match="needs 16 patches"):
        processor.explain(output.text_features, output.image_features, (3, 5))
    with pytest.raises(ValueError, match="pair them first"):
        processor.explain(output.text_features, output.image_features[:1], (4, 4))


def test_the_names_of_colpali(processor):
    text, image = "玫瑰金", Image.new("RGB", (4, 4))
    assert torch.equal(
        processor.process_queries(text)["input_ids"], processor(text=text)["input_ids"]
    )
    assert "pixel_values" in processor.process_images([image])


def test_entities_of_the_dictionary_are_bags(processor):
    for entity in ENTITIES:
        assert processor.bag_texts(entity) == [[entity]]


def test_token_ids_match_the_original(golden):
    from transformers import BertTokenizer

    texts = json.loads((golden / "offsets_texts.json").read_text(encoding="utf-8"))
    texts = [one["text"] for one in texts]
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer")
    arrays = np.load(golden / "offsets.npz")
    parts = BagFormerImageProcessor(8), tokenizer
    for name, sep in (("train", False), ("readme", True)):
        made = BagFormerProcessor(*parts, sep_token=sep)
        inputs = made(text=texts)
        wanted_ids = torch.from_numpy(arrays[f"ids_{name}"]).long()
        if name == "train":
            assert torch.equal(inputs["input_ids"], wanted_ids)
            attention = torch.from_numpy(arrays["attn_train"]).long()
            assert torch.equal(inputs["attention_mask"], attention)
            continue
        fits = wanted_ids[:, -1] == 0  # the recorded ids are of untruncated texts elsewhere
        assert fits.sum() > 100
        assert torch.equal(inputs["input_ids"][fits], wanted_ids[fits])
