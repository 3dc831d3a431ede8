"""Dictionaries and rows of token ids for the tests of bags."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

CLS, PAD = 101, 0
_HUGE = 2**31 - 1  # ids from 2**20 on take another way through the alphabet


class Case(NamedTuple):
    """A dictionary and rows of one length."""

    entities: list[tuple[int, ...]]
    rows: list[list[int]]


class Named(NamedTuple):
    """A literal case: the spans of one row by each of the three rules."""

    name: str
    entities: list[tuple[int, ...]]
    ids: list[int]
    leftmost_longest: list[tuple[int, int]]
    original: list[tuple[int, int]]
    backward_max: list[tuple[int, int]]


NAMED = [
    Named("no entity", [], [1, 2], [(0, 1), (1, 2)], [(0, 1), (1, 2)], [(0, 1), (1, 2)]),
    Named("one row, one entity", [(1, 2)], [1, 2], [(0, 2)], [(0, 2), (2, 2)], [(0, 2), (2, 2)]),
    Named(
        "longest wins",
        [(1, 2), (1, 2, 3)],
        [9, 1, 2, 3, 9],
        [(0, 1), (1, 4), (4, 5)],
        [(0, 1), (1, 4), (4, 5)],
        [(0, 1), (1, 4), (4, 5)],
    ),
    Named(
        "no prefix chain, out of the original's reach",
        [(1, 2, 3)],
        [9, 1, 2, 3, 9],
        [(0, 1), (1, 4), (4, 5)],
        [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
        [(0, 1), (1, 4), (4, 5)],
    ),
    Named(
        "leftmost before longest",
        [(1, 2), (2, 3, 4)],
        [1, 2, 3, 4, 9],
        [(0, 2), (2, 3), (3, 4), (4, 5)],
        [(0, 2), (2, 3), (3, 4), (4, 5)],
        [(0, 1), (1, 4), (4, 5)],
    ),
    Named(
        "long try fails, the match inside it stands",
        [(1, 2, 3, 4), (2, 3)],
        [1, 2, 3, 9],
        [(0, 1), (1, 3), (3, 4)],
        [(0, 1), (1, 3), (3, 4)],
        [(0, 1), (1, 3), (3, 4)],
    ),
    Named(
        "long try fails behind a match, the rest is read on",
        [(1, 2), (1, 2, 3, 4, 5, 6), (3, 4), (5, 7)],
        [1, 2, 3, 4, 5, 7],
        [(0, 2), (2, 4), (4, 6)],
        [(0, 2), (2, 2), (2, 4), (4, 4), (4, 6), (6, 6)],
        [(0, 2), (2, 2), (2, 4), (4, 4), (4, 6), (6, 6)],
    ),
    Named(
        "the row ends inside a long try",
        [(1, 2), (1, 2, 3, 4), (2, 3)],
        [9, 1, 2, 3],
        [(0, 1), (1, 3), (3, 4)],
        [(0, 1), (1, 3), (3, 4)],
        [(0, 1), (1, 2), (2, 4), (4, 4)],
    ),
    Named(
        "neighbours: an empty bag in the original",
        [(1, 2), (3, 4)],
        [9, 1, 2, 3, 4, 9],
        [(0, 1), (1, 3), (3, 5), (5, 6)],
        [(0, 1), (1, 3), (3, 3), (3, 5), (5, 6)],
        [(0, 1), (1, 3), (3, 3), (3, 5), (5, 6)],
    ),
    Named(
        "a single first token is lost by the original",
        [(1,), (1, 2)],
        [1, 2, 9],
        [(0, 2), (2, 3)],
        [(0, 1), (1, 2), (2, 3)],
        [(0, 2), (2, 3)],
    ),
    Named(
        "single tokens are spans to backward_max alone",
        [(1,)],
        [9, 1, 1],
        [(0, 1), (1, 2), (2, 3)],
        [(0, 1), (1, 2), (2, 3)],
        [(0, 1), (1, 2), (2, 2), (2, 3), (3, 3)],
    ),
    Named(
        "a single token does not shield the entity inside a failed try",
        [(1,), (1, 2, 3), (2, 4)],
        [1, 2, 4],
        [(0, 1), (1, 3)],
        [(0, 1), (1, 3), (3, 3)],
        [(0, 1), (1, 1), (1, 3), (3, 3)],
    ),
    Named(
        "an entity of equal tokens",
        [(1, 1), (1, 1, 1)],
        [1, 1, 1, 1, 1],
        [(0, 3), (3, 5)],
        [(0, 3), (3, 3), (3, 5), (5, 5)],
        [(0, 2), (2, 2), (2, 5), (5, 5)],
    ),
    Named(
        "the largest id",
        [(_HUGE, 2**20), (5, _HUGE)],
        [5, _HUGE, 2**20],
        [(0, 2), (2, 3)],
        [(0, 2), (2, 3)],
        [(0, 1), (1, 3), (3, 3)],
    ),
]


def random_cases(n_dictionaries: int, n_rows: int, seed: int) -> Iterator[Case]:
    """Small alphabets and short entities, so that matches overlap wherever they can."""
    make = random.Random(seed)
    for _ in range(n_dictionaries):
        letters = make.randint(1, 5)
        ids = make.choice(
            (range(1, 8), (CLS, PAD, 3, 4, 5, 6, 7), (_HUGE, 2**20, 5, 2**20 - 1, 0, 7, 9))
        )
        known, longest = ids[:letters], make.randint(1, 7)
        entities = [
            tuple(make.choice(known) for _ in range(make.randint(1, longest)))
            for _ in range(make.randint(0, 4 * letters))
        ]
        length = make.randint(0, 24)
        rows = [[make.choice(ids[: letters + 1]) for _ in range(length)] for _ in range(n_rows)]
        if make.random() < 0.5:
            rows = [_like_a_text(row, make) for row in rows]
        yield Case(entities, rows)


def _like_a_text(row: list[int], make: random.Random) -> list[int]:
    """[CLS], some content, [PAD] to the end."""
    kept = make.randint(0, len(row))
    return ([CLS, *row[:kept], *[PAD] * len(row)])[: len(row)]


def offsets_of(task: tuple) -> list:
    """For worker processes, which import this module but no test file: ``(segmenter, rows)``."""
    segmenter, rows = task
    return segmenter(rows).offsets.tolist()
