"""Every way to compute the scores that is timed: ours, plain PyTorch's, and two packages'.

A package is called twice, once for each direction, on the path that it documents for the shape.
Packages come from wheels in a folder (``BAGFORMER_RIVAL_WHEELS``, else benchmarks/wheels), or from
what is installed; one that is in neither place is reported, and its rows say so.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from rivals import candidates, einsum_scores, seed_loops
from torch import Tensor

from bagformer import maxsim
from gpu import stubs
from gpu.cases import Case
from gpu.device import environment
from gpu.timing import reason_of

Scores = tuple[Tensor, Tensor]
WHEELS = Path(__file__).resolve().parents[1] / "wheels"
MOST_IMAGES = 8192  # of a call with images as queries: more overflow the packages' 32-bit offsets
ADDRESSES = 1 << 31
UNMASKED_PAIRS = 500  # flash_maxsim's kernel for fewer pairs reads no lengths of queries


def _no_limit(case: Case, mode: str) -> str | None:
    return None


@dataclass(frozen=True)
class Variant:
    """``forward(text, image, text_mask)``; ``train`` the same, differentiable; ``rerank`` for
    ``image [Nt, K, P, D]``; ``limit(case, mode)`` says why a case must not be tried, or None."""

    name: str
    forward: Callable[..., Scores]
    train: Callable[..., Scores]
    rerank: Callable[..., Scores]
    limit: Callable[[Case, str], str | None] = _no_limit
    backward_environment: dict[str, str] = field(default_factory=dict)
    is_package: bool = False


def ours(text: Tensor, image: Tensor, text_mask: Tensor | None = None) -> Scores:
    scores = maxsim(text, image, text_mask=text_mask)
    return scores.text_to_image, scores.image_to_text


def _compiled(backend: str) -> Variant:
    def scores(text: Tensor, image: Tensor, text_mask: Tensor | None = None) -> Scores:
        return einsum_scores(text, image, text_mask)

    made = torch.compile(scores, dynamic=False, backend=backend)

    def rerank(text: Tensor, image: Tensor) -> Scores:
        return candidates(made, text, image)

    return Variant("torch.compile", made, made, rerank)


def plain(dry: bool) -> dict[str, Variant]:
    """Ours and what plain PyTorch offers; a dry run traces and generates no code."""

    def variant(name: str, function: Callable[..., Scores]) -> Variant:
        def rerank(text: Tensor, image: Tensor) -> Scores:
            return function(text, image) if name == "ours" else candidates(function, text, image)

        return Variant(name, function, function, rerank)

    made = [variant("ours", ours), variant("seed_loops", seed_loops)]
    return {
        one.name: one
        for one in [
            *made,
            variant("einsum", einsum_scores),
            _compiled("aot_eager" if dry else "inductor"),
        ]
    }


def _by_images(call: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Rows of images, at most MOST_IMAGES in a call."""
    if image.shape[0] <= MOST_IMAGES:
        return call(image)
    return torch.cat([call(part) for part in image.split(MOST_IMAGES)])


def _indices_overflow(pairs: int, each: int, what: str) -> str | None:
    if pairs * each < ADDRESSES:
        return None
    return f"not tried: its {what} indices, {pairs} pairs x {each}, pass 32-bit offsets"


