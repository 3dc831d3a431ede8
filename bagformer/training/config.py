"""What may be set of a training run, with its defaults.

The fields are the keys of the YAML file; :mod:`bagformer.training.config_file` reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bagformer.data.rows import Columns
from bagformer.data.sources import SOURCES, kind_of

PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "linear", "poly", "constant", "step", "tanh", "wsd", "none")
PARAM_GROUPS = ("default", "original")
POSITIVES = ("ids", "pair")
GATHERS = ("none", "local", "ring")
UNITS = ("update", "original")
START_METHODS = ("fork", "forkserver", "spawn")


class ConfigError(ValueError):
    """A configuration that cannot be used; says which key, and where it stands."""


@dataclass
class ProcessorConfig:
    """``vocabulary``: a ``vocab.txt`` or a tokenizer's folder; null is the vocabulary that ships
    with the package. ``dictionary``: one entity a line; null makes every token a bag. Where
    ``model`` is a folder that has a processor, null means its own."""

    vocabulary: str | None = None
    dictionary: str | None = None


@dataclass
class SplitConfig:
    """Where one split lies.

    ``source``: ``muge`` (``queries``, a jsonl, and ``images``, a tsv), or a source whose rows hold
    text and picture, which takes no ``images``: ``parquet`` or ``webdataset`` (``queries``: files,
    also as patterns) or ``huggingface`` (a folder, and its ``split``). Null goes by the ending of
    ``queries``: .parquet and .tar, else muge. ``columns``: where a row keeps what.
    """

    source: str | None = None
    queries: str | list[str] | None = None
    images: str | None = None
    split: str | None = None
    columns: Columns = field(default_factory=Columns)

    @property
    def names(self) -> list[str]:
        """``queries`` as a list."""
        found = self.queries
        return [] if found is None else [found] if isinstance(found, str) else found

    @property
    def kind(self) -> str:
        """``source``, or what the name says it is."""
        guessed = kind_of(self.names[0]) if self.names else None
        return self.source or guessed or "muge"


@dataclass
class DataConfig:
    """``on_error``: ``raise``, or ``skip`` lines that are wrong and pictures that are broken (each
    replaced by the next pair's, and counted)."""

    train: SplitConfig = field(default_factory=SplitConfig)
    valid: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)
    on_error: str = "raise"


@dataclass
class RandAugmentConfig:
    """``ops`` operations of torchvision's RandAugment at ``magnitude`` (0 to 30), each applied with
    ``probability``; 0 operations is off."""

    ops: int = 0
    magnitude: int = 9
    probability: float = 1.0


@dataclass
class AugmentConfig:
    """``crop``: least and largest share of a picture's area that is kept; null resizes the whole
    picture. ``ratio``: of the crop's width to its height. ``flip``: probability."""

    crop: list[float] | None = field(default_factory=lambda: [0.5, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333333333333])
    flip: float = 0.0
    rand_augment: RandAugmentConfig = field(default_factory=RandAugmentConfig)


@dataclass
class OptimConfig:
    """``name``: an optimiser that ``timm.optim`` knows. ``options`` go to it.

    ``param_groups``: which parameters are spared weight decay. ``default``: vectors, biases and
    temperatures, and what timm says of the picture encoder (its ``no_weight_decay``: CLS and
    register tokens, position embeddings, tables of relative positions). The text encoder's
    embeddings, of positions too, decay, as in transformers' Trainer. ``original``: only vectors
    and biases are spared."""

    name: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.02
    betas: list[float] | None = None
    eps: float | None = None
    param_groups: str = "default"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """Learning rate over the updates, from ``timm.scheduler``.

    ``warmup``: number of updates, or below 1 their share of all, from ``warmup_lr`` to the full
    rate. ``unit``: ``update``, or ``original`` for the original's steps: once an epoch, with
    ``warmup`` in hundreds of updates. ``options`` go to timm's ``create_scheduler_v2``.
    """

    name: str = "cosine"
    warmup: float = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    unit: str = "update"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """Weights of the losses: ``twc`` late interaction, ``ita`` CLS tokens, ``itm`` matching; one
    that the model has not is left out. ``positives``: ``ids`` (a picture of the same product or of
    the same text is never a negative) or ``pair`` (only pair b with b). ``gather``: negatives from
    the other processes, ``local`` or ``ring``, or ``none``."""

    twc: float = 1.0
    ita: float = 1.0
    itm: float = 1.0
    positives: str = "ids"
    gather: str = "none"


