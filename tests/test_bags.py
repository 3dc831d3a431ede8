"""What a segmenter takes, what it gives, and what it refuses."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.bag_cases import random_cases

from bagformer import _C, reference
from bagformer.bags import Bags, BagSegmenter

ENTITIES = [(7, 8), (7, 8, 9), (3, 4)]
ROWS = [[101, 7, 8, 9, 3, 4, 0], [101, 5, 3, 4, 7, 8, 0]]


@pytest.fixture
def segmenter():
    return BagSegmenter(ENTITIES, masked_ids=(101, 0))


def test_shapes_and_padding(segmenter):
    bags = segmenter(ROWS)
    assert bags.offsets.dtype == bags.counts.dtype == torch.int32 and bags.mask.dtype == torch.bool
    assert bags.offsets.tolist() == [[0, 1, 4, 6, 7, 7], [0, 1, 2, 4, 6, 7]]
    assert bags.mask.tolist() == [
        [False, True, True, False, False],
        [False, True, True, True, False],
    ]
    assert bags.counts.tolist() == [4, 5]
    assert bags.spans(0) == bags.spans(-2) == [(0, 1), (1, 4), (4, 6), (6, 7)]
    assert len(bags) == 2


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
)
def test_any_integers_with_any_strides(segmenter, dtype):
    want = segmenter(ROWS).offsets
    ids = torch.tensor(ROWS).to(dtype)
    wide = torch.zeros(4, 14, dtype=dtype)
    wide[::2, ::2] = ids
    as_columns = ids.t().contiguous().t()
    for given in (ids, wide[::2, ::2], as_columns, ids.numpy(), ids.numpy()[:, ::-1][:, ::-1]):
        assert torch.equal(segmenter(given).offsets, want)
    one_row = torch.tensor(ROWS[0]).expand(5, -1)
    assert segmenter(one_row).counts.tolist() == [4] * 5
    assert torch.equal(segmenter([torch.tensor(ROWS[0]).numpy(), ROWS[1]]).offsets, want)


@pytest.mark.parametrize("matcher", reference.MATCHERS)
def test_no_rows_and_no_tokens(matcher):
    segmenter = BagSegmenter(ENTITIES, matcher=matcher)
    for rows, shape in (
        ([], (0, 0)),
        ([[]] * 3, (3, 0)),
        (torch.zeros(0, 5, dtype=torch.int64), (0, 5)),
    ):
        bags = segmenter(rows)
        assert bags.offsets.shape == (shape[0], 1) and bags.mask.shape == (shape[0], 0)
        assert bags.counts.tolist() == [0] * shape[0] and not bags.offsets.any()
        assert bags.embedding_bag_offsets().shape == (0,)


def test_an_empty_dictionary_makes_bags_of_one():
    segmenter = BagSegmenter([], masked_ids=[5])
    assert len(segmenter) == 0 and segmenter
    assert segmenter([[4, 5]]).spans(0) == [(0, 1), (1, 2)]
    assert segmenter([[4, 5]]).mask.tolist() == [[True, False]]


def test_repeats_are_one_entity():
    once, twice = BagSegmenter(ENTITIES), BagSegmenter([*reversed(ENTITIES), *ENTITIES])
    assert len(twice) == len(once) == 3
    assert twice.sha256 == once.sha256 != BagSegmenter(ENTITIES[:2]).sha256


@pytest.mark.parametrize("make", [np.array, torch.tensor, list, lambda e: tuple(map(np.int32, e))])
def test_entities_of_any_sequence(make):
    assert BagSegmenter(make(entity) for entity in ENTITIES).sha256 == BagSegmenter(ENTITIES).sha256


def test_more_entities_than_cross_into_cpp_at_once():
    entities = [(1 + k % 300, 1 + k // 300, 5) for k in range(70_000)]
    segmenter = BagSegmenter(iter(entities))
    assert len(segmenter) == 70_000
    assert all(segmenter([list(e)]).spans(0) == [(0, 3)] for e in entities[::997])


@pytest.mark.parametrize("matcher", reference.MATCHERS)
def test_one_huge_entity_and_thousands_of_nested_ones(matcher):
    huge = list(range(1, 200_000))
    bags = BagSegmenter([huge, [5, 6]], matcher=matcher)([huge])
    want = {"leftmost_longest": 1, "original": len(huge) - 1, "backward_max": 2}
    assert bags.counts.tolist() == [want[matcher]]
    nested = BagSegmenter(([1] * k for k in range(1, 2001)), matcher=matcher)
    spans = [span for span in nested([[1] * 3000]).spans(0) if span[0] < span[1]]
    cuts = {
        "leftmost_longest": [(0, 2000), (2000, 3000)],
        "original": [(0, 1), (1, 2000), (2000, 3000)],
        "backward_max": [(0, 1000), (1000, 3000)],
    }
    assert spans == cuts[matcher]


def test_a_builder_that_is_finished_starts_anew():
    builder = _C.BagBuilder(0, [])
    builder.add(np.array([1, 2]), np.array([2]))
    first, second = builder.finish(), builder.finish()
    assert [_C.BagAutomaton(image).n_entities for image in (first, second)] == [1, 0]
    image = bytes(first)
    many = _C.BagAutomaton(image).segment(np.ones((3, 3), np.int64), 2**31 - 1)
    assert many[2].tolist() == [3, 3, 3]


def test_properties_and_text(segmenter):
    assert segmenter.matcher == "leftmost_longest"
    assert segmenter.masked_ids == (0, 101)
    assert repr(segmenter) == "BagSegmenter(3 entities, matcher='leftmost_longest')"
    assert BagSegmenter([], masked_ids=[2**31 - 1, 2**25]).masked_ids == (2**25, 2**31 - 1)


@pytest.mark.parametrize(
    ("entities", "options", "error", "text"),
    [
        ([(1, 2), ()], {}, ValueError, "entity 1 is empty"),
        (
            [(1, 2), (3, -1)],
            {},
            ValueError,
            r"entity 1 holds the token id -1; ids lie in \[0, 2147",
        ),
        ([(2**31,)], {}, ValueError, "entity 0 holds the token id 2147483648"),
        ([(1, 2**70)], {}, ValueError, "an id beyond 64 bits"),
        ([(1, 2), (1.5, 2)], {}, TypeError, r"entity 1 is \(1.5, 2\)"),
        ([(1, 2), 3], {}, TypeError, "entity 1 is 3"),
        ([(1, 2), (1, True)], {}, TypeError, r"entity 1 is \(1, True\)"),
        (["ab"], {}, TypeError, "entity 0 is 'ab'"),
        (
            [],
            {"matcher": "longest"},
            ValueError,
            "matcher must be one of leftmost_longest, original",
        ),
        ([], {"masked_ids": [-1]}, ValueError, "masked_ids must lie in"),
        ([], {"masked_ids": [2**31]}, ValueError, "masked_ids must lie in"),
        ([], {"masked_ids": ["[PAD]"]}, TypeError, r"masked_ids must be ints, got '\[PAD\]'"),
    ],
)
def test_entities_that_are_refused(entities, options, error, text):
    with pytest.raises(error, match=text):
        BagSegmenter(entities, **options)


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([[1, 2], [1, 2], [3]], ValueError, "row 2 has 1 ids, row 0 has 2"),
        ([1, 2], TypeError, "row 0 is 1"),
        (["ab"], TypeError, "row 0 is 'ab'"),
        ([[1, 2.5]], TypeError, "must hold integers, got float64"),
        ([[True, False]], TypeError, "must hold integers, got bool"),
        ([[1, None]], TypeError, "must hold integers, got object"),
        ([[[1], [2]]], ValueError, r"must be \[B, T\], got shape \[1, 2, 1\]"),
        (torch.zeros(2, 2), TypeError, "must hold integers, got float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"must be \[B, T\], got shape \[2\]"),
        (
            [[1, 2], [3, -1]],
            ValueError,
            r"input_ids: row 1 holds a token id outside \[0, 2147483648\)",
        ),
        ([[1, 2**31]], ValueError, "row 0 holds a token id outside"),
        (np.array([[2**63]], np.uint64), ValueError, "row 0 holds a token id outside"),
        (
            torch.tensor([[1], [-100]], dtype=torch.int8),
            ValueError,
            "row 1 holds a token id outside",
        ),
    ],
)
def test_ids_that_are_refused(segmenter, ids, error, text):
    with pytest.raises(error, match=text):
        segmenter(ids)


@pytest.mark.parametrize("n_threads", [1, 4])
def test_the_first_bad_row_is_named(segmenter, n_threads):
    ids = torch.ones(5000, 3, dtype=torch.int64)
    ids[[4999, 3333, 2718]] = -1
    with pytest.raises(ValueError, match="row 2718 "):
        segmenter(ids, n_threads=n_threads)


def test_n_threads_must_be_positive(segmenter):
    with pytest.raises(ValueError, match="n_threads must be at least 1, got 0"):
        segmenter(ROWS, n_threads=0)


@pytest.mark.parametrize("matcher", reference.MATCHERS)
def test_embedding_bag_is_bag_pool(matcher):
    n_empty = 0
    for entities, rows in random_cases(60, n_rows=5, seed=23):
        if not rows[0]:
            continue
        bags = BagSegmenter(entities, matcher=matcher)(rows)
        batch, tokens, width = len(rows), len(rows[0]), 4
        hidden = torch.randn(batch, tokens, width, dtype=torch.float64)
        pooled = F.embedding_bag(
            torch.arange(batch * tokens),
            hidden.view(-1, width),
            bags.embedding_bag_offsets(),
            mode="sum",
        )
        want = reference.bag_pool(hidden, bags.offsets)
        torch.testing.assert_close(pooled.view(want.shape), want, rtol=1e-12, atol=1e-12)
        n_empty += sum(start == end for row in range(batch) for start, end in bags.spans(row))
    assert (n_empty > 0) == (matcher != "leftmost_longest")


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"offsets": [[0, 1]]}, TypeError, "offsets must be a torch.int32 tensor, got list"),
        ({"offsets": torch.zeros(2, 3)}, TypeError, "offsets must be .* got torch.float32"),
        ({"mask": torch.ones(2, 2)}, TypeError, "mask must be a torch.bool tensor"),
        ({"counts": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "counts must have 1 axes"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "one less than"),
        ({"counts": torch.zeros(3, dtype=torch.int32)}, ValueError, "one less than"),
        (
            {"mask": torch.ones(2, 2, dtype=torch.bool, device="meta")},
            ValueError,
            "mask is on meta",
        ),
    ],
)
def test_fields_that_do_not_fit(fields, error, text):
    good = {
        "offsets": torch.tensor([[0, 1, 2], [0, 2, 2]], dtype=torch.int32),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "counts": torch.tensor([2, 1], dtype=torch.int32),
    }
    assert Bags(**good).spans(1) == [(0, 2)]
    with pytest.raises(error, match=text):
        Bags(**(good | fields))


def test_moving_bags_and_asking_for_a_missing_row(segmenter):
    bags = segmenter(ROWS)
    assert bags.to("meta").offsets.device.type == "meta"
    assert torch.equal(bags.to("cpu").offsets, bags.offsets)
    with pytest.raises(IndexError, match=r"row must lie in \[0, 2\), got 2"):
        bags.spans(2)


def test_threads_share_a_segmenter():
    entities, rows = next(c for c in random_cases(50, n_rows=3000, seed=9) if len(c.rows[0]) > 9)
    segmenter = BagSegmenter(entities)
    want = segmenter(rows, n_threads=1).offsets
    same = []

    def work():
        same.extend(torch.equal(segmenter(rows, n_threads=1).offsets, want) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 20


def test_pickled_by_value_without_a_file(segmenter):
    again = pickle.loads(pickle.dumps(segmenter))
    assert again.sha256 == segmenter.sha256
    assert torch.equal(again(ROWS).offsets, segmenter(ROWS).offsets)


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">i8", ">u4", "<i4"])
def test_byte_order_does_not_matter(segmenter, dtype):
    assert torch.equal(segmenter(np.array(ROWS, dtype)).offsets, segmenter(ROWS).offsets)


WRONG_IDS = [
    (torch.ones(1, 2, dtype=torch.int64, device="meta"), ValueError, "a tensor on the device meta"),
    (torch.ones(1, 2, dtype=torch.int64).to_sparse(), TypeError, "dense tensor, got layout"),
    (
        torch.nested.nested_tensor([torch.tensor([1, 2])], layout=torch.jagged),
        TypeError,
        "dense tensor, got layout torch.jagged",
    ),
    (5, TypeError, "a tensor or rows of ints, got int"),
    (None, TypeError, "a tensor or rows of ints, got NoneType"),
    ([[1], [2**70]], ValueError, r"row 1 holds a token id outside \[0, 2147483648\)"),
    ([[2**63, -1]], ValueError, r"row 0 holds a token id outside \[0, 2147483648\)"),
    (np.broadcast_to(np.int8(1), (1, 2**30)), ValueError, "fewer than 2.30 - 1 ids"),
    # three words of bits a row: 2**64 + 2 of them
    (np.broadcast_to(np.int8(1), (0x5555555555555556, 1)), ValueError, "too many ids"),
    (torch.ones(1, 2, dtype=torch.bfloat16), TypeError, "must hold integers, got bfloat16"),
    (np.ma.masked_array([[7, 8]], [[1, 0]]), TypeError, "a plain array, got one with a mask"),
]


@pytest.mark.parametrize("ids,error,message", WRONG_IDS)
def test_ids_that_are_none_name_the_argument(segmenter, ids, error, message):
    with pytest.raises(error, match=f"^input_ids.*{message}"):
        segmenter(ids)


@pytest.mark.parametrize("n_threads", [2.0, "2", True])
def test_threads_are_an_int(segmenter, n_threads):
    with pytest.raises(TypeError, match=r"^n_threads must be an int, got"):
        segmenter(ROWS, n_threads=n_threads)


def test_arguments_that_cannot_be_iterated_are_named():
    with pytest.raises(TypeError, match=r"^entities must be an iterable .* got NoneType"):
        BagSegmenter(None)
    with pytest.raises(TypeError, match=r"^masked_ids must be an iterable .* got int"):
        BagSegmenter([], masked_ids=3)
