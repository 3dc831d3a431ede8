"""Recall on the validation split, by :mod:`bagformer.evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bagformer.data.rows import Pairs
from bagformer.training.config import ConfigError, TrainConfig

Validate = Callable[[Any, Any], dict[str, float]]


def make_validate(config: TrainConfig, pairs: Pairs, progress: bool = False) -> Validate:
    """A function of model and processor that gives metrics by name."""
    from bagformer.evaluation import evaluate

    def validate(model: Any, processor: Any) -> dict[str, float]:
        report = evaluate(
            model,
            processor,
            pairs,
            batch_size=config.valid.batch_size,
            num_workers=config.workers,
            k_test=config.valid.k_test if model.itm_head is not None else 0,
            progress=progress,
        )
        return dict(report.metrics)

    return validate


def metric_of(metrics: dict[str, float], name: str) -> float:
    """The metric that decides which checkpoint is best. Raises ConfigError for an unknown name."""
    if name not in metrics:
        raise ConfigError(f"valid.metric: {name!r} is none of {', '.join(sorted(metrics))}")
    return metrics[name]
