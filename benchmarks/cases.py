"""What a case, a contender and an operation of the CPU suite are (see registry.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Results = tuple[Tensor | None, ...]
Call = Callable[..., Results]

# Which operation a kind of case belongs to. A step is results and gradients.
OPERATIONS = {
    "scores": "maxsim",
    "step": "maxsim",
    "rerank": "maxsim",
    "ragged": "maxsim",
    "nested": "maxsim",
    "topk": "maxsim_topk",
    "pool": "bag_pool",
    "pool_step": "bag_pool",
    "normalize": "l2_normalize",
    "normalize_step": "l2_normalize",
    "loss": "contrastive_loss",
    "loss_step": "contrastive_loss",
}


@dataclass(frozen=True)
class Case:
    """``kind``: scores, step, rerank (one text, many images), ragged (texts of 3 to 10 bags in one
    padded tensor with a mask), nested (images of 100 to 257 patches), topk (the best 10 images of
    each text), pool (tokens to bags), normalize (features of patches), loss (of scores) and their
    steps. ``goals``:
    rival, ``matmul`` or ``peak`` to the least ratio of its time to ours or of our rate to it,
    ``memory`` to the most of einsum's extra memory, ``padding`` to the most time for what the
    tokens hold, as a multiple of its share of the padded case's. ``isa`` forces a level of our
    kernels."""

    name: str
    kind: str
    texts: int
    images: int
    width: int
    dtype: str
    threads: int = 1
    bags: int = 25
    patches: int = 257
    isa: str | None = None
    goals: tuple[tuple[str, float], ...] = ()

    @property
    def op(self) -> str:
        return OPERATIONS[self.kind]

    @property
    def step(self) -> bool:
        return self.kind.endswith("step")

    @property
    def results_are_float32(self) -> bool:
        """Scores are; pooled and normalised features, and gradients, have the features' dtype."""
        return self.op.startswith("maxsim") and not self.step

    def cut(self, few: int) -> Case:
        """The same with few texts and images: what every contender is judged on."""
        return replace(self, texts=min(self.texts, few), images=min(self.images, few + 1))

    def tiny(self) -> Case:
        """Small in every way, for tests."""
        return replace(self.cut(6), bags=5, patches=18, width=16)

    def bag_counts(self) -> Tensor:
        """Bags of each text that count, int64 ``[texts]``."""
        if self.kind != "ragged":
            return torch.full((self.texts,), self.bags)
        return torch.arange(self.texts) % min(8, self.bags - 3) + 3

    def patch_counts(self) -> Tensor:
        """Patches of each image that count, int64 ``[images]``."""
        if self.kind != "nested":
            return torch.full((self.images,), self.patches)
        fewest = min(100, self.patches // 2)
        return fewest + torch.arange(self.images) * 37 % (self.patches + 1 - fewest)

    @property
    def flops(self) -> float:
        """Useful operations: scores counted once for both directions, padding not at all."""
        if self.op == "bag_pool":
            return float(self.texts * self.bags * 2 * self.width)
        if self.op == "l2_normalize":
            return 3.0 * self.images * self.patches * self.width
        if self.op == "contrastive_loss":
            return 10.0 * self.texts**2
        pairs = int(self.bag_counts().sum()) * int(self.patch_counts().sum())
        return 2.0 * pairs * self.width

    @property
    def bytes(self) -> float:
        """Least traffic: every input read once, every result written once."""
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        if self.op == "bag_pool":
            return float(size * self.texts * self.width * (2 * self.bags + self.bags))
        if self.op == "l2_normalize":
            return 2.0 * size * self.images * self.patches * self.width
        if self.op == "contrastive_loss":
            return 2.0 * size * self.texts**2
        tokens = int(self.bag_counts().sum()) + int(self.patch_counts().sum())
        results = 8 * self.texts * (10 if self.kind == "topk" else self.images)
        return float(size * tokens * self.width + results)


def _same(*arguments: Any) -> Arguments:
    return arguments


@dataclass(frozen=True)
class Contender:
    """``make(case)`` gives the call, or the reason why it cannot take the case."""

    name: str
    make: Callable[[Case], Call | str]
    package: str | None = None
    alone: bool = False  # runs in a process of its own, as it may crash
    inexact: float = 0.0  # error that its method has and its authors accept
    layout: Callable[..., Arguments] = _same  # inputs as it likes them best, made before timing

    @property
    def ours(self) -> bool:
        """Wrong results of these end the run."""
        return self.name.startswith("ours")

    def missing(self) -> str | None:
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


@dataclass(frozen=True)
class Op:
    """``arguments(case)``: the same for everyone, the first ``leaves`` of them with gradients.
    ``truth``: a contender that is right in float64; where a result is ``int64 [rows, K]``, the best
    columns of each row, its truth is all the scores ``[rows, columns]``."""

    arguments: Callable[[Case], Arguments]
    truth: Call
    contenders: tuple[Contender, ...]
    leaves: int = 1


def plain(function: Call) -> Callable[[Case], Call | str]:
    """A contender that takes every case."""
    return lambda case: function


def with_gradients(call: Call, leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """Results as they are, and the gradients of their sum in the first ``leaves`` arguments."""

    def step(*arguments: Any) -> tuple[Tensor, ...]:
        features = [one.detach().requires_grad_() for one in arguments[:leaves]]
        results = call(*features, *arguments[leaves:])
        total = sum((one.sum() for one in results if one is not None), torch.zeros(()))
        return torch.autograd.grad(total, features)

    return step
