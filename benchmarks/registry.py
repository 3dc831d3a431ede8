"""What the CPU suite measures: cases, and who is measured on each, in its own best layout.

A contender takes ``text [Nt, N, D]`` and ``image [Ni, P, D]`` and gives ``text_to_image`` and
``image_to_text``, or None for a direction that it cannot do. One that comes from a package that is
not installed is reported as such; the extra ``bench`` installs those on PyPI.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rivals import einsum_scores, per_image_matmul, seed_loops
from torch import Tensor

from bagformer import maxsim

Pair = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Case:
    """``kind``: scores, step (scores and gradients), rerank (one text, many images) or ragged
    (texts of 3 to 10 bags in one padded tensor with a mask). ``goals``: rival or ``matmul`` to the
    least ratio of its time to ours, ``memory`` to the most of einsum's extra memory, ``padding`` to
    the most time for what the texts hold, as a multiple of its share of the padded case's.
    ``isa`` forces a level of our kernels."""

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

    def cut(self, few: int) -> Case:
        """The same with few texts and images: what every contender is judged on."""
        sizes = {"texts": min(self.texts, few), "images": min(self.images, few + 1)}
        return Case(**{**self.__dict__, **sizes})

    def tiny(self) -> Case:
        """Small in every way, for tests."""
        return Case(**{**self.cut(6).__dict__, "bags": 5, "patches": 18, "width": 16})

    @property
    def flops(self) -> float:
        """Useful operations of the scores, counted once for both directions."""
        bags = 6.5 if self.kind == "ragged" else self.bags
        return 2.0 * self.texts * self.images * bags * self.patches * self.width


STEP = (("einsum", 2.5), ("memory", 0.05))
SEED_FP32, SEED_BF16 = ("seed_loops", 3.4), ("seed_loops", 7.0)
CASES = (
    Case("64 x 64", "scores", 64, 64, 256, "float32", goals=(SEED_FP32, ("matmul", 0.85))),
    Case("64 x 64", "scores", 64, 64, 256, "bfloat16", goals=(SEED_BF16, ("matmul", 0.90))),
    Case("64 x 64, step", "step", 64, 64, 256, "float32", goals=STEP),
    Case("64 x 64, step", "step", 64, 64, 256, "bfloat16", goals=STEP),
    Case("64 x 64, two threads", "scores", 64, 64, 256, "float32", threads=2),
    Case("64 x 64, two threads", "scores", 64, 64, 256, "bfloat16", threads=2),
    Case("64 x 64, AVX2", "scores", 64, 64, 256, "float32", isa="avx2"),
    Case("64 x 64, D=64", "scores", 64, 64, 64, "float32", goals=(("matmul", 0.64),)),
    Case("64 x 64, D=128", "scores", 64, 64, 128, "float32", goals=(("matmul", 0.85),)),
    Case("64 x 64, D=768", "scores", 64, 64, 768, "float32", goals=(("matmul", 0.64),)),
    Case("64 x 64, D=64", "scores", 64, 64, 64, "bfloat16", goals=(("matmul", 0.675),)),
    Case("64 x 64, D=768", "scores", 64, 64, 768, "bfloat16", goals=(("matmul", 0.675),)),
    Case("256 x 256", "scores", 256, 256, 256, "float32", goals=(SEED_FP32, ("matmul", 0.85))),
    Case("256 x 256", "scores", 256, 256, 256, "bfloat16", goals=(SEED_BF16, ("matmul", 0.90))),
    Case("1 text, 1,000 images", "rerank", 1, 1000, 256, "float32", goals=(("matmul", 0.45),)),
    Case("1 text, 1,000 images", "rerank", 1, 1000, 256, "bfloat16", goals=(("matmul", 0.45),)),
    Case("64 texts of 3 to 10 bags", "ragged", 64, 64, 256, "float32", goals=(("padding", 1.25),)),
    Case("64 texts of 3 to 10 bags", "ragged", 64, 64, 256, "bfloat16", goals=(("padding", 1.25),)),
)


@dataclass(frozen=True)
class Contender:
    """``make(case)`` gives the call, or the reason why it cannot take the case."""

    name: str
    make: Callable[[Case], Callable[..., Pair] | str]
    package: str | None = None
    alone: bool = False  # runs in a process of its own, as it may crash

    def missing(self) -> str | None:
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def ours(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Pair:
    scores = maxsim(text, image, text_mask=mask)
    return scores.text_to_image, scores.image_to_text


def _plain(function: Callable) -> Callable[[Case], Callable[..., Pair] | str]:
    return lambda case: function


def _compiled(case: Case) -> Callable[..., Pair] | str:
    if case.texts * case.images > 4096:
        return "not tried: it holds every similarity, and minutes of warm-up"
    return torch.compile(einsum_scores, dynamic=False)


def _einsum(case: Case) -> Callable[..., Pair] | str:
    held = case.texts * case.images * case.bags * case.patches * 4
    if held > 2**31:
        return f"not tried: its similarities take {held / 1e9:.1f} GB"
    return einsum_scores


def _late_interaction(case: Case) -> Callable[..., Pair] | str:
    module: Any = importlib.import_module("late_interaction_kernels")

    def both(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Pair:
        to_image = module.maxsim(text, image, q_mask=mask)
        return to_image, module.maxsim(image, text, d_mask=mask)

    return both


def _maxsim_cpu(case: Case) -> Callable[..., Pair] | str:
    if case.dtype != "float32" or case.kind not in ("scores", "rerank"):
        return "takes float32 scores without masks only"
    module: Any = importlib.import_module("maxsim_cpu")

    def to_image(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Pair:
        documents = image.numpy()
        rows = [torch.from_numpy(module.maxsim_scores(one.numpy(), documents)) for one in text]
        return torch.stack(rows), None

    return to_image


CONTENDERS = (
    Contender("ours", _plain(ours)),
    Contender("seed_loops", _plain(seed_loops)),
    Contender("einsum", _einsum),
    Contender("compiled_einsum", _compiled),
    Contender("per_image_matmul", _plain(per_image_matmul)),
    Contender("late_interaction_kernels", _late_interaction, "late_interaction_kernels"),
    Contender("maxsim_cpu", _maxsim_cpu, "maxsim_cpu", alone=True),
)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unit features, the same for everyone, and the mask of a ragged case."""
    maker = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    text = unit(torch.randn(case.texts, case.bags, case.width, generator=maker), dim=-1)
    image = unit(torch.randn(case.images, case.patches, case.width, generator=maker), dim=-1)
    dtype, mask = getattr(torch, case.dtype), None
    if case.kind == "ragged":
        counts = torch.arange(case.texts) % min(8, case.bags - 3) + 3
        mask = torch.arange(case.bags) < counts[:, None]
    return text.to(dtype), image.to(dtype), mask


def with_gradients(call: Callable[..., Pair]) -> Callable[..., tuple[Tensor, ...]]:
    """Scores of both directions and the gradients of their sum."""

    def step(text: Tensor, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        leaves = text.detach().requires_grad_(), image.detach().requires_grad_()
        scores = [score for score in call(*leaves, mask) if score is not None]
        total = sum((score.sum() for score in scores), torch.zeros(()))
        return torch.autograd.grad(total, leaves)

    return step
