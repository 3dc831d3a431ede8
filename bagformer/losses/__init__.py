"""Contrastive losses over late-interaction scores, of one process or of many."""

from bagformer.losses.contrastive import (
    PAPER_LOSS,
    START,
    TEMPERATURE_RANGE,
    BagwiseContrastiveLoss,
)
from bagformer.losses.distributed import GATHERS, gathered_loss
from bagformer.losses.objectives import (
    OBJECTIVES,
    check_positives,
    multi_positive_cross_entropy,
    pairwise_logistic,
    positives_from_ids,
)

__all__ = [
    "GATHERS",
    "OBJECTIVES",
    "PAPER_LOSS",
    "START",
    "TEMPERATURE_RANGE",
    "BagwiseContrastiveLoss",
    "check_positives",
    "gathered_loss",
    "multi_positive_cross_entropy",
    "pairwise_logistic",
    "positives_from_ids",
]