def _late_interaction_kernels(module: Any) -> list[Variant]:
    def forward(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Scores:
        to_image = module.maxsim(text, image, q_mask=mask)
        to_text = _by_images(lambda part: module.maxsim(part, text, d_mask=mask), image)
        return to_image, to_text

    def train(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Scores:
        return module.maxsim(text, image, q_mask=mask), module.maxsim(image, text, d_mask=mask)

    def rerank(text: Tensor, image: Tensor) -> Scores:
        count, each = image.shape[:2]
        to_image = module.maxsim(text, image)
        if count == 1:
            return to_image, module.maxsim(image[0], text).t()
        words = text.repeat_interleave(each, 0)
        return to_image, module.maxsim_pairs(image.flatten(0, 1), words).view(count, each)

    def limit(case: Case, mode: str) -> str | None:
        if mode != "step":
            return None
        # it pads the queries of a call, here the images' patches, to a power of two
        padded = 1 << max(4, (case.patches - 1).bit_length())
        return _indices_overflow(case.pairs, padded, "int32")

    return [Variant("late_interaction_kernels", forward, train, rerank, limit, is_package=True)]


def _flash_maxsim(module: Any) -> list[Variant]:
    def lengths(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.sum(1, dtype=torch.int32)

    def forward(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Scores:
        held = lengths(mask)
        batched = module.flash_maxsim_batched
        to_image = batched(text, image, query_lengths=held)
        to_text = _by_images(lambda part: batched(part, text, doc_lengths=held), image)
        return to_image, to_text

    def train(text: Tensor, image: Tensor, mask: Tensor | None = None) -> Scores:
        held = lengths(mask)
        batched = module.flash_maxsim_batched_train
        to_image = batched(text, image, query_lengths=held)
        return to_image, batched(image, text, doc_lengths=held)

    def rerank(text: Tensor, image: Tensor) -> Scores:
        count, each = image.shape[:2]
        if count == 1:
            to_image = module.flash_maxsim(text[0], image[0])[None]
            return to_image, module.flash_maxsim_batched(image[0], text).t()
        to_image = module.flash_maxsim_rerank_padded(text, image)
        words = text.repeat_interleave(each, 0)
        to_text = module.flash_maxsim_pairs_dense(image.flatten(0, 1), words)
        return to_image, to_text.view(count, each)

    def limit(case: Case, mode: str) -> str | None:
        if mode == "step":
            return _indices_overflow(case.pairs, case.patches, "int32")
        if case.real_bags is not None and case.pairs < UNMASKED_PAIRS:
            return f"not tried: it drops query_lengths below {UNMASKED_PAIRS} pairs"
        return None

    return [
        Variant("flash_maxsim", forward, train, rerank, limit, is_package=True),
        Variant(
            "flash_maxsim_invgrid", forward, train, rerank, limit,
            {"FLASH_BWD_PATH": "invgrid"}, is_package=True,
        ),
    ]  # fmt: skip


ADAPTERS = {
    "late_interaction_kernels": _late_interaction_kernels,
    "flash_maxsim": _flash_maxsim,
}


def unpack_wheels(folder: Path) -> list[str]:
    """Put the rivals' wheels of ``folder`` on sys.path; both are pure Python. Their file names."""
    found = [path for path in sorted(folder.glob("*.whl")) if path.name.split("-")[0] in ADAPTERS]
    if found:
        # kept for the process's life: Triton reads its kernels' source files
        place = tempfile.mkdtemp(prefix="bagformer_rivals_")
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        for path in found:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(place)
        sys.path.append(place)
    return [path.name for path in found]


def _shape_of(function: Callable) -> list[tuple]:
    found = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in found]


def _compare(module: ModuleType, stub: SimpleNamespace) -> list[str]:
    """Functions that the adapters use and that the package does not have as they know them."""
    return [
        name
        for name, known in vars(stub).items()
        if not hasattr(module, name) or _shape_of(getattr(module, name)) != _shape_of(known)
    ]


def _load(name: str) -> tuple[ModuleType | None, dict[str, Any]]:
    info: dict[str, Any] = {"wanted": stubs.WANTED[name], "version": None, "reason": None}
    try:
        info["version"] = version(stubs.WHEELS[name])
        module = importlib.import_module(name)
    except PackageNotFoundError:
        info["reason"] = f"no wheel of {stubs.WHEELS[name]} in the folder, and not installed"
        return None, info
    except Exception as error:  # whatever its import does
        info["reason"] = f"its import failed: {reason_of(error)}"
        return None, info
    info["changed"] = _compare(module, stubs.MODULES[name])
    return module, info


def packages(dry: bool) -> tuple[dict[str, Variant], dict[str, Any]]:
    """Variants of the packages that are here, and what was found of each package.

    In a dry run the stubs are called in the packages' place.
    """
    os.environ.setdefault("LIK_SUPPRESS_NORM_WARN", "1")  # its check waits for the device once
    folder = Path(os.environ.get("BAGFORMER_RIVAL_WHEELS") or WHEELS)
    wheels = unpack_wheels(folder)
    variants: dict[str, Variant] = {}
    found: dict[str, Any] = {}
    for name, adapt in ADAPTERS.items():
        module, info = _load(name)
        found[name] = {**info, "wheels": [one for one in wheels if one.startswith(name)]}
        if dry or module is not None:
            made = adapt(stubs.MODULES[name] if dry else module)
            variants.update({one.name: one for one in made})
    return variants, found


def step_of(
    variant: Variant, text: Tensor, image: Tensor, mask: Tensor | None, slopes: Scores
) -> Callable[[], tuple[Tensor, ...]]:
    """A training step without an optimiser: scores, then gradients under fixed slopes."""
    leaves = text.detach().requires_grad_(), image.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        with environment(**variant.backward_environment):
            return torch.autograd.grad(variant.train(*leaves, mask), leaves, slopes)

    return step
