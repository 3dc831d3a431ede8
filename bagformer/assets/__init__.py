"""Files that ship with the package: a tiny model, a sample to search, a vocabulary."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def tiny_model_path() -> Path:
    """Folder of the tiny model, for ``from_pretrained``; examples/train_tiny.py made it."""
    return _FOLDER / "tiny"


def sample_path() -> Path:
    """Folder of the IconPark sample: ``imgs.tsv``, ``queries.jsonl`` and ``entities.txt``."""
    return _FOLDER / "iconpark_sample"


def vocabulary_path() -> Path:
    """bert-base-chinese's ``vocab.txt``: 21,128 WordPiece tokens."""
    return _FOLDER / "vocab.txt"
