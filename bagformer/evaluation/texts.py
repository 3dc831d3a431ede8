"""The features of all queries, under either protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bagformer.ops.bag_pool import bag_pool
from bagformer.ops.l2_normalize import l2_normalize


class TextSide(NamedTuple):
    """``features [Nt, N, D]`` with ``mask [Nt, N]``; ``embeds [Nt, L, H]`` and ``attention
    [Nt, L]`` are what the matching head reads."""

    features: Tensor
    mask: Tensor
    embeds: Tensor
    attention: Tensor


def _widen(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate over axis 0, filling axis 1 with zeros up to the widest."""
    width = max(row.shape[1] for row in rows)
    whole = rows[0].new_zeros(sum(map(len, rows)), width, *rows[0].shape[2:])
    start = 0
    for row in rows:
        whole[start : start + len(row), : row.shape[1]] = row
        start += len(row)
    return whole


def _corrected(model: Any, inputs: Any) -> TextSide:
    output = model.get_text_features(**inputs)
    return TextSide(
        output.text_features, output.text_mask, output.text_embeds, output.text_attention_mask
    )


def _original(model: Any, inputs: Any) -> TextSide:
    """What the original's evaluation compares, which is not what its training compares.

    Late fusion without bags: each *feature* is normalised over the 25 positions, and every position
    counts. Early fusion: the offsets of tokens cut bags out of what are already bags.
    """
    output = model.get_text_features(**inputs)
    states, attention = output.text_embeds, output.text_attention_mask
    if model.config.fusion == "early":
        # padded to the length of the tokens with zeros, behind the encoder
        room = inputs["input_ids"].shape[1] - states.shape[1]
        states, attention = F.pad(states, (0, 0, 0, room)), F.pad(attention, (0, room))
        features = l2_normalize(model.text_proj(bag_pool(states, inputs["bag_offsets"])))
        mask = inputs["bag_mask"].bool()
        features = features.masked_fill(~mask[..., None], 0.0)
    elif model.config.interaction == "bagwise":
        features, mask = output.text_features, output.text_mask
    else:
        features = F.normalize(model.text_proj(states), dim=1)
        if model.config.interaction == "cls_token":
            features = features[:, :1]
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return TextSide(features, mask, states, attention)


@torch.inference_mode()
def encode_queries(
    model: Any, processor: Any, texts: Sequence[str], *, batch_size: int, progress: Any = None
) -> TextSide:
    """Encode ``texts`` in their order, under the protocol of the model's configuration.

    Under ``original`` the composition of a batch is part of the result. ``progress`` is called with
    the size of each batch. Raises ValueError without texts.
    """
    if not texts:
        raise ValueError("queries: there are none")
    device = next(model.parameters()).device
    encode = _original if model.config.protocol == "original" else _corrected
    sides: list[TextSide] = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        sides.append(encode(model, processor(text=batch).to(device)))
        if progress is not None:
            progress(len(batch))
    return TextSide(*(_widen(field) for field in zip(*sides, strict=True)))
