"""Late interaction of texts with images: all pairs, candidates of each text, or pairs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from bagformer.ops import _maxsim_ops  # noqa: F401  registers the operators
from bagformer.ops._checks import (
    check_alike,
    check_choice,
    check_features,
    check_flag,
    check_mask,
)
from bagformer.ops._library import dims, wants_grad
from bagformer.ops._maxsim_torch import argmax_dtype, widen_argmax
from bagformer.ops._nested import pad_nested
from bagformer.ops.backend import BACKENDS
from bagformer.reference import DIRECTIONS, MASK_MODES, REDUCTIONS, MaxSimScores

PRECISIONS = ("fp32", "tf32", "bf16")
ARGMAX_BUDGET = 1 << 30
BUDGET_ENVIRONMENT = "BAGFORMER_ARGMAX_BUDGET"


def saves_argmax(
    n_pairs: int, bags: int, patches: int, directions: str = "both", budget: int | None = None
) -> bool:
    """Whether the winners are kept for the backward, or computed again there.

    They are kept while all of them fit in ``budget`` bytes: ``BAGFORMER_ARGMAX_BUDGET`` of the
    environment, else 1 GiB. The gradients are the same either way; computing again costs a second
    forward.
    """
    if budget is None:
        budget = _budget_of_environment()
    each = 0
    if directions != "image_to_text":
        each += bags * argmax_dtype(patches).itemsize
    if directions != "text_to_image":
        each += patches * argmax_dtype(bags).itemsize
    return n_pairs * each <= budget


def _budget_of_environment() -> int:
    asked = os.environ.get(BUDGET_ENVIRONMENT)
    if not asked:
        return ARGMAX_BUDGET
    if not asked.isdecimal():
        raise ValueError(f"{BUDGET_ENVIRONMENT} must be a number of bytes, got {asked!r}")
    return int(asked)


def check_options(mask_mode: str, reduction: str, precision: str, backend: str) -> None:
    check_choice("mask_mode", mask_mode, MASK_MODES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, ("auto", *BACKENDS))


def check_sides(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    image_layouts: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Features and masks after all checks, nested tensors padded."""
    text, text_mask = pad_nested("text", text, "text_mask", text_mask)
    image, image_mask = pad_nested("image", image, "image_mask", image_mask)
    check_features("text", text, ("[Nt, N, D]",))
    check_features("image", image, image_layouts)
    check_alike("text", text, "image", image)
    check_mask("text_mask", text_mask, "text", text)
    check_mask("image_mask", image_mask, "image", image)
    return text, image, text_mask, image_mask


