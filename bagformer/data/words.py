"""Words that queries are cut into."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHORTEST = 2


def entity_words(texts: Iterable[str]) -> list[str]:
    """Sorted words of a set of texts, without a word list from elsewhere.

    A text of up to three characters is a word. A longer one is cut where a text of the set begins
    or ends it and at least two characters remain (高领毛衣, because 毛衣 is a text: 高领 and 毛衣);
    its pieces are words then and it is not, so that a compound query has one bag to a part and not
    one bag in all. A longer one that cannot be cut is a word. Single characters are left out: they
    are bags of one without being listed.
    """
    known = {part for text in texts for part in re.split(r"[\s\-_/&]+", text)}
    known = {part for part in known if len(part) >= _SHORTEST}
    words: set[str] = set()
    for text in sorted(known):
        words.update(_pieces(text, known))
    return sorted(words)


def _pieces(text: str, known: set[str]) -> list[str]:
    if len(text) < 2 * _SHORTEST or text.isascii():
        return [text]
    # the longest known part wins, and of equally long ones the last: the head noun ends a compound
    for size in range(len(text) - _SHORTEST, _SHORTEST - 1, -1):
        if text[-size:] in known:
            return [*_pieces(text[:-size], known), *_pieces(text[-size:], known)]
        if text[:size] in known:
            return [*_pieces(text[:size], known), *_pieces(text[size:], known)]
    return [text]
