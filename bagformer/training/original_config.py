"""Translate the configuration file of the original code to the keys used here."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from bagformer.training.config import ConfigError

# ViT-B/16 as the original writes it into its code; timm's differs from it in nothing but this.
_VIT = {"backbone": "vit_base_patch16_224"}
_SPLITS = ("train", "valid", "test")

# Where a value goes; None: it has no meaning for the bag-wise model.
_KEYS: dict[str, str | None] = {
    **{f"{split}_query_file": f"data.{split}.queries" for split in _SPLITS},
    **{f"{split}_image_file": f"data.{split}.images" for split in _SPLITS},
    "dataset": None,
    "bert_config": "model.text_config",
    "image_res": "model.vision_config.image_size",
    "batch_size_train": "batch_size",
    "batch_size_test": "valid.batch_size",
    "num_workers_train": "workers",
    "num_workers_test": None,
    "queue_size": None,
    "momentum": None,
    "vision_width": None,
    "embed_dim": "model.embed_dim",
    "temp": "model.cls_temperature",
    "k_test": "valid.k_test",
    "fusion_strategy": "model.fusion",
    "entity_dict_path": "processor.dictionary",
    "alpha": None,
    "distill": None,
    "warm_up": None,
}
_OPTIMIZER = {"opt": "optim.name", "lr": "optim.lr", "weight_decay": "optim.weight_decay"}
_SCHEDULE: dict[str, str | None] = {
    "sched": "schedule.name",
    "lr": None,
    "epochs": "epochs",
    "min_lr": "schedule.min_lr",
    "decay_rate": "schedule.options.decay_rate",
    "warmup_lr": "schedule.warmup_lr",
    "warmup_epochs": "schedule.warmup",
    "cooldown_epochs": "schedule.options.cooldown_epochs",
}
_SECTIONS: dict[str, dict[str, Any]] = {"optimizer": _OPTIMIZER, "schedular": _SCHEDULE}

# What the original does without saying so in its file.
_FIXED: dict[str, Any] = {
    "model.vision_config.backbone": _VIT["backbone"],
    "model.protocol": "original",
    "optim.param_groups": "original",
    "schedule.unit": "original",
    "loss.positives": "pair",
    "augment.crop": [0.5, 1.0],
    "augment.flip": 0.5,
    "augment.rand_augment.ops": 2,
    "augment.rand_augment.magnitude": 21,
    "augment.rand_augment.probability": 0.5,
    "valid.metric": "recall_r_mean",
    "output": "output/retrieval_muge",
}


def is_original(tree: dict[str, Any]) -> bool:
    """Whether the keys are those of the original's file."""
    return "schedular" in tree or "train_query_file" in tree


def _put(tree: dict[str, Any], places: dict[Any, str], key: str, value: Any, place: str) -> None:
    *parents, last = key.split(".")
    target = tree
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    places[(*parents, last)] = place


def translate(
    tree: dict[str, Any], places: dict[Any, str], name: str
) -> tuple[dict[str, Any], dict[Any, str], list[str]]:
    """Tree and places under the keys used here, and a remark on what was left out.

    Raises ConfigError for a key that the original has not.
    """
    result: dict[str, Any] = {}
    where: dict[Any, str] = {}
    unused: list[str] = []
    for key, value in _FIXED.items():
        _put(result, where, key, value, name)
    for path, value, targets in _entries(tree, places, name):
        target = targets[path[-1]]
        if target is None:
            unused.append(".".join(path))
            continue
        if path[-1] == "opt" or path[-1] == "sched":
            value = value.lower() if isinstance(value, str) else value
        if path[-1] == "fusion_strategy" and isinstance(value, str):
            value = value.removesuffix("_fusion")
        _put(result, where, target, value, places.get(path, name))
    remarks = []
    if unused:
        remarks.append(f"{name}: these keys change nothing here: {', '.join(unused)}")
    return result, where, remarks


def _entries(tree: dict[str, Any], places: dict[Any, str], name: str):
    for key, value in tree.items():
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{places.get((key,), name)}: {key}: expected keys and values")
            for inner, content in value.items():
                _check((key, inner), _SECTIONS[key], places, name)
                yield (key, inner), content, _SECTIONS[key]
        else:
            _check((key,), {**_KEYS, **_SECTIONS}, places, name)
            yield (key,), value, _KEYS


def _check(path: tuple[str, ...], known: dict[str, Any], places: dict[Any, str], name: str) -> None:
    if path[-1] not in known:
        near = get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{places.get(path, name)}: {'.'.join(map(str, path))}: unknown key, the nearest known "
            f"one is {near!r}"
        )
