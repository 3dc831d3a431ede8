"""What the tests of compat share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.models import write_dictionary, write_tokenizer
from transformers import BertTokenizer

from bagformer import BagSegmenter

_ENTITIES: dict[str, list[list[int]]] = {}


def make_tokenizer(folder: Path) -> Any:
    """A small tokenizer with a dictionary beside it, under ``.dictionary``."""
    made = BertTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    made.dictionary = write_dictionary(folder / "dictionary.txt")
    return made


def read_once(path: str, tokenizer: Any, matcher: str, masked_tokens: Any) -> BagSegmenter:
    """In place of ``BagSegmenter.from_dictionary``: the original's dictionary takes seconds to
    tokenise, so it is done once for all tests."""
    key = f"{path} {tokenizer.name_or_path}"
    if key not in _ENTITIES:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        _ENTITIES[key] = tokenizer(lines, add_special_tokens=False)["input_ids"]
    masked = tokenizer.convert_tokens_to_ids(list(masked_tokens))
    return BagSegmenter(_ENTITIES[key], matcher=matcher, masked_ids=masked)
