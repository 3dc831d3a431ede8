"""Who scores texts with images: ours, the plain ways of rivals.py, and packages.

A contender takes ``text [Nt, N, D]``, ``image [Ni, P, D]``, ``text_mask`` and ``image_mask`` and
gives ``text_to_image`` and ``image_to_text``, or None for a direction that it cannot do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from cases import Arguments, Call, Case, Contender, Op, Results, plain
from rivals import Function, einsum_scores, one_matmul, per_image_matmul, seed_loops
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bagformer import maxsim, maxsim_topk

K = 10
HELD = 1 << 21  # similarities that the truth holds at once


def arguments(case: Case) -> Arguments:
    """Unit features and masks; a side without padding has no mask. Of those that are ranked, every
    eighth image is there twice: ties."""
    maker = torch.Generator().manual_seed(0)
    unit, dtype = torch.nn.functional.normalize, getattr(torch, case.dtype)
    text = unit(torch.randn(case.texts, case.bags, case.width, generator=maker), dim=-1)
    image = unit(torch.randn(case.images, case.patches, case.width, generator=maker), dim=-1)
    if case.kind == "topk":
        image[1::8] = image[::8][: len(image[1::8])]
    text_mask = torch.arange(case.bags) < case.bag_counts()[:, None]
    image_mask = torch.arange(case.patches) < case.patch_counts()[:, None]
    masks = [None if mask.all() else mask for mask in (text_mask, image_mask)]
    return text.to(dtype), image.to(dtype), *masks


def ours(text: Tensor, image: Tensor, text_mask: Any = None, image_mask: Any = None) -> Results:
    scores = maxsim(text, image, text_mask=text_mask, image_mask=image_mask)
    return scores.text_to_image, scores.image_to_text


def _jagged(text: Tensor, image: Tensor, text_mask: Any = None, image_mask: Any = None) -> Any:
    if image_mask is None:
        return text, image, text_mask, None
    rows = [one[keep].clone() for one, keep in zip(image, image_mask, strict=True)]
    return text, torch.nested.nested_tensor(rows, layout=torch.jagged), text_mask, None


def _nested(case: Case) -> Call | str:
    return ours if case.kind == "nested" else "is ours without padded images"


def _truth_of_some(text: Tensor, image: Tensor, text_mask: Any, image_mask: Any) -> Any:
    similar = text.flatten(0, 1) @ image.flatten(0, 1).t()
    similar = similar.view(*text.shape[:2], *image.shape[:2])
    to_image, to_text = similar, similar
    if image_mask is not None:
        to_image = similar.masked_fill(~image_mask, -torch.inf)
    if text_mask is not None:
        to_text = similar.masked_fill(~text_mask[:, :, None, None], -torch.inf)
    bags, patches = to_image.amax(3), to_text.amax(1)
    if text_mask is not None:
        bags = bags * text_mask[:, :, None]
    if image_mask is not None:
        patches = patches * image_mask
    return bags.sum(1), patches.sum(2).t()


def truth(text: Tensor, image: Tensor, text_mask: Any = None, image_mask: Any = None) -> Results:
    """Every similarity, of a few texts at a time; a gradient's way back computes them again."""
    step = max(1, HELD // (text.shape[1] * image.shape[0] * image.shape[1]))
    masks = [None] * len(text) if text_mask is None else text_mask.split(step)
    parts = [
        checkpoint(_truth_of_some, some, image, mask, image_mask, use_reentrant=False)
        for some, mask in zip(text.split(step), masks, strict=False)
    ]
    to_image, to_text = zip(*parts, strict=True)
    return torch.cat(to_image), torch.cat(to_text, 1)


def _compiled(case: Case) -> Call | str:
    if case.texts * case.images > 4096:
        return "not tried: it holds every similarity, and minutes of warm-up"
    return torch.compile(einsum_scores, dynamic=False)


def _holding(function: Function) -> Callable[[Case], Call | str]:
    """A contender that holds every similarity."""

    def make(case: Case) -> Call | str:
        held = case.texts * case.images * case.bags * case.patches * 4
        return (
            function if held <= 2**31 else f"not tried: its similarities take {held / 1e9:.1f} GB"
        )

    return make


def _late_interaction(case: Case) -> Call | str:
    if case.kind == "nested":
        return "its other direction has no mask for what it streams over"
    module: Any = importlib.import_module("late_interaction_kernels")

    def both(text: Tensor, image: Tensor, text_mask: Any = None, image_mask: Any = None) -> Results:
        to_image = module.maxsim(text, image, q_mask=text_mask)
        return to_image, module.maxsim(image, text, d_mask=text_mask)

    return both


def _maxsim_cpu(case: Case) -> Call | str:
    if case.dtype != "float32" or case.kind not in ("scores", "rerank"):
        return "takes float32 scores without masks only"
    module: Any = importlib.import_module("maxsim_cpu")

    def to_image(text: Tensor, image: Tensor, *masks: Any) -> Results:
        documents = image.numpy()
        rows = [torch.from_numpy(module.maxsim_scores(one.numpy(), documents)) for one in text]
        return torch.stack(rows), None

    return to_image


def _numkong_packed(text: Tensor, image: Tensor, *masks: Any) -> Arguments:
    module: Any = importlib.import_module("numkong")
    return tuple([module.maxsim_pack(one.numpy()) for one in side] for side in (text, image))


def _numkong(case: Case) -> Call | str:
    if case.dtype != "float32" or case.kind not in ("scores", "rerank"):
        return "takes scores without masks or gradients only, and no bfloat16 of PyTorch's"
    if case.texts * case.images > 4096:
        return "not tried: a call a pair"
    module: Any = importlib.import_module("numkong")
    tokens = case.bags, case.patches

    def one_way(ours: list, theirs: list, count: int) -> Tensor:
        # it gives the sum over tokens of 1 - cosine
        rows = [[count - module.maxsim_packed(a, b) for b in theirs] for a in ours]
        return torch.tensor(rows)

    def both(text: list, image: list) -> Results:
        return one_way(text, image, tokens[0]), one_way(image, text, tokens[1])

    return both


MAXSIM = Op(
    arguments,
    truth,
    (
        Contender("ours", plain(ours)),
        Contender("ours_nested", _nested, layout=_jagged),
        Contender("seed_loops", plain(seed_loops)),
        Contender("einsum", _holding(einsum_scores)),
        Contender("compiled_einsum", _compiled),
        Contender("one_matmul", _holding(one_matmul)),
        Contender("per_image_matmul", plain(per_image_matmul)),
        Contender("late_interaction_kernels", _late_interaction, "late_interaction_kernels"),
        Contender("maxsim_cpu", _maxsim_cpu, "maxsim_cpu", alone=True),
        Contender("numkong", _numkong, "numkong", inexact=0.1, layout=_numkong_packed),
    ),
    leaves=2,
)


def _best(scores: Tensor) -> Results:
    return scores.topk(min(K, scores.shape[1])).values, None


def _topk(text: Tensor, image: Tensor, *masks: Any) -> Results:
    return tuple(maxsim_topk(text, image, min(K, len(image))))


def _matrix_topk(text: Tensor, image: Tensor, *masks: Any) -> Results:
    return _best(maxsim(text, image, directions="text_to_image").text_to_image)


def _loops_topk(text: Tensor, image: Tensor, *masks: Any) -> Results:
    rows = [torch.matmul(image, one.t()).amax(1).float().sum(-1) for one in text]
    return _best(torch.stack(rows))


def _blocks_topk(text: Tensor, image: Tensor, *masks: Any) -> Results:
    """einsum over 64 images at a time, so that its similarities stay small."""
    blocks = [torch.einsum("tnd,ipd->tinp", text, part).amax(3) for part in image.split(64)]
    return _best(torch.cat([block.float().sum(2) for block in blocks], 1))


def _topk_truth(text: Tensor, image: Tensor, *masks: Any) -> Results:
    scores = truth(text, image)[0]
    # float64 sums of the same numbers may differ by where they lie: images that are there twice
    # have one score
    same = torch.arange(len(image))
    twice = (image[1:] == image[:-1]).flatten(1).all(1).nonzero()[:, 0]
    same[twice + 1] = twice
    return _best(scores)[0], scores[:, same]


TOPK = Op(
    arguments,
    _topk_truth,
    (
        Contender("ours", plain(_topk)),
        Contender("maxsim_then_topk", plain(_matrix_topk)),
        Contender("seed_loops", plain(_loops_topk)),
        Contender("einsum", plain(_blocks_topk)),
    ),
    leaves=2,
)
