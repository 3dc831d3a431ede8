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


def table_ranks(
    scores: Tensor, relevant: Sequence[Collection[int]], listed: int
) -> tuple[Tensor, Tensor]:
    """Rank, from 0, of each row's best relevant item (-1: it has none), and the first ``listed``
    items of each row: int64 ``[rows]`` and ``[rows, listed]``."""
    ranks = torch.full((len(scores),), -1, dtype=torch.int64)
    best = torch.empty(len(scores), min(listed, scores.shape[1]), dtype=torch.int64)
    places = np.empty(scores.shape[1], dtype=np.int64)
    for number, (row, wanted) in enumerate(zip(scores.numpy(), relevant, strict=True)):
        order = descending(row)
        best[number] = torch.from_numpy(order[: best.shape[1]].copy())
        if wanted:
            places[order] = np.arange(len(order))
            ranks[number] = int(places[list(wanted)].min())
    return ranks, best


def scatter(shape: tuple[int, int], indices: Tensor, values: Tensor) -> Tensor:
    """A table ``shape`` with ``values [rows, k]`` at ``indices [rows, k]`` and ``UNSEEN`` else."""
    return torch.full(shape, UNSEEN).scatter_(1, indices, values)
