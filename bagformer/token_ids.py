"""Checks on token ids on their way into C++."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_ID = 2**31
_CHUNK = 1 << 16  # entities that cross into C++ at once


def entity_chunks(entities: Iterable[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ``(ids, lengths)``, both int64, for so many entities at a time.

    Raises TypeError naming the first entity that is not a sequence of ints.
    """
    ids: list[int] = []
    lengths: list[int] = []
    number = -1
    if not isinstance(entities, Iterable):
        raise TypeError(
            f"entities must be an iterable of token id sequences, got {type(entities).__name__}"
        )
    for number, entity in enumerate(entities):
        before = len(ids)
        try:
            row = entity.tolist() if hasattr(entity, "tolist") else list(entity)
            if bool in map(type, row):
                raise TypeError
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
        array = _array_of_tensor(input_ids)
    elif isinstance(input_ids, np.ma.MaskedArray):
        raise TypeError("input_ids must be a plain array, got one with a mask")
    elif isinstance(input_ids, np.ndarray):
        array = input_ids
    elif isinstance(input_ids, Iterable):
        array = _array_of_rows(list(input_ids))
    else:
        raise TypeError(
            f"input_ids must be a tensor or rows of ints, got {type(input_ids).__name__}"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(f"input_ids must hold integers, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {list(array.shape)}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _array_of_tensor(tensor: Tensor) -> np.ndarray:
    if tensor.is_meta:
        raise ValueError("input_ids must hold values, got a tensor on the device meta")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise TypeError(f"input_ids must be a dense tensor, got layout {tensor.layout}")
    if tensor.is_floating_point():  # numpy lacks some of them
        name = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"input_ids must hold integers, got {name}")
    return tensor.detach().cpu().numpy()


def _array_of_rows(rows: list[Any]) -> np.ndarray:
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
    if not rows or len(rows[0]) == 0:
        return np.zeros((len(rows), 0), np.int64)
    array = np.array(rows)
    if array.dtype.kind in "Of":
        # ints beyond 64 bits, alone or beside negative ones, become objects or floats
        for number, row in enumerate(rows):
            if any(isinstance(token, int) and not 0 <= token < _MAX_ID for token in row):
                raise ValueError(f"input_ids: row {number} holds a token id outside [0, {_MAX_ID})")
    return array