@dataclass
class ValidConfig:
    """``every``: updates between validations, null is once an epoch. ``metric``: what the best
    checkpoint is best in. ``k_test``: candidates that the matching head re-ranks, 0 for none."""

    every: int | None = None
    metric: str = "recall_t2i_mean"
    batch_size: int = 64
    k_test: int = 0


@dataclass
class CheckpointConfig:
    """``every``: updates between checkpoints, null is once an epoch. ``keep``: how many of the
    newest stay; the best one always does."""

    every: int | None = None
    keep: int = 2


@dataclass
class LogConfig:
    """``every``: updates between lines of ``log.jsonl``, each a mean since the last."""

    every: int = 10
    tensorboard: bool = False


@dataclass
class TrainConfig:
    """A whole run.

    - ``model``: a folder to start from, or the fields of ``BagFormerConfig`` to start from nothing.
    - ``output``: folder for all that is written. ``folder``: where relative paths of ``data`` and
      ``processor`` begin.
    - ``batch_size``: pairs in one loss, in each process; ``accumulate`` such batches make one
      update. ``mini_batch``: encode a batch in pieces of this size (gradient cache), which saves
      memory and leaves the loss as it is.
    - ``steps`` or ``epochs``: length of the run, in updates or in passes over the pairs.
    - ``clip``: largest norm of the gradient. ``ema``: decay of averaged weights, which are then
      validated and saved. ``freeze``: names of modules or patterns of parameters that stay.
    - ``device``: ``auto``, ``cpu`` or ``cuda``. ``workers``: processes that read pictures.
      ``threads``: CPU threads, null leaves PyTorch's number.
    """

    model: str | dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    folder: str = "."
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    valid: ValidConfig = field(default_factory=ValidConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    batch_size: int = 64
    mini_batch: int | None = None
    accumulate: int = 1
    steps: int | None = None
    epochs: int | None = None
    clip: float | None = None
    ema: float | None = None
    freeze: list[str] = field(default_factory=list)
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    device: str = "auto"
    workers: int = 0
    start_method: str | None = None
    threads: int | None = None
    seed: int = 42


# Keys that a resumed run may change: they decide how it is run, not what it computes.
FREE = frozenset(("output", "folder", "data", "valid", "checkpoint", "log", "device", "workers"))
FREE |= {"start_method", "threads", "steps", "epochs", "gradient_checkpointing"}

_CHOICES: dict[str, tuple[str, ...]] = {
    "precision": PRECISIONS,
    "schedule.name": SCHEDULES,
    "schedule.unit": UNITS,
    "optim.param_groups": PARAM_GROUPS,
    "loss.positives": POSITIVES,
    "loss.gather": GATHERS,
    "data.on_error": ("raise", "skip"),
}
# OpenMP ends the process where it cannot start as many as it was told to.
_MOST_THREADS = 1024
# Levels of torchvision's RandAugment.
_MOST_MAGNITUDE = 30
_POSITIVE = ["batch_size", "mini_batch", "accumulate", "steps", "epochs", "clip", "threads"]
_POSITIVE += ["valid.every", "valid.batch_size", "checkpoint.every", "checkpoint.keep", "log.every"]
_POSITIVE += ["optim.lr", "optim.eps"]
_NOT_NEGATIVE = ["workers", "seed", "optim.weight_decay", "valid.k_test"]
_NOT_NEGATIVE += ["schedule.warmup", "schedule.warmup_lr", "schedule.min_lr"]
_NOT_NEGATIVE += ["loss.twc", "loss.ita", "loss.itm"]
_NOT_NEGATIVE += ["augment.rand_augment.ops", "augment.rand_augment.magnitude"]
_SHARES = ["augment.flip", "augment.rand_augment.probability"]


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every float in a configuration, also inside mappings and lists, by its dotted key."""
    if dataclasses.is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, float):
        yield key, value


def _rising(value: list[float], highest: float) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] <= highest


def _problems_of_ranges(config: TrainConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    for keys, what, wrong in (
        (_POSITIVE, "a number above 0", lambda v: v <= 0),
        (_NOT_NEGATIVE, "0 or more", lambda v: v < 0),
        (_SHARES, "a number from 0 to 1", lambda v: not 0 <= v <= 1),
        (["threads"], f"at most {_MOST_THREADS}", lambda v: v > _MOST_THREADS),
        (
            ["augment.rand_augment.magnitude"],
            f"at most {_MOST_MAGNITUDE}",
            lambda v: v > _MOST_MAGNITUDE,
        ),
        (["ema"], "a number between 0 and 1", lambda v: not 0 < v < 1),
        (
            ["augment.crop"],
            "two numbers in rising order, above 0 and up to 1",
            lambda v: not _rising(v, 1),
        ),
        (
            ["augment.ratio"],
            "two numbers in rising order, above 0",
            lambda v: not _rising(v, math.inf),
        ),
        (
            ["optim.betas"],
            "two or three numbers from 0 to below 1",
            lambda v: len(v) not in (2, 3) or not all(0 <= one < 1 for one in v),
        ),
    ):
        for key in keys:
            value = value_at(config, key)
            if value is not None and wrong(value):
                found.setdefault(key, f"expected {what}, got {value!r}")
    return found


def problems(config: TrainConfig) -> dict[str, str]:
    """What is wrong with the values, by dotted key; the types are right already."""
    found: dict[str, str] = {}
    for key, number in _numbers(config, ""):
        if not math.isfinite(number):
            found[key] = f"expected a finite number, got {number!r}"
    for key, allowed in _CHOICES.items():
        if (value := value_at(config, key)) not in allowed:
            found[key] = f"expected one of {', '.join(allowed)}, got {value!r}"
    if config.start_method not in (None, *START_METHODS):
        found["start_method"] = (
            f"expected one of {', '.join(START_METHODS)} or null, got {config.start_method!r}"
        )
    for key, problem in _problems_of_ranges(config).items():
        found.setdefault(key, problem)
    if (config.steps is None) == (config.epochs is None):
        found["epochs"] = "set exactly one of steps and epochs"
    if config.output is None:
        found["output"] = "name the folder to write to"
    found |= _problems_of_data(config.data)
    if not isinstance(config.model, str) and not config.model:
        found["model"] = "give a model folder, or the fields of BagFormerConfig"
    return found


def _problems_of_data(data: DataConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, split in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        key, kind = f"data.{name}", split.kind
        if split.source not in (None, *SOURCES):
            found[f"{key}.source"] = f"expected one of {', '.join(SOURCES)}, got {split.source!r}"
            continue
        if kind != "muge" and split.images is not None:
            found[f"{key}.images"] = f"a row of {kind} holds its picture: leave images out"
        if kind == "muge" and split.columns != Columns():
            found[f"{key}.columns"] = f"muge has none, only {', '.join(SOURCES[1:])} have"
        if kind != "huggingface" and split.split is not None:
            found[f"{key}.split"] = f"{kind} has none, only a folder of huggingface has"
        if kind in ("muge", "huggingface") and len(split.names) > 1:
            found[f"{key}.queries"] = f"{kind} takes one, got {len(split.names)}"
        if name == "train":
            lost = [] if split.names else ["queries"]
            lost += ["images"] if kind == "muge" and split.images is None else []
            wanted = "name the file of training data"
            if split.names and split.source is None and kind_of(split.names[0]) is None:
                wanted += f", or set {key}.source if {split.names[0]} is not MUGE's"
            found |= {f"{key}.{one}": wanted for one in lost}
        elif kind == "muge" and bool(split.names) != (split.images is not None):
            found[key] = "give both queries and images, or neither"
    return found


__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "LogConfig",
    "LossConfig",
    "OptimConfig",
    "ProcessorConfig",
    "RandAugmentConfig",
    "ScheduleConfig",
    "SplitConfig",
    "TrainConfig",
    "ValidConfig",
    "problems",
    "value_at",
]
