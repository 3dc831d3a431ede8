"""Others that find a dictionary's entities in rows of token ids, for segmentation.py.

A rival has ``build(entities)``, and of what that gives ``prepare(row)``, its own form of a row,
``starts(row)``, where bags start, and ``walk(rows)``, which is timed: its own matching alone,
without making bags. Two of them match strings: a token id is then one code point, which is done
before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

Entities = Sequence[tuple[int, ...]]
_SURROGATES = 0xD800, 0xE000
_CODE_POINTS = 0x110000


def as_text(ids: Sequence[int]) -> str:
    """One code point a token, never a surrogate."""
    low, high = _SURROGATES
    return "".join(chr(token if token < low else token + high - low) for token in ids)


def starts_of(spans: list[tuple[int, int]], length: int) -> list[int]:
    """Bags start at every token that lies not inside one of the spans."""
    inside = {token for start, end in spans for token in range(start + 1, end)}
    return [token for token in range(length) if token not in inside]


def longest_of(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leftmost-longest choice from all occurrences."""
    chosen, free_from = [], 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= free_from:
            chosen.append((start, end))
            free_from = end
    return chosen


class PyAhoCorasick:
    """``iter_long`` is timed; parity is of ``iter``, since iter_long 2.3.1 misses some matches."""

    package = "pyahocorasick"

    def __init__(self, entities: Entities) -> None:
        import ahocorasick

        self.automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS, ahocorasick.KEY_SEQUENCE)
        for entity in entities:
            self.automaton.add_word(entity, len(entity))
        self.automaton.make_automaton()

    prepare = staticmethod(tuple)

    def starts(self, row: tuple[int, ...]) -> list[int]:
        spans = [(end + 1 - length, end + 1) for end, length in self.automaton.iter(row)]
        return starts_of(longest_of(spans), len(row))

    def walk(self, rows: list[tuple[int, ...]]) -> None:
        for row in rows:
            for _ in self.automaton.iter_long(row):
                pass


class AhoCorasickRs:
    """The Rust crate's leftmost-longest search; it chooses its own kind of automaton."""

    package = "ahocorasick-rs"

    def __init__(self, entities: Entities) -> None:
        from ahocorasick_rs import AhoCorasick, MatchKind

        self.automaton = AhoCorasick(
            map(as_text, entities), matchkind=MatchKind.LeftmostLongest, store_patterns=False
        )

    prepare = staticmethod(as_text)

    def starts(self, row: str) -> list[int]:
        found = self.automaton.find_matches_as_indexes(row)
        return starts_of([(start, end) for _, start, end in found], len(row))

    def walk(self, rows: list[str]) -> None:
        for row in rows:
            self.automaton.find_matches_as_indexes(row)


class Jieba:
    """The dictionary walk of ``jieba.Tokenizer.get_DAG``: from each token, every entity there.

    Its prefix dictionary is filled as jieba fills it, with our entities in place of its own.
    """

    package = "jieba"

    def __init__(self, entities: Entities) -> None:
        import jieba

        self.tokenizer = jieba.Tokenizer()
        known = self.tokenizer.FREQ
        for word in map(as_text, entities):
            known[word] = 1
            for end in range(1, len(word)):
                known.setdefault(word[:end], 0)
        self.tokenizer.initialized = True

    prepare = staticmethod(as_text)

    def starts(self, row: str) -> list[int]:
        ends = self.tokenizer.get_DAG(row)
        found, token = [], 0
        while token < len(row):
            found.append(token)
            token = max(ends[token]) + 1
        return found

    def walk(self, rows: list[str]) -> None:
        for row in rows:
            self.tokenizer.get_DAG(row)


RIVALS: tuple[Callable[[Entities], Any], ...] = (PyAhoCorasick, AhoCorasickRs, Jieba)


def available(entities: Entities) -> tuple[list[Any], dict[str, str]]:
    """The classes whose package is here, and by package why another one is skipped."""
    usable, skipped = [], {}
    for rival in RIVALS:
        name = rival.package
        try:
            version(name)
            rival([(1, 2)])
        except Exception as error:  # a package that is missing or broken is reported, not timed
            skipped[name] = f"{type(error).__name__}: {error}"
            continue
        if max(map(max, entities)) >= _CODE_POINTS - 0x800 and rival is not PyAhoCorasick:
            skipped[name] = "a token id is larger than any code point"
            continue
        usable.append(rival)
    return usable, skipped
