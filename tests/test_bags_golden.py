"""The two compatible matchers against the outputs of the original code, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bagformer.bags import BagSegmenter

HELPERS = {"fwd": "original", "bmm": "backward_max"}
SOURCES = ("train", "readme", "unpad", "nocls")
MASKED = (0, 101)


def _ragged(arrays, name):
    ends = np.cumsum(arrays[f"{name}_len"])
    return [part.tolist() for part in np.split(arrays[f"{name}_flat"], ends[:-1])]


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "offsets.npz") as file:
        return dict(file)


class Remembering:
    """Tokenises the dictionary once for both helpers."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}
        self.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids
        self.unk_token, self.unk_token_id = tokenizer.unk_token, tokenizer.unk_token_id

    def __call__(self, texts, **options):
        if texts[0] not in self.known:
            self.known[texts[0]] = {"input_ids": self.tokenizer(texts, **options)["input_ids"]}
        return self.known[texts[0]]


@pytest.fixture(scope="module")
def segmenters(golden, original_data):
    from transformers import BertTokenizer

    tokenizer = Remembering(
        BertTokenizer(str(golden / "tokenizer" / "vocab.txt"), do_lower_case=False)
    )
    path = original_data / "entity_dict_20220507"
    made = {
        helper: BagSegmenter.from_dictionary(path, tokenizer, matcher)
        for helper, matcher in HELPERS.items()
    }
    facts = json.loads((golden / "tokenizer" / "facts.json").read_text())
    for segmenter in made.values():
        assert segmenter.report.lines == facts["dictionary_lines"]
        assert len(segmenter) == facts["distinct_id_keys_with_golden_tokenizer"]
    return made


def _rows(arrays, source):
    if source in ("train", "readme"):
        return arrays[f"ids_{source}"].tolist()
    return _ragged(arrays, f"ids_{source}")


def starts_and_mask(segmenter, row):
    bags = segmenter([row])
    assert bags.offsets[0, -1] == len(row)
    return bags.offsets[0, :-1].tolist(), bags.mask[0].int().tolist()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("helper", HELPERS)
def test_single_rows(arrays, segmenters, helper, source):
    rows = _rows(arrays, source)
    offsets = _ragged(arrays, f"{helper}_offsets_{source}")
    masks = _ragged(arrays, f"{helper}_mask_{source}")
    assert len(rows) == len(offsets) == len(masks) > 100
    for row, want, mask in zip(rows, offsets, masks, strict=True):
        assert starts_and_mask(segmenters[helper], row) == (want, mask), row


def test_batches_are_cut_to_the_shortest_row(golden, arrays, segmenters):
    batches = json.loads((golden / "offsets_process.json").read_text())
    assert len(batches) > 50
    for batch in batches:
        rows = torch.tensor([_rows(arrays, batch["source"])[row] for row in batch["rows"]])
        bags = segmenters[batch["helper"]](rows)
        assert bags.counts.tolist() == [batch["min_len"]] * len(rows)
        assert bags.embedding_bag_offsets().tolist() == batch["offsets"], batch["tag"]
        masks = ["".join("01"[bit] for bit in row) for row in bags.mask.tolist()]
        assert masks == batch["mask"], batch["tag"]


def test_stress(golden):
    cases = json.loads((golden / "offsets_stress.json").read_text())
    assert len(cases) >= 10
    for case in cases:
        full = [row for row in case["rows"] if len(row) == 25][:8]
        for helper, matcher in HELPERS.items():
            segmenter = BagSegmenter(case["dict"], matcher=matcher, masked_ids=MASKED)
            for row, want in zip(case["rows"], case[helper], strict=True):
                assert starts_and_mask(segmenter, row)[0] == want, (case["dict"], row)
            process = case[f"{helper}_process_first8_of_len25"]
            bags = segmenter(full)
            assert bags.embedding_bag_offsets().tolist() == process["offsets"]
            if "mask" in process:
                masks = ["".join("01"[bit] for bit in row) for row in bags.mask.tolist()]
                assert masks == process["mask"]
