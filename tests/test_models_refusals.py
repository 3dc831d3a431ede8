"""What processors refuse: folders with something missing, and arguments of a wrong kind."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.models import tiny_config, write_dictionary, write_tokenizer

from bagformer import BagFormerProcessor
from bagformer.models.processing_bagformer import CONFIG_FILE


@pytest.fixture
def processor(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    dictionary = write_dictionary(tmp_path / "dictionary.txt")
    return BagFormerProcessor.from_config(tiny_config(), tokenizer, dictionary)


def test_a_vocabulary_that_is_missing_is_not_made_up(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="special tokens alone: its tokenizer"):
        BagFormerProcessor.from_pretrained(tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="special tokens alone: its tokenizer"):
        BagFormerProcessor.from_config(tiny_config(), tmp_path / "empty")


def test_a_vocabulary_of_something_else_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "other")
    (folder / "vocab.txt").write_text("red\ngreen\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"\(2 tokens\) lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
        BagFormerProcessor.from_config(tiny_config(), folder)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"bags_file": 5}, OSError, "named 5"),
        ({"max_text_length": "25"}, TypeError, "max_text_length must be an int, got '25'"),
        ({"max_text_length": 25.5}, TypeError, "max_text_length must be an int, got 25.5"),
        ({"sep_token": "no"}, TypeError, "sep_token must be True or False, got 'no'"),
    ],
)
def test_settings_of_a_saved_processor_are_checked(processor, tmp_path, changes, error, message):
    processor.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / CONFIG_FILE
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**described, **changes}), encoding="utf-8")
    with pytest.raises(error, match=message):
        BagFormerProcessor.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"text": 5}, TypeError, "text must be a str or a list of them, got int"),
        ({"text": b"ab"}, TypeError, "text must be a str or a list of them, got bytes"),
        ({"text": "a", "max_length": 0}, ValueError, "max_length=0 leaves no room"),
        ({"text": "a", "max_length": 5.5}, TypeError, "max_length must be an int, got 5.5"),
        ({"images": Image.new("RGB", (0, 0))}, ValueError, r"images\[0\] has no pixels"),
    ],
)
def test_arguments_are_checked(processor, options, error, message):
    with pytest.raises(error, match=message):
        processor(**options)
