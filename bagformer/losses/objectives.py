"""Who belongs together, and sums over pairs for losses that lie over many processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagformer.reference import accumulation_dtype


def check_positives(positives: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``positives`` is bool ``shape``, each row and column with a True."""
    check_positives_shape(positives, shape)
    for dim, what in ((1, "row"), (0, "column")):
        empty = (~positives.any(dim=dim)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"positives has no True in {what} {empty[0]}")


def check_positives_shape(positives: Any, shape: tuple[int, int]) -> None:
    """Raise unless ``positives`` is a bool tensor of ``shape``."""
    if not isinstance(positives, Tensor):
        raise TypeError(f"positives must be a torch.Tensor, got {type(positives).__name__}")
    if positives.dtype != torch.bool:
        raise ValueError(f"positives must be bool, got {positives.dtype}")
    if tuple(positives.shape) != tuple(shape):
        raise ValueError(f"positives must be {list(shape)}, got {list(positives.shape)}")


def check_ids(name: str, ids: Any, texts: int, images: int) -> None:
    """Raise unless ``ids`` is None or int64 ``[B]`` of a batch of ``B`` pairs."""
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.long:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if texts != images:
        raise ValueError(
            f"{name} needs pairs, as many texts as images: got {texts} and {images}. "
            "Say with positives which images belong to which text"
        )
    if tuple(ids.shape) != (texts,):
        raise ValueError(f"{name} must be [{texts}], got {list(ids.shape)}")


def positives_from_ids(text_ids: Tensor | None, image_ids: Tensor | None) -> Tensor:
    """``[B, B]`` bool: text a and image b belong together.

    Item b is a pair, text b with image b. Text a and image b are positive if a is b, if both pairs
    have the same text (``text_ids[a] == text_ids[b]``) or the same image (``image_ids[a] ==
    image_ids[b]``). ``text_ids`` and ``image_ids`` are int64 ``[B]``; either may be None; ids of
    the two kinds are never compared with each other.
    """
    given = [ids for ids in (text_ids, image_ids) if ids is not None]
    if not given:
        raise ValueError("give text_ids, image_ids or both")
    for name, ids in (("text_ids", text_ids), ("image_ids", image_ids)):
        check_ids(name, ids, len(given[0]), len(given[0]))
    same = torch.eye(len(given[0]), dtype=torch.bool, device=given[0].device)
    for ids in given:
        same = same | (ids[:, None] == ids[None, :])
    return same


def logistic_sum(logits: Tensor, positives: Tensor) -> Tensor:
    """Sum over all pairs of log sigmoid(z * logit)."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return F.logsigmoid(torch.where(positives, logits, -logits)).sum()
