"""A loss, a gradient or a weight that is NaN or infinite stops the run, and says where."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from bagformer.training.checkpoint import LAST, Checkpoints

_SHOWN_IDS = 6
# What one micro-batch gave: its losses by name, and the ids of its pairs.
Part = tuple[dict[str, float], list[Any]]


class NonFiniteError(RuntimeError):
    """The loss, a gradient or a weight became NaN or infinite; nothing of that update was kept."""


class FiniteWatch:
    """Checks of one process; all ids of a bad update go into a file in ``output``."""

    def __init__(self, output: Path, checkpoints: Checkpoints, rank: int, world: int) -> None:
        self.output, self.checkpoints = output, checkpoints
        self.suffix = f"-process-{rank}" if world > 1 else ""
        self.parts: list[Part] = []

    def gradient(self, step: int, parts: list[Part], norm: float) -> None:
        """Raise NonFiniteError unless losses and the gradient's norm are finite."""
        self.parts = parts
        bad = [(found, ids) for found, ids in parts if not math.isfinite(found["loss"])]
        if not bad and math.isfinite(norm):
            return
        wrong = {"grad_norm": norm, **{k: v for f, _ in bad for k, v in f.items()}}
        named = ", ".join(f"{k} is {v}" for k, v in wrong.items() if not math.isfinite(v))
        raise self._stop(step, named, bad or parts)

    def weights(self, step: int, model: nn.Module) -> None:
        """Raise NonFiniteError unless the update of ``step`` left all weights finite."""
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                what = f"the update left values in {name} that are NaN or infinite"
                raise self._stop(step, what, self.parts)

    def _stop(self, step: int, what: str, parts: list[Part]) -> NonFiniteError:
        ids = [list(pair) for _, own in parts for pair in own]
        path = self.output / f"nonfinite-step-{step}{self.suffix}.json"
        record = {"step": step, "what": what, "query_and_item_ids": ids}
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        last = self.checkpoints.path(LAST)
        shown = ", ".join(f"{query}/{item}" for query, item in ids[:_SHOWN_IDS])
        return NonFiniteError(
            f"step {step}: {what}; query/picture ids of the batch: {shown}"
            f"{' ...' if len(ids) > _SHOWN_IDS else ''} (all in {path}). "
            f"The last checkpoint is {last or 'none yet'}. Try a lower optim.lr, a longer "
            "schedule.warmup, or clip"
        )
