"""Checks on token ids on their way into C++."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

_CHUNK = 1 << 16  # entities that cross into C++ at once


def entity_chunks(entities: Iterable[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``(ids, lengths)``, both int64, for so many entities at a time.

    Raises TypeError naming the first entity that is not a sequence of ints.
    """
    ids: list[int] = []
    lengths: list[int] = []
    number = -1
    for number, entity in enumerate(entities):
        before = len(ids)
        try:
            row = entity.tolist() if hasattr(entity, "tolist") else entity
            ids.extend(int(token.__index__()) for token in row)
        except (AttributeError, TypeError):
            raise TypeError(
                f"entities must be sequences of int token ids, entity {number} is {entity!r:.80}"
            ) from None
        lengths.append(len(ids) - before)
        if len(lengths) == _CHUNK:
            yield _as_int64(ids, number), np.array(lengths, np.int64)
            ids, lengths = [], []
    yield _as_int64(ids, number), np.array(lengths, np.int64)


def _as_int64(ids: list[int], last: int) -> np.ndarray:
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        raise ValueError(f"an entity up to number {last} holds an id beyond 64 bits") from None


def as_array(input_ids: Tensor | Sequence[Sequence[int]]) -> np.ndarray:
    """``[B, T]`` integers as an array; a tensor on the CPU and an array are not copied.

    Raises TypeError or ValueError as ``BagSegmenter.__call__`` documents.
    """
    if isinstance(input_ids, Tensor):
        array = input_ids.detach().cpu().numpy()
    elif isinstance(input_ids, np.ndarray):
        array = input_ids
    else:
        rows = list(input_ids)
        for number, row in enumerate(rows):
            if not isinstance(row, Sequence | np.ndarray) or isinstance(row, str):
                raise TypeError(
                    f"input_ids must be a tensor or rows of ints, row {number} is {row!r:.60}"
                )
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"input_ids: row {number} has {len(row)} ids, row 0 has {len(rows[0])}; "
                    "pad the rows to one length"
                )
        array = np.array(rows) if rows and len(rows[0]) else np.zeros((len(rows), 0), np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"input_ids must hold integers, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {list(array.shape)}")
    return array
