"""The best items of each row while the items come in chunks, and their order after re-ranking."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """``scores [rows, k]`` float32 and ``indices [rows, k]`` int64, best first, equal scores by the
    lower index."""

    scores: Tensor
    indices: Tensor


def check_numbers(scores: Tensor, what: str) -> None:
    """Raise ValueError where ``scores [rows, c]`` holds NaN, which has no rank."""
    broken = torch.isnan(scores).any(dim=1).nonzero()
    if len(broken):
        raise ValueError(
            f"{what} {int(broken[0])} has a score that is NaN: the model's weights or its inputs "
            "hold numbers that are not finite"
        )


def merge(best: Candidates | None, scores: Tensor, start: int, k: int) -> Candidates:
    """The ``k`` best of ``best`` and the next items: ``scores [rows, c]``, numbered from ``start``.

    A stable sort keeps the lower index first among equals, as whatever is in ``best`` has a lower
    one than the new items.
    """
    new = torch.arange(start, start + scores.shape[1], device=scores.device).expand(scores.shape)
    values, indices = scores.float(), new
    if best is not None:
        values = torch.cat([best.scores, values], dim=1)
        indices = torch.cat([best.indices, indices], dim=1)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return Candidates(values[:, :k], indices.gather(1, order[:, :k]))


def reorder(candidates: Candidates, scores: Tensor) -> Candidates:
    """Order the first ``k`` candidates by ``scores [rows, k]``; those behind them keep their order.

    Equal scores are ordered by the lower index, not by the place among the candidates.
    """
    k = scores.shape[1]
    head, by_index = torch.sort(candidates.indices[:, :k], dim=1)
    values, order = torch.sort(scores.gather(1, by_index), dim=1, descending=True, stable=True)
    return Candidates(
        torch.cat([values, candidates.scores[:, k:]], dim=1),
        torch.cat([head.gather(1, order), candidates.indices[:, k:]], dim=1),
    )
