"""The settings file of the original's train_muge.py."""

from __future__ import annotations

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from bagformer.data.records import write_whole
from bagformer.data.yaml12 import Loader

SPLITS = ("train", "valid", "test")
FILES = tuple(f"{split}_{side}_file" for split in SPLITS for side in ("query", "image"))
# Values that the original's file has; what is not here must be given.
DEFAULTS: dict[str, Any] = {
    "dataset": "muge",
    "image_res": 256,
    "batch_size_train": 32,
    "batch_size_test": 64,
    "num_workers_train": 4,
    "num_workers_test": 0,
    "queue_size": 65536,
    "momentum": 0.995,
    "vision_width": 768,
    "vision_heads": None,
    "embed_dim": 256,
    "temp": 0.07,
    "k_test": 256,
    "fusion_strategy": "late_fusion",
    "alpha": 0.0,
    "distill": False,
    "warm_up": True,
    "optimizer": {"opt": "adamW", "lr": 1e-5, "weight_decay": 0.02},
    "schedular": {
        "sched": "cosine",
        "lr": 1e-4,
        "epochs": 6,
        "min_lr": 0,
        "decay_rate": 1,
        "warmup_lr": 1e-5,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
    },
}
NEEDED = ("bert_config", "entity_dict_path")
FUSIONS = {"late_fusion": "late", "early_fusion": "early"}
# Numbers by dotted key: what is expected, and whether a finite one is that.
_ABOVE = ("a number above 0", lambda value: value > 0)
_FROM = ("a number of at least 0", lambda value: value >= 0)
_SHARE = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
_NUMBERS = {
    "momentum": _SHARE,
    "temp": _ABOVE,
    "alpha": _SHARE,
    "optimizer.lr": _ABOVE,
    "optimizer.weight_decay": _FROM,
    "schedular.lr": _FROM,
    "schedular.min_lr": _FROM,
    "schedular.decay_rate": _FROM,
    "schedular.warmup_lr": _FROM,
}
_WHOLE = {"schedular.epochs": 1, "schedular.warmup_epochs": 0, "schedular.cooldown_epochs": 0}
_WHOLE |= {"queue_size": 0, "k_test": 0, "num_workers_train": 0, "num_workers_test": 0}
_COUNTS = ("image_res", "batch_size_train", "batch_size_test", "vision_width", "embed_dim")


def unknown_keys(path: Path, given: dict[str, Any]) -> list[str]:
    """Keys that nothing here reads. One that is nearly a known key is a mistake: ValueError."""
    known = [*DEFAULTS, *FILES, *NEEDED]
    unknown = [str(name) for name in given if name not in known]
    for name in unknown:
        if near := get_close_matches(name, known, n=1, cutoff=0.85):
            raise ValueError(f"{path}: unknown key {name!r}, did you mean {near[0]!r}?")
    for section in ("optimizer", "schedular"):
        inner = given.get(section)
        if isinstance(inner, dict):
            unknown += [f"{section}.{name}" for name in inner if name not in DEFAULTS[section]]
    return unknown


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in ``path``, completed by the original's values and checked.

    Adds ``vision_heads``, the heads of the picture encoder: the original has 12 for its 768, so one
    per 64 of ``vision_width``. Raises FileNotFoundError, or ValueError naming the file and the key.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"--config: there is no file {place}")
    try:
        given = yaml.load(place.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{place}: expected keys and values, got {type(given).__name__}")
    unknown_keys(place, given)
    for name in ("optimizer", "schedular"):
        if not isinstance(given.get(name, {}), dict):
            raise ValueError(f"{place}: {name}: expected keys and values, got {given[name]!r}")
    config = {**DEFAULTS, **given}
    for name in ("optimizer", "schedular"):
        config[name] = {**DEFAULTS[name], **config[name]}
    for name, least in {**_WHOLE, **dict.fromkeys(_COUNTS, 1)}.items():
        _whole(place, config, name, least)
    for name, (expected, good) in _NUMBERS.items():
        value = _value(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not good(value):
            raise ValueError(f"{place}: {name}: expected {expected}, got {value!r}")
    if config["fusion_strategy"] not in FUSIONS:
        raise ValueError(
            f"{place}: fusion_strategy: expected {' or '.join(FUSIONS)}, "
            f"got {config['fusion_strategy']!r}"
        )
    if config["vision_heads"] is None:
        if config["vision_width"] % 64:
            raise ValueError(
                f"{place}: vision_heads must be given: vision_width={config['vision_width']} is no "
                "multiple of 64"
            )
        config["vision_heads"] = config["vision_width"] // 64
    _whole(place, config, "vision_heads", 1)
    return config


def _value(config: dict[str, Any], name: str) -> Any:
    section, _, key = name.rpartition(".")
    return config[section][key] if section else config[key]


def _whole(path: Path, config: dict[str, Any], name: str, least: int) -> None:
    value = _value(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{path}: {name}: expected a whole number from {least}, got {value!r}")


def files_of(config: dict[str, Any], split: str) -> tuple[Path, Path]:
    """Files of queries and pictures of a split. Raises ValueError or FileNotFoundError."""
    found = []
    for side in ("query", "image"):
        key = f"{split}_{side}_file"
        if not isinstance(config.get(key), str):
            raise ValueError(f"the config has no {key}")
        if not Path(config[key]).is_file():
            raise FileNotFoundError(f"{key}: there is no file {config[key]}")
        found.append(Path(config[key]))
    return found[0], found[1]


def write_config(config: dict[str, Any], path: str | Path) -> None:
    """Write the settings as the original leaves them beside its results."""
    write_whole(path, yaml.safe_dump(config, allow_unicode=True, default_flow_style=False))
