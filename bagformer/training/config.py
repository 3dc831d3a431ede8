"""What may be set of a training run, with its defaults.

The fields are the keys of the YAML file; :mod:`bagformer.training.config_file` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    """Files of one split: ``queries``, a jsonl, and ``images``, a tsv."""

    queries: str | None = None
    images: str | None = None


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
    """``name``: an optimiser that ``timm.optim`` knows. ``param_groups``: ``default`` spares
    vectors, biases, temperatures and the embeddings of positions and of the CLS token from weight
    decay, ``original`` only vectors and biases. ``options`` go to the optimiser."""

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
FREE |= {"start_method", "threads", "processor", "steps", "epochs", "gradient_checkpointing"}

_CHOICES: dict[str, tuple[str, ...]] = {
    "precision": PRECISIONS,
    "schedule.name": SCHEDULES,
    "schedule.unit": UNITS,
    "optim.param_groups": PARAM_GROUPS,
    "loss.positives": POSITIVES,
    "loss.gather": GATHERS,
    "data.on_error": ("raise", "skip"),
}
_POSITIVE = ["batch_size", "mini_batch", "accumulate", "steps", "epochs", "clip", "threads"]
_POSITIVE += ["valid.every", "valid.batch_size", "checkpoint.every", "checkpoint.keep", "log.every"]
_NOT_NEGATIVE = ["workers", "seed", "optim.lr", "optim.weight_decay", "valid.k_test"]
_NOT_NEGATIVE += ["schedule.warmup", "schedule.warmup_lr", "schedule.min_lr"]
_NOT_NEGATIVE += ["loss.twc", "loss.ita", "loss.itm"]
_NOT_NEGATIVE += ["augment.rand_augment.ops", "augment.rand_augment.magnitude"]
_SHARES = ["augment.flip", "augment.rand_augment.probability"]


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def problems(config: TrainConfig) -> dict[str, str]:
    """What is wrong with the values, by dotted key; the types are right already."""
    found: dict[str, str] = {}
    for key, allowed in _CHOICES.items():
        if (value := value_at(config, key)) not in allowed:
            found[key] = f"expected one of {', '.join(allowed)}, got {value!r}"
    if config.start_method not in (None, *START_METHODS):
        found["start_method"] = f"expected one of {', '.join(START_METHODS)} or null"
    for keys, what, wrong in (
        (_POSITIVE, "a number above 0", lambda v: v <= 0),
        (_NOT_NEGATIVE, "0 or more", lambda v: v < 0),
        (_SHARES, "a number from 0 to 1", lambda v: not 0 <= v <= 1),
    ):
        for key in keys:
            value = value_at(config, key)
            if value is not None and wrong(value):
                found[key] = f"expected {what}, got {value!r}"
    for key in ("augment.crop", "augment.ratio", "optim.betas"):
        value = value_at(config, key)
        if value is not None and (len(value) != 2 or not 0 <= value[0] <= max(value[1], 1e-9)):
            found[key] = f"expected two numbers in rising order, got {value!r}"
    if config.ema is not None and not 0 < config.ema < 1:
        found["ema"] = f"expected a number between 0 and 1, got {config.ema!r}"
    if (config.steps is None) == (config.epochs is None):
        found["epochs"] = "set exactly one of steps and epochs"
    if config.output is None:
        found["output"] = "name the folder to write to"
    for name in ("queries", "images"):
        if getattr(config.data.train, name) is None:
            found[f"data.train.{name}"] = "name the file of training data"
        if (config.data.valid.queries is None) != (config.data.valid.images is None):
            found["data.valid"] = "give both queries and images, or neither"
    if not isinstance(config.model, str) and not config.model:
        found["model"] = "give a model folder, or the fields of BagFormerConfig"
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
