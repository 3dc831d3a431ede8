"""Recall on the validation split, by :mod:`bagformer.evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bagformer.data.rows import Pairs
from bagformer.evaluation.report import DIRECTIONS, KINDS, metric_names
from bagformer.evaluation.run import evaluate
from bagformer.training.config import ConfigError, TrainConfig

Validate = Callable[[Any, Any], dict[str, float]]


def _k_test(config: TrainConfig, model: Any) -> int:
    return config.valid.k_test if model.itm_head is not None else 0


def _check(config: TrainConfig, model: Any, pairs: Pairs) -> None:
    """What would otherwise end a run at its first validation, hours later."""
    k_test, most = _k_test(config, model), min(len(pairs.queries), len(pairs.images))
    if k_test > most:
        raise ConfigError(
            f"valid.k_test: {k_test} is larger than the validation set, which has "
            f"{len(pairs.queries)} queries and {len(pairs.images)} images: take at most "
            f"k_test={most}, or 0 to do without the matching head"
        )
    kinds, name = KINDS if k_test else KINDS[:1], config.valid.metric
    names = [known for kind in kinds for known in metric_names(kind, tuple(DIRECTIONS))]
    if name not in names:
        hint = "" if k_test else "; rank and merge need valid.k_test and a matching head"
        raise ConfigError(f"valid.metric: {name!r} is none of {', '.join(names)}{hint}")


def make_validate(
    config: TrainConfig, model: Any, pairs: Pairs, progress: bool = False
) -> Validate:
    """A function of model and processor that gives metrics by name.

    Raises ConfigError for a metric or a ``k_test`` that ``model`` cannot have on ``pairs``.
    """
    _check(config, model, pairs)

    def validate(model: Any, processor: Any) -> dict[str, float]:
        report = evaluate(
            model,
            processor,
            pairs,
            batch_size=config.valid.batch_size,
            num_workers=config.workers,
            k_test=_k_test(config, model),
            progress=progress,
        )
        return dict(report.metrics)

    return validate


def metric_of(metrics: dict[str, float], name: str) -> float:
    """The metric that decides which checkpoint is best. Raises ConfigError for an unknown name."""
    if name not in metrics:
        raise ConfigError(f"valid.metric: {name!r} is none of {', '.join(sorted(metrics))}")
    return metrics[name]
