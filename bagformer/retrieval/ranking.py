"""The best of each row of scores, equal scores ordered by the lower index."""

from __future__ import annotations

import torch
from torch import Tensor

from bagformer.reference import TopK


def best_of(scores: Tensor, k: int) -> TopK:
    """The ``k`` best (or all, if fewer) of each row of ``scores [Q, C]``, best first.

    The order is that of :func:`bagformer.maxsim_topk`, for scores that are already there. Raises
    ValueError for NaN, which has no rank.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores: expected [queries, items], got {list(scores.shape)}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    broken = torch.isnan(scores).any(dim=1).nonzero()
    if len(broken):
        raise ValueError(f"scores: row {int(broken[0])} holds NaN, which has no rank")
    values, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return TopK(values[:, :k], order[:, :k])
