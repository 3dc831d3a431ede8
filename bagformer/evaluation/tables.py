"""Complete score tables and their order, as the original's evaluation has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

# What stands in a table for a pair that the matching head has not seen.
UNSEEN = -100.0


def descending(row: np.ndarray) -> np.ndarray:
    """Numbers of ``row``'s items, best first: ``np.argsort(row)[::-1]`` of NumPy before 1.25.

    That sort is not stable, so equal scores come in an order of its own, and since 1.25 the order
    depends on the processor. Wider numbers still take the old path, and widening changes no order.
    """
    return np.argsort(row.astype(np.longdouble))[::-1]


def _rank(row: np.ndarray, wanted: Collection[int], order: np.ndarray | None, listed: int) -> int:
    """Rank of the best of ``wanted``; from ``listed`` on, equal scores are not told apart."""
    ranks = []
    for item in wanted:
        rank = int((row > row[item]).sum())
        if rank < listed and int((row == row[item]).sum()) > 1:
            order = descending(row) if order is None else order
            rank = int(np.flatnonzero(order == item)[0])
        ranks.append(rank)
    return min(ranks)


def table_ranks(
    scores: Tensor, relevant: Sequence[Collection[int]], listed: int
) -> tuple[Tensor, Tensor]:
    """Rank, from 0, of each row's best relevant item (-1: it has none), and the first ``listed``
    items of each row: int64 ``[rows]`` and ``[rows, listed]``.

    Ranks are exact below ``listed`` and at least ``listed`` beyond. Whole rows are sorted only
    where equal scores make the order of the first ones depend on it.
    """
    ranks = torch.full((len(scores),), -1, dtype=torch.int64)
    top = scores.topk(min(listed + 1, scores.shape[1]), dim=1)
    best = top.indices[:, :listed].clone()
    tied = (top.values[:, :-1] == top.values[:, 1:]).any(dim=1).tolist()
    for number, (row, wanted) in enumerate(zip(scores.numpy(), relevant, strict=True)):
        order = descending(row) if tied[number] else None
        if order is not None:
            best[number] = torch.from_numpy(order[:listed].copy())
        if wanted:
            ranks[number] = _rank(row, wanted, order, listed)
    return ranks, best


def scatter(shape: tuple[int, int], indices: Tensor, values: Tensor) -> Tensor:
    """A table ``shape`` with ``values [rows, k]`` at ``indices [rows, k]`` and ``UNSEEN`` else."""
    return torch.full(shape, UNSEEN).scatter_(1, indices, values)
