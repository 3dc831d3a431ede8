"""The training losses of BagFormer and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagformer.losses import (
    check_positives,
    gathered_loss,
    positives_from_ids,
)
from bagformer.losses.distributed import Rule
from bagformer.losses.layout import Sides, need_processes, own_columns, refuse_together
from bagformer.losses.objectives import check_ids, check_positives_shape
from bagformer.models.fusion import draw_negatives, given_negatives, match
from bagformer.ops.contrastive_loss import contrastive_loss
from bagformer.reference import accumulation_dtype

# The paper's total: CLS tokens against CLS tokens, matching, and late interaction, evenly.
PAPER_TOTAL: dict[str, float] = {"ita": 1.0, "itm": 1.0, "twc": 1.0}


class Labels(NamedTuple):
    """What belongs together, as in :meth:`bagformer.losses.BagwiseContrastiveLoss.forward`."""

    positives: Tensor | None = None
    text_ids: Tensor | None = None
    image_ids: Tensor | None = None


def check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """``PAPER_TOTAL`` for None; otherwise the weights above 0, of losses that exist."""
    if weights is None:
        return dict(PAPER_TOTAL)
    for name, value in weights.items():
        if name not in PAPER_TOTAL:
            raise ValueError(
                f"loss_weights may hold {', '.join(PAPER_TOTAL)}, got the unknown name {name!r}"
            )
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"loss_weights {name!r} must be a number of at least 0, got {value!r}")
    return {name: float(weights[name]) for name in PAPER_TOTAL if weights.get(name)}


def add_losses(
    model: Any,
    output: Any,
    labels: Labels,
    itm_negatives: tuple[Tensor, Tensor] | None,
    weights: Mapping[str, float] | None,
) -> None:
    """Write the losses of a ``BagFormerForRetrieval`` into its output, and ``loss``, their sum.

    A loss of weight 0, or one that the model has no part for, stays None.
    """
    batch, images = output.text_to_image.shape
    wanted = check_weights(weights)
    if model.twc_loss is None:
        wanted.pop("twc", None)
    if model.itm_head is None:
        wanted.pop("itm", None)
    if not wanted:
        raise ValueError(f"loss_weights leave nothing that this model computes, got {weights}")
    positives = _positives_here(model, labels, (batch, images), "itm" in wanted)
    if "twc" in wanted:
        output.loss_twc = _late_interaction(model, output, labels, positives)
    logits: Any = None
    if "ita" in wanted or model.config.hard_negatives:
        logits = _similarity(output.text_cls, output.image_cls) / model.cls_temperature()
    if "ita" in wanted:
        output.loss_ita = _cls_tokens(model, output, labels, positives, logits)
    if "itm" in wanted:
        _add_matching(model, output, positives, itm_negatives, logits)
    parts = [
        (wanted[name], getattr(output, f"loss_{name}")) for name in PAPER_TOTAL if name in wanted
    ]
    weighted = [loss if weight == 1.0 else weight * loss for weight, loss in parts]
    output.loss = sum(weighted[1:], weighted[0])


def _similarity(text_cls: Tensor, image_cls: Tensor) -> Tensor:
    """Inner products ``[B, B]`` in at least float32, under autocast too."""
    wide = accumulation_dtype(text_cls.dtype)
    with torch.autocast(text_cls.device.type, enabled=False):
        return text_cls.to(wide) @ image_cls.to(wide).t()


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _positives_here(
    model: Any, labels: Labels, sizes: tuple[int, int], matching: bool
) -> Tensor | None:
    """``[B, B]`` of this process's own pairs, or None for the diagonal."""
    batch, images = sizes
    if model.loss_gather == "none":
        return _checked(labels, batch, images, slice(0, images), images, matching)
    need_processes(model.loss_gather)
    refusal: Exception | None = None
    found: Tensor | None = None
    width, own = own_columns(images, model.loss_group)
    try:
        found = _checked(labels, batch, images, own, width, matching)
    except (TypeError, ValueError) as error:
        refusal = error
    # or the others would wait in the losses for the one that gave up here
    refuse_together(refusal, model.loss_group)
    return found


def _checked(
    labels: Labels, batch: int, images: int, own: slice, width: int, matching: bool
) -> Tensor | None:
    """``positives [B, images]``: the columns ``own`` of the ``width`` that the labels have, or
    None where there are no labels."""
    if batch != images:
        raise ValueError(f"the losses need as many texts as images, got {batch} and {images}")
    positives, *ids = labels
    if any(one is not None for one in ids):
        if positives is not None:
            raise ValueError("give positives or text_ids and image_ids, not both")
        for name, one in zip(("text_ids", "image_ids"), ids, strict=True):
            check_ids(name, one, batch, images)
        return positives_from_ids(*ids)
    if positives is None:
        return None
    check = check_positives_shape if _compiling() or width > images else check_positives
    check(positives, (batch, width))
    positives = positives[:, own]
    if matching and not _compiling() and not bool(positives.diagonal().all()):
        row = int((~positives.diagonal()).nonzero()[0])
        raise ValueError(
            f"loss_itm takes text b and image b for a match, but positives[{row}, "
            f"{own.start + row}] is False; order the pairs so, or leave itm out of loss_weights"
        )
    return positives


def _late_interaction(model: Any, output: Any, labels: Labels, positives: Tensor | None) -> Tensor:
    loss = model.twc_loss
    if model.loss_gather == "none":
        return loss.from_scores(output.text_to_image, output.image_to_text, positives)
    sides = Sides(output.text_features, output.image_features, output.text_mask, None, *labels)
    options = loss.rule(), model.loss_gather, loss.temperature(), loss.bias
    return gathered_loss(sides, *options, model.loss_group)


def _cls_tokens(
    model: Any, output: Any, labels: Labels, positives: Tensor | None, logits: Tensor
) -> Tensor:
    if model.loss_gather == "none":
        return contrastive_loss(logits, logits.t(), positives=positives)
    # one bag and one patch each: late interaction is the inner product
    sides = Sides(output.text_cls[:, None], output.image_cls[:, None], None, None, *labels)
    options = Rule(), model.loss_gather, model.cls_temperature(), None
    return gathered_loss(sides, *options, model.loss_group)


def _add_matching(
    model: Any, output: Any, positives: Tensor | None, itm_negatives: Any, logits: Tensor | None
) -> None:
    """Negatives come from this process's pairs, never from ``positives``."""
    batch, device = len(output.text_cls), output.text_cls.device
    if itm_negatives is not None:
        negatives = given_negatives(itm_negatives, batch, device)
    else:
        if positives is None:
            positives = torch.eye(batch, dtype=torch.bool, device=device)
        negatives = draw_negatives(positives, logits if model.config.hard_negatives else None)
    output.loss_itm, output.itm_logits, output.itm_labels = match(
        model.text_model,
        model.itm_head,
        output.text_embeds,
        output.text_attention_mask,
        output.image_embeds,
        negatives,
    )