def maxsim(
    text: Tensor,
    image: Tensor,
    *,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    directions: str = "both",
    reduction: str = "sum",
    return_argmax: bool = False,
    precision: str = "fp32",
    backend: str = "auto",
) -> MaxSimScores:
    """Late interaction of every text with every image, in both directions from one pass.

    With ``S = text @ image.T`` for a pair, ``text_to_image`` sums over bags the maximum over
    patches, ``image_to_text`` sums over patches the maximum over bags. Nothing of the size of all
    similarities is ever held. ``bagformer.reference.maxsim`` is the contract in full.

    Args:
        text: ``[Nt, N, D]``, float32, bfloat16, float16 or float64, any strides; or a jagged
            ``torch.nested`` tensor ``[Nt, j, D]``, which brings its own mask.
        image: ``[Ni, P, D]`` for all pairs, ``[Nt, K, P, D]`` for K candidates of each text; or
            jagged ``[Ni, j, D]``. Same dtype and device as ``text``.
        text_mask: bool ``[Nt, N]``, True = counts.
        image_mask: bool ``[Ni, P]`` or ``[Nt, K, P]``.
        mask_mode: ``"exclude"``: a masked token never wins and adds nothing. ``"zero"``: it
            competes with similarity 0 and adds nothing.
        directions: ``"both"``, ``"text_to_image"`` or ``"image_to_text"``; the other score is None.
        reduction: ``"sum"``, or ``"mean"`` over the tokens that count.
        return_argmax: also say which token won each maximum.
        precision: the least that is accepted for float32 products, ``"fp32"``, ``"tf32"`` or
            ``"bf16"``. A backend may compute better: the C++ kernels are always exact float32.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"torch"`` or ``"reference"``; see
            ``explain_backend``.

    Returns:
        ``MaxSimScores(text_to_image [Nt, Ni], image_to_text [Ni, Nt], text_argmax [Nt, Ni, N],
        image_argmax [Ni, Nt, P])``; candidate form ``[Nt, K]``, ``[Nt, K]``, ``[Nt, K, N]``,
        ``[Nt, K, P]``. Scores are float32 (float64 for float64), argmax int32 with -1 for none.
        Differentiable once, in ``text`` and ``image``.

    Raises:
        TypeError: not a tensor, not a float, dtypes differ, a mask that is not bool.
        ValueError: wrong rank, feature sizes or devices differ, a mask of another shape, an
            unknown option.

    Example:
        >>> text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> image = torch.tensor([[[0.5, 0.0], [0.0, 0.25], [0.0, 0.0]]])
        >>> maxsim(text, image).text_to_image
        tensor([[0.7500]])
    """
    check_options(mask_mode, reduction, precision, backend)
    check_choice("directions", directions, DIRECTIONS)
    check_flag("return_argmax", return_argmax)
    text, image, text_mask, image_mask = check_sides(
        text, image, text_mask, image_mask, ("[Ni, P, D]", "[Nt, K, P, D]")
    )
    op = torch.ops.bagformer.maxsim
    n_pairs = text.shape[0] * image.shape[-3]
    if image.dim() == 4:
        op = torch.ops.bagformer.maxsim_candidates
        if image.shape[0] != text.shape[0]:
            raise ValueError(
                f"image [Nt, K, P, D] must have Nt = {text.shape[0]} as text, "
                f"got {dims(image.shape)}"
            )
    argmax = return_argmax or (
        wants_grad(text, image)
        and saves_argmax(n_pairs, text.shape[1], image.shape[-2], directions)
    )
    t2i, i2t, text_argmax, image_argmax, _ = op(
        text,
        image,
        text_mask,
        image_mask,
        mask_mode,
        directions,
        reduction,
        argmax,
        precision,
        backend,
    )
    wants_text, wants_image = directions != "image_to_text", directions != "text_to_image"
    return MaxSimScores(
        t2i if wants_text else None,
        i2t if wants_image else None,
        widen_argmax(text_argmax) if return_argmax and wants_text else None,
        widen_argmax(image_argmax) if return_argmax and wants_image else None,
    )


def maxsim_pairs(
    text: Tensor,
    image: Tensor,
    *,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    directions: str = "both",
    reduction: str = "sum",
    return_argmax: bool = False,
    precision: str = "fp32",
    backend: str = "auto",
) -> MaxSimScores:
    """Score text ``b`` with image ``b`` only: the candidate form with one candidate each.

    ``text [B, N, D]`` and ``image [B, P, D]`` give ``[B]`` for both directions, argmax ``[B, N]``
    and ``[B, P]``. Options and errors as :func:`maxsim`; ``B`` must agree.
    """
    check_options(mask_mode, reduction, precision, backend)
    text, image, text_mask, image_mask = check_sides(
        text, image, text_mask, image_mask, ("[B, P, D]",)
    )
    if text.shape[0] != image.shape[0]:
        raise ValueError(
            f"text and image must hold as many items each, got {text.shape[0]} texts and "
            f"{image.shape[0]} images"
        )
    scores = maxsim(
        text,
        image[:, None],
        text_mask=text_mask,
        image_mask=None if image_mask is None else image_mask[:, None],
        mask_mode=mask_mode,
        directions=directions,
        reduction=reduction,
        return_argmax=return_argmax,
        precision=precision,
        backend=backend,
    )
    return MaxSimScores(*(None if field is None else field[:, 0] for field in scores))
