"""Contrastive losses over late-interaction scores, of one process or of many."""

from bagformer.losses.contrastive import (
    PAPER_LOSS,
    START,
    TEMPERATURE_RANGE,
    BagwiseContrastiveLoss,
)
from bagformer.losses.distributed import GATHERS, gathered_loss
from bagformer.losses.objectives import (
    check_positives,
    positives_from_ids,
)

__all__ = [
    "GATHERS",
    "PAPER_LOSS",
    "START",
    "TEMPERATURE_RANGE",
    "BagwiseContrastiveLoss",
    "check_positives",
    "gathered_loss",
    "positives_from_ids",
]
