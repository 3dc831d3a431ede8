"""The C++ matchers against plain Python and against pyahocorasick, on dense random cases."""

from __future__ import annotations

import random

import ahocorasick
import pytest
import torch
from support.bag_cases import CLS, NAMED, PAD, random_cases

from bagformer import reference
from bagformer.bags import BagSegmenter

MASKED = (CLS, PAD)


@pytest.mark.parametrize("matcher", reference.MATCHERS)
@pytest.mark.parametrize("case", NAMED, ids=lambda case: case.name)
def test_named(case, matcher):
    bags = BagSegmenter(case.entities, matcher=matcher)([case.ids])
    assert bags.spans(0) == getattr(case, matcher)
    assert reference.segment([case.ids], case.entities, matcher=matcher)[0].tolist() == (
        bags.offsets.tolist()
    )


@pytest.mark.parametrize(
    ("matcher", "n_dictionaries"),
    [("leftmost_longest", 1200), ("original", 400), ("backward_max", 400)],
)
def test_equals_plain_python(matcher, n_dictionaries):
    n_cases = 0
    for entities, rows in random_cases(n_dictionaries, n_rows=60, seed=len(matcher)):
        bags = BagSegmenter(entities, matcher=matcher, masked_ids=MASKED)(rows)
        offsets, mask, counts = reference.segment(
            rows, entities, matcher=matcher, masked_ids=MASKED
        )
        assert torch.equal(bags.offsets, offsets), (entities, rows)
        assert torch.equal(bags.mask, mask), (entities, rows)
        assert torch.equal(bags.counts, counts), (entities, rows)
        n_cases += len(rows)
    assert n_cases == 60 * n_dictionaries


def automaton_of(entities):
    automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS, ahocorasick.KEY_SEQUENCE)
    for entity in entities:
        automaton.add_word(entity, len(entity))
    automaton.make_automaton()
    return automaton


def spans_of(matches):
    return [(end + 1 - length, end + 1) for end, length in matches]


def starts_of(spans, length):
    inside = {token for start, end in spans for token in range(start + 1, end)}
    return [token for token in range(length) if token not in inside]


def leftmost_longest_of(spans):
    """Choose from all occurrences: the earliest start, there the longest, and on from its end."""
    chosen, free_from = [], 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= free_from:
            chosen.append((start, end))
            free_from = end
    return chosen


@pytest.mark.parametrize(
    ("entities", "row", "missed"),
    [
        ([(1, 2, 2, 3), (2, 2)], (1, 2, 2), (1, 3)),
        ([(1, 1, 7, 8, 2), (1, 7, 8, 1), (7, 8)], (1, 1, 7, 8, 9), (2, 4)),
    ],
    ids=["at the end of the row", "behind two failures"],
)
def test_what_iter_long_misses(entities, row, missed):
    """iter_long of pyahocorasick 2.3.1 loses matches that its own iter finds; ours keeps them."""
    automaton = automaton_of(entities)
    assert list(automaton.iter_long(row)) == []
    assert spans_of(automaton.iter(row)) == [missed]
    assert missed in BagSegmenter(entities)([row]).spans(0)


def test_equals_pyahocorasick():
    """Against the choice from all its occurrences; iter_long makes the same but for its misses."""
    n_cases = n_missed = 0
    for entities, rows in random_cases(2300, n_rows=60, seed=7):
        if not entities or not rows[0]:
            continue
        automaton = automaton_of(entities)
        bags = BagSegmenter(entities)(rows)
        for row, offsets, count in zip(
            rows, bags.offsets.tolist(), bags.counts.tolist(), strict=True
        ):
            chosen = leftmost_longest_of(spans_of(automaton.iter(tuple(row))))
            assert offsets[:count] == starts_of(chosen, len(row)), (entities, row)
            n_missed += spans_of(automaton.iter_long(tuple(row))) != chosen
            n_cases += 1
    assert n_cases > 100_000
    assert n_missed < n_cases / 100


def test_a_text_alone_in_any_batch_in_any_order():
    shuffle = random.Random(3)
    for entities, rows in random_cases(60, n_rows=40, seed=11):
        segmenter = BagSegmenter(entities, masked_ids=MASKED)
        alone = [(segmenter([row]).spans(0), segmenter([row]).mask[0].tolist()) for row in rows]
        for size in (2, 7, 40):
            order = shuffle.sample(range(len(rows)), size)
            bags = segmenter([rows[k] for k in order])
            for place, k in enumerate(order):
                spans, mask = alone[k]
                assert bags.spans(place) == spans
                assert bags.mask[place, : len(spans)].tolist() == mask
                assert not bags.mask[place, len(spans) :].any()


@pytest.mark.parametrize("matcher", reference.MATCHERS)
def test_threads_change_nothing(matcher):
    entities, rows = next(c for c in random_cases(50, n_rows=4000, seed=5) if len(c.rows[0]) > 9)
    segmenter = BagSegmenter(entities, matcher=matcher, masked_ids=MASKED)
    one = segmenter(rows, n_threads=1)
    for n_threads in (2, 3, 7):
        many = segmenter(rows, n_threads=n_threads)
        for field in ("offsets", "mask", "counts"):
            assert torch.equal(getattr(one, field), getattr(many, field))


def test_long_rows_cross_every_word():
    """Bits of bags are kept in words of 64 tokens; an entity over their border joins both."""
    entities = [tuple(range(1, 131)), (5, 6), (200, 201)]
    for at in (0, 1, 61, 62, 63, 64, 65, 127, 128):
        for length in (at + 2, at + 3, 191, 192, 193):
            row = [9] * length
            row[at : at + 2] = [200, 201]
            for matcher in reference.MATCHERS:
                got = BagSegmenter(entities, matcher=matcher)([row]).offsets
                assert torch.equal(got, reference.segment([row], entities, matcher=matcher)[0])
    row = [9, 9, *range(1, 131), 9]
    assert BagSegmenter(entities)([row]).spans(0) == [(0, 1), (1, 2), (2, 132), (132, 133)]
