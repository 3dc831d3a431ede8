"""Texts to token ids, with a defined answer for every string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# Longer texts are read from the front, piece by piece, until there are tokens enough.
_FIRST_PIECE = 4096
# Nothing behind this many characters is read; only a text that starts with one endless word or
# endless blanks has not filled its tokens by then.
MAX_CHARACTERS = 1 << 20


class Encoded(NamedTuple):
    """``ids`` with special tokens; ``spans``: where in the text each token lies, None for special
    ones; ``truncated``: whether tokens were left out."""

    ids: list[int]
    spans: list[tuple[int, int] | None]
    truncated: bool


def as_texts(text: Any) -> list[Any]:
    """One text or several to a list that is not empty."""
    if isinstance(text, str):
        return [text]
    if isinstance(text, (bytes, bytearray)) or not hasattr(text, "__iter__"):
        raise TypeError(f"text must be a str or a list of them, got {type(text).__name__}")
    texts = list(text)
    if not texts:
        raise ValueError("text is empty")
    return texts


def as_length(value: Any, default: int, name: str = "max_length") -> int:
    """``value``, an int, or ``default`` where it is None."""
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return value


def check_vocabulary(tokenizer: Any) -> None:
    """Raise ValueError unless the vocabulary is one that texts can be read with.

    transformers makes up a vocabulary of special tokens where a folder holds none, under which
    every word is unknown, and adds those that a file lacks, without which WordPiece fails.
    """
    known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    lacking = [token for token in special if token not in known]
    if lacking:
        raise ValueError(
            f"the tokenizer's vocabulary ({len(known)} tokens) lacks {', '.join(lacking)}: it is "
            "not that of a BERT model"
        )
    if all(token in {*special, "[MASK]"} for token in known):
        raise ValueError(
            "the tokenizer's vocabulary has special tokens alone: its tokenizer.json or vocab.txt "
            "is missing or empty"
        )


def clean(text: Any, name: str) -> str:
    """A string that can be encoded: surrogate pairs are joined, lone surrogates become U+FFFD.

    (BERT's own normaliser then drops U+FFFD, as it drops control characters.)
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    text = text[:MAX_CHARACTERS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _tokenize(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _tokenize_long(tokenizer: Any, text: str, limit: int) -> tuple[list[int], list]:
    """The first tokens of a long text, more than ``limit`` if it has so many, in linear time."""
    longest = max((len(token) for token in tokenizer.all_special_tokens), default=0)
    size = _FIRST_PIECE
    while size < len(text):
        found = _tokenize(tokenizer, [text[:size]])
        ids, spans = found["input_ids"][0], found["offset_mapping"][0]
        words = found.word_ids(0)
        # The cut may have split a special token, and its word may go on behind it (even behind
        # characters that the normaliser drops): neither what reaches the cut nor the word before
        # it is certain.
        keep = len(ids)
        while keep and spans[keep - 1][1] > size - longest:
            keep -= 1
        unsure = words[keep] if keep < len(ids) else words[-1] if ids else None
        while keep and words[keep - 1] == unsure:
            keep -= 1
        if keep > limit:
            return ids[:keep], spans[:keep]
        size *= 4
    found = _tokenize(tokenizer, [text])
    return found["input_ids"][0], found["offset_mapping"][0]


def encode(tokenizer: Any, texts: Sequence[Any], max_length: int, sep_token: bool) -> list[Encoded]:
    """``[CLS] text`` or, with ``sep_token``, ``[CLS] text [SEP]``; at most ``max_length`` tokens.

    Every string has an answer: an empty or blank one is its special tokens alone, and a text of any
    length costs time linear in the part that is read.
    """
    room = max_length - 1 - int(sep_token)
    if room < 1:
        raise ValueError(f"max_length={max_length} leaves no room for text")
    cleaned = [clean(text, f"text[{row}]") for row, text in enumerate(texts)]
    short = [row for row, text in enumerate(cleaned) if len(text) <= _FIRST_PIECE]
    found: dict[int, tuple[list[int], list]] = {}
    if short:
        batch = _tokenize(tokenizer, [cleaned[row] for row in short])
        pairs = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        found = dict(zip(short, pairs, strict=True))
    encoded = []
    for row, text in enumerate(cleaned):
        ids, spans = found[row] if row in found else _tokenize_long(tokenizer, text, room)
        tail = [tokenizer.sep_token_id] if sep_token else []
        encoded.append(
            Encoded(
                [tokenizer.cls_token_id, *ids[:room], *tail],
                [None, *(tuple(span) for span in spans[:room]), *(None for _ in tail)],
                len(ids) > room or len(texts[row]) > MAX_CHARACTERS,
            )
        )
    return encoded
