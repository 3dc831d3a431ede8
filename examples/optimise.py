"""How train_tiny.py steps: batches in random order, AdamW, a cosine, and averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


class Average:
    """Exponential moving average of some parameters and buffers of a module."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.step = module, decay, 0
        self.copy = copy.deepcopy(module).eval()

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        own, new = self.copy.state_dict().values(), self.module.state_dict().values()
        pairs = list(zip(own, new, strict=True))
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
        for old, fresh in pairs:
            if not old.is_floating_point():
                old.copy_(fresh)


def optimizer_of(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options["weight_decay"]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options["lr"], betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, step: int, options: dict[str, Any]) -> None:
    """Linear warm-up over 60 steps, then cosine down to a hundredth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / options["steps"]))
    for group in optimizer.param_groups:
        group["lr"] = options["lr"] * min(1.0, (step + 1) / 60) * (0.01 + 0.99 * cosine)


def epochs(count: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Places of whole batches, pass after pass."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
