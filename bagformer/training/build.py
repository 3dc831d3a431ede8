"""Make or load the model and the processor of a run."""

from __future__ import annotations

import json
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertTokenizer

from bagformer.assets import vocabulary_path
from bagformer.models.configuration_bagformer import BagFormerConfig, BagFormerVisionConfig
from bagformer.models.modeling_bagformer import BagFormerForRetrieval
from bagformer.models.processing_bagformer import CONFIG_FILE, BagFormerProcessor
from bagformer.models.tokens import check_vocabulary
from bagformer.training import seeds
from bagformer.training.config import ConfigError, ProcessorConfig, TrainConfig

# Keys of the original's BERT file that its own code reads.
_ORIGINAL_ONLY = ("encoder_width", "add_cross_attention")


def _located(config: TrainConfig, name: str) -> Path:
    path = Path(config.folder) / str(getattr(config.processor, name))
    if not path.exists():
        raise FileNotFoundError(f"processor.{name}: no such file: {path}")
    return path


def _tokenizer(config: TrainConfig) -> BertTokenizer:
    if config.processor.vocabulary is None:
        return BertTokenizer(vocab=str(vocabulary_path()), do_lower_case=True)
    path = _located(config, "vocabulary")
    if path.is_dir():
        tokenizer = BertTokenizer.from_pretrained(str(path), local_files_only=True)
    else:
        tokenizer = BertTokenizer(vocab=str(path), do_lower_case=True)
    check_vocabulary(tokenizer)
    return tokenizer


def _check_names(fields: dict[str, Any], kind: Any, path: str) -> None:
    # transformers would keep a misspelt field as an attribute without a meaning
    known = [*kind.__dataclass_fields__, "kwargs"]
    for name in fields:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}.{name}: unknown key, the nearest known one is {near!r}")


def model_config(fields: dict[str, Any], vocabulary_size: int) -> BagFormerConfig:
    """The model's configuration; ``text_config`` may name a JSON file, as the original's does."""
    fields = deepcopy(fields)
    text = fields.get("text_config")
    if isinstance(text, str):
        if not Path(text).is_file():
            raise FileNotFoundError(f"model.text_config: no such file: {text}")
        text = json.loads(Path(text).read_text(encoding="utf-8"))
        text = {key: value for key, value in text.items() if key not in _ORIGINAL_ONLY}
        if "fusion_layer" in text:
            fields.setdefault("fusion_layer", text.pop("fusion_layer"))
    _check_names(fields, BagFormerConfig, "model")
    _check_names(fields.get("vision_config") or {}, BagFormerVisionConfig, "model.vision_config")
    if isinstance(fields.get("text_config"), dict):
        _check_names(text or {}, BertConfig, "model.text_config")
    fields["text_config"] = {"vocab_size": vocabulary_size, **(text or {})}
    try:
        made = BagFormerConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    if made.text_config.vocab_size < vocabulary_size:
        raise ConfigError(
            f"model.text_config.vocab_size is {made.text_config.vocab_size}, the vocabulary has "
            f"{vocabulary_size} tokens"
        )
    return made


def build(config: TrainConfig) -> tuple[BagFormerForRetrieval, BagFormerProcessor]:
    """Model and processor, the same for the same seed.

    Raises FileNotFoundError and ConfigError, naming the key.
    """
    if isinstance(config.model, str):
        folder = Path(config.model)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"model: {folder} is no model folder: it has no config.json (convert a checkpoint "
                "with `bagformer convert`, or give the fields of a new model)"
            )
        model = BagFormerForRetrieval.from_pretrained(str(folder), local_files_only=True)
        if not (folder / CONFIG_FILE).is_file():
            return model, _processor(config, model.config, _tokenizer(config))
        own = BagFormerProcessor.from_pretrained(str(folder))
        if config.processor == ProcessorConfig():
            return model, own
        tokenizer = _tokenizer(config) if config.processor.vocabulary else own.tokenizer
        return model, _processor(config, model.config, tokenizer)
    tokenizer = _tokenizer(config)
    made = model_config(config.model, len(tokenizer))
    seeds.start(config.seed)
    return BagFormerForRetrieval(made), _processor(config, made, tokenizer)


def _processor(
    config: TrainConfig, made: BagFormerConfig, tokenizer: BertTokenizer
) -> BagFormerProcessor:
    words = None
    if config.processor.dictionary is not None:
        words = _located(config, "dictionary")
    return BagFormerProcessor.from_config(made, tokenizer, words)
