"""Random numbers that depend on where a run is, never on how it came there.

Each pair's augmentation is drawn from (seed, epoch, pair), each update's dropout and negatives from
(seed, update, process). So there is no generator whose state a checkpoint would have to keep, the
number of workers changes nothing, and a resumed run draws what an uninterrupted one does.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_ORDER, _SAMPLE, _UPDATE, _START = range(4)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def of_sample(seed: int, epoch: int, index: int) -> int:
    """Seed of what is drawn for one pair in one epoch."""
    return _mixed(seed, _SAMPLE, epoch, index)


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The numbers below ``count`` in the order of one epoch."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


def seed_all(*numbers: int) -> None:
    """Seed PyTorch (all devices), NumPy and Python from some numbers."""
    value = _mixed(*numbers)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def start(seed: int) -> None:
    """Seed the making of a model."""
    seed_all(seed, _START)


def update(seed: int, number: int, rank: int) -> None:
    """Seed all that is drawn during one update in one process."""
    seed_all(seed, _UPDATE, number, rank)
