"""Recall of a ranking in both directions, where any relevant item counts.

The rank of a query is that of its best relevant item, from 0. Equal scores are ordered by the lower
index, as :func:`bagformer.maxsim_topk` orders them, so that a metric never depends on how a
collection was cut. ``R@k`` is the percentage of queries with a rank below ``k``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

WITHOUT_RELEVANT = ("error", "miss", "skip")
CUTOFFS = (1, 5, 10)

_PAIRS_AT_ONCE = 512


def _pairs(
    relevant: Sequence[Collection[int]], n_queries: int, n_items: int
) -> tuple[Tensor, Tensor]:
    """Query and item number of each relevant pair, checked."""
    if len(relevant) != n_queries:
        raise ValueError(
            f"relevant: expected one collection for each of {n_queries} queries, "
            f"got {len(relevant)}"
        )
    queries: list[int] = []
    items: list[int] = []
    for query, wanted in enumerate(relevant):
        for item in wanted:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < n_items:
                raise ValueError(
                    f"relevant[{query}]: expected item numbers from 0 to {n_items - 1}, "
                    f"got {item!r}"
                )
            queries.append(query)
            items.append(item)
    return torch.tensor(queries, dtype=torch.int64), torch.tensor(items, dtype=torch.int64)


def first_relevant_ranks(scores: Tensor, relevant: Sequence[Collection[int]]) -> Tensor:
    """Rank, from 0, of each query's best relevant item; -1 for a query that has none.

    ``scores [Q, C]`` of any float dtype (higher is better); ``relevant[q]`` holds the numbers of
    the items that are right for query ``q``. Returns int64 ``[Q]`` on the CPU. Raises TypeError if
    ``scores`` is no float tensor, ValueError for a wrong shape, NaN, or numbers out of range.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores: expected a float tensor, got {getattr(scores, 'dtype', scores)}")
    if scores.dim() != 2:
        raise ValueError(f"scores: expected [queries, items], got {list(scores.shape)}")
    table = scores.detach().cpu()
    broken = torch.isnan(table).any(dim=1).nonzero()
    if len(broken):
        raise ValueError(f"scores: row {int(broken[0])} holds NaN, which has no rank")
    n_queries, n_items = table.shape
    queries, items = _pairs(relevant, n_queries, n_items)
    ranks = torch.full((n_queries,), n_items, dtype=torch.int64)
    numbers = torch.arange(n_items)
    for start in range(0, len(queries), _PAIRS_AT_ONCE):
        query, item = queries[start : start + _PAIRS_AT_ONCE], items[start : start + _PAIRS_AT_ONCE]
        rows = table[query]
        own = rows.gather(1, item[:, None])
        earlier = (rows == own) & (numbers < item[:, None])
        rank = ((rows > own) | earlier).sum(dim=1)
        ranks.scatter_reduce_(0, query, rank, "amin")
    ranks[ranks == n_items] = -1
    return ranks


def topk_ranks(indices: Tensor, relevant: Sequence[Collection[int]], n_items: int) -> Tensor:
    """As :func:`first_relevant_ranks`, from ``indices [Q, k]``, the best ``k`` of ``n_items``.

    A query whose relevant items are all beyond the ``k`` best gets rank ``k``, one without any -1.
    """
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"indices: expected an int tensor, got {getattr(indices, 'dtype', indices)}"
        )
    if indices.dim() != 2:
        raise ValueError(f"indices: expected [queries, k], got {list(indices.shape)}")
    best = indices.detach().cpu().to(torch.int64)
    n_queries, k = best.shape
    queries, items = _pairs(relevant, n_queries, n_items)
    ranks = torch.full((n_queries,), -1, dtype=torch.int64)
    ranks[queries] = k
    found, place = (best[queries] == items[:, None]).nonzero(as_tuple=True)
    ranks.scatter_reduce_(0, queries[found], place, "amin")
    return ranks


def recall_at(
    ranks: Tensor,
    cutoffs: Iterable[int] = CUTOFFS,
    *,
    without_relevant: str = "error",
    k: int | None = None,
) -> dict[str, float]:
    """``{"R@1": .., "R@5": .., "R@10": .., "mean": ..}`` in per cent from ranks ``[Q]``.

    ``mean`` is the mean of the others. A query without a relevant item (rank -1) raises ValueError,
    counts as a ``miss``, or is left out (``skip``). ``k`` is how many items the ranks were taken
    from, where that was not all of them: no cutoff may exceed it.
    """
    if without_relevant not in WITHOUT_RELEVANT:
        raise ValueError(
            f"without_relevant: expected one of {WITHOUT_RELEVANT}, got {without_relevant!r}"
        )
    known = ranks >= 0
    missing = int((~known).sum())
    if missing and without_relevant == "error":
        first = int((~known).nonzero()[0])
        raise ValueError(
            f"{missing} of {len(ranks)} queries have no relevant item, the first is number "
            f"{first}; count them with without_relevant='miss' or leave them out with 'skip'"
        )
    total = len(ranks) if without_relevant == "miss" else len(ranks) - missing
    if not total:
        raise ValueError("ranks: no query is left to take a recall of")
    recall = {}
    for cutoff in cutoffs:
        if cutoff < 1 or (k is not None and cutoff > k):
            raise ValueError(f"cutoffs: expected 1 to {'any' if k is None else k}, got {cutoff}")
        recall[f"R@{cutoff}"] = 100.0 * int((known & (ranks < cutoff)).sum()) / total
    recall["mean"] = sum(recall.values()) / len(recall)
    return recall


def invert(relevant: Sequence[Collection[int]], n_items: int) -> list[list[int]]:
    """From the images of each text, the texts of each image."""
    texts: list[list[int]] = [[] for _ in range(n_items)]
    for text, images in enumerate(relevant):
        for image in images:
            texts[image].append(text)
    return texts


def retrieval_recall(
    text_to_image: Tensor,
    image_to_text: Tensor,
    relevant: Sequence[Collection[int]],
    *,
    texts_without: str = "error",
    images_without: str = "miss",
    cutoffs: Iterable[int] = CUTOFFS,
) -> dict[str, Any]:
    """Recall of both directions from the scores ``[Nt, Ni]`` and ``[Ni, Nt]``.

    ``relevant[t]`` are the numbers of the images of text ``t``. Returns ``{"text_to_image":
    {"R@1", .., "mean"}, "image_to_text": {..}, "mean"}``; ``mean`` is the mean of both. What
    happens to a text or an image without a counterpart is told to :func:`recall_at`; the defaults
    are the original evaluation's, which misses every image that no text belongs to.
    """
    if tuple(image_to_text.shape) != tuple(text_to_image.shape)[::-1]:
        raise ValueError(
            f"image_to_text: expected {list(text_to_image.shape)[::-1]}, "
            f"got {list(image_to_text.shape)}"
        )
    cutoffs = tuple(cutoffs)
    forward = first_relevant_ranks(text_to_image, relevant)
    backward = first_relevant_ranks(image_to_text, invert(relevant, text_to_image.shape[1]))
    result: dict[str, Any] = {
        "text_to_image": recall_at(forward, cutoffs, without_relevant=texts_without),
        "image_to_text": recall_at(backward, cutoffs, without_relevant=images_without),
    }
    result["mean"] = (result["text_to_image"]["mean"] + result["image_to_text"]["mean"]) / 2
    return result
