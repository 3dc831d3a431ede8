"""Why a text and a picture match: what each bag adds, and which patch it chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagformer.ops.maxsim import maxsim_pairs
from bagformer.reference import accumulation_dtype


class BagMatch(NamedTuple):
    """One counting bag of a text against one picture.

    ``bag`` is its number in the text, ``text`` its characters, ``similarity`` that with the patch
    it chose, ``share`` its part of the score in per cent. ``patch`` counts as in
    ``image_features``: 0 is the whole picture (CLS token or mean), other patches lie row by row on
    the grid; ``cell`` is the (row, column), or None for the whole picture. ``heat [rows, columns]``
    holds the similarity with each patch of the grid.
    """

    bag: int
    text: str
    similarity: float
    share: float
    patch: int
    cell: tuple[int, int] | None
    heat: Tensor


class Explanation(NamedTuple):
    """``text_to_image`` and ``image_to_text`` are the pair's scores, ``bags`` its counting bags in
    the text's order, ``patch_bags [rows, columns]`` the number of the bag that each patch chose
    (-1: none) and ``whole_bag`` that of patch 0."""

    text_to_image: float
    image_to_text: float
    bags: list[BagMatch]
    patch_bags: Tensor
    whole_bag: int


def shares(similarities: Sequence[float]) -> list[float]:
    """Each value's part of the sum of absolute values, in per cent and with its sign."""
    total = sum(abs(value) for value in similarities)
    return [100.0 * value / total if total else 0.0 for value in similarities]


def _check(
    text: Tensor,
    image: Tensor,
    patch_grid: tuple[int, int],
    counting: list[int],
    bag_texts: Sequence[str],
) -> None:
    rows, columns = patch_grid
    if text.dim() != 2:
        raise ValueError(f"text: expected [N, D], got {list(text.shape)}")
    if image.dim() != 2 or image.shape[0] != 1 + rows * columns:
        raise ValueError(
            f"image: expected [1 + {rows} * {columns}, D] for patch_grid={tuple(patch_grid)}, "
            f"got {list(image.shape)}"
        )
    if counting and counting[-1] >= len(bag_texts):
        raise ValueError(
            f"bag_texts: bag {counting[-1]} counts, but only {len(bag_texts)} are named"
        )


def explain_pair(
    text: Tensor,
    image: Tensor,
    bag_texts: Sequence[str],
    patch_grid: tuple[int, int],
    *,
    text_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    reduction: str = "sum",
    **options: Any,
) -> Explanation:
    """Explain one pair: ``text [N, D]`` with ``text_mask [N]``, ``image [1 + rows * columns, D]``.

    ``bag_texts`` names the bags before padding. Scores and choices come from
    :func:`bagformer.maxsim_pairs`, to which ``options`` go. Raises ValueError if the shapes do not
    fit the grid or a counting bag has no name.
    """
    mask = text_mask
    if mask is None:
        mask = torch.ones(text.shape[:1], dtype=torch.bool, device=text.device)
    counting = mask.nonzero().flatten().tolist()
    _check(text, image, patch_grid, counting, bag_texts)
    rows, columns = patch_grid
    scores: Any = maxsim_pairs(
        text[None],
        image[None],
        text_mask=mask[None],
        mask_mode=mask_mode,
        reduction=reduction,
        return_argmax=True,
        **options,
    )
    wide = accumulation_dtype(text.dtype)
    similarity = text.to(wide) @ image.to(wide).T
    chosen = scores.text_argmax[0].tolist()
    best = [float(similarity[bag, chosen[bag]]) for bag in counting]
    matches = [
        BagMatch(
            bag,
            bag_texts[bag],
            value,
            share,
            chosen[bag],
            divmod(chosen[bag] - 1, columns) if chosen[bag] else None,
            similarity[bag, 1:].reshape(rows, columns),
        )
        for bag, value, share in zip(counting, best, shares(best), strict=True)
    ]
    choice = scores.image_argmax[0]
    return Explanation(
        float(scores.text_to_image[0]),
        float(scores.image_to_text[0]),
        matches,
        choice[1:].reshape(rows, columns),
        int(choice[0]),
    )
