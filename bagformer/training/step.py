"""The losses of one batch, in one go or in pieces."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bagformer.losses import gathered_loss
from bagformer.losses.distributed import Rule
from bagformer.losses.layout import Sides
from bagformer.models.fusion import draw_negatives, match
from bagformer.ops.contrastive_loss import contrastive_loss
from bagformer.ops.maxsim import maxsim
from bagformer.reference import accumulation_dtype
from bagformer.training.config import ConfigError, LossConfig


def active_losses(model: Any, options: LossConfig) -> dict[str, float]:
    """Weights of the losses that this model has and that are not switched off."""
    weights = {"ita": options.ita}
    if model.twc_loss is not None:
        weights["twc"] = options.twc
    if model.itm_head is not None:
        weights["itm"] = options.itm
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ConfigError("loss: every loss of this model has weight 0")
    return weights


def freeze_unreached(model: Any, weights: dict[str, float]) -> None:
    """Stop parameters that no loss reaches: they would break data-parallel training."""
    parts: list[Any] = []
    if "ita" not in weights:
        # hard negatives use it too, but no gradient comes from a draw
        model.temp.requires_grad_(False)
    if "ita" not in weights and "twc" not in weights:
        parts += [model.text_proj, model.vision_proj]
    if "twc" not in weights and model.twc_loss is not None:
        parts.append(model.twc_loss)
    if "itm" not in weights and model.itm_head is not None:
        parts += [model.itm_head, *model.text_model.encoder.layer[model.config.fusion_layer :]]
    for part in parts:
        part.requires_grad_(False)


class TrainStep(nn.Module):
    """A model's losses; what DistributedDataParallel wraps.

    Encoders run under autocast where ``precision`` is ``bf16``; scores and losses of the features
    are always float32 or better.
    """

    def __init__(self, model: Any, options: LossConfig, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.options, self.precision = model, options, precision
        self.weights = active_losses(model, options)
        if model.twc_loss is not None:
            # in the loss itself, so that what calls it need not know
            model.twc_loss.gather = options.gather

    def autocast(self, device: torch.device) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def forward(
        self, inputs: dict[str, Tensor], positives: Tensor, wide: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``loss``, the weighted sum, and detached ``loss_twc``, ``loss_ita``, ``loss_itm`` as far
        as they are there, and ``accuracy``.

        ``positives [B, B]`` bool; with ``gather`` also ``wide [B, world * B]``, for the pictures of
        all processes.
        """
        with self.autocast(positives.device):
            text = self.model.get_text_features(
                *(inputs.get(k) for k in ("input_ids", "attention_mask", "bag_offsets", "bag_mask"))
            )
            image = self.model.get_image_features(inputs["pixel_values"])
        losses, logits, accuracy = self.contrast(
            text.text_features,
            text.text_mask,
            text.text_cls,
            image.image_features,
            positives,
            wide,
        )
        if "itm" in self.weights:
            hard = logits if self.model.config.hard_negatives else None
            with self.autocast(positives.device):
                matched = match(
                    self.model.text_model,
                    self.model.itm_head,
                    text.text_embeds,
                    text.text_attention_mask,
                    image.image_embeds,
                    draw_negatives(positives, hard),
                )
            losses["itm"] = matched.loss
        return self.total(losses) | {"accuracy": accuracy}

    def total(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum, which has gradients, and each loss by name, which has none."""
        parts = [losses[name] * weight for name, weight in self.weights.items() if name in losses]
        found = {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        return {"loss": sum(parts[1:], parts[0]), **found}

    def contrast(
        self,
        text: Tensor,
        text_mask: Tensor,
        text_cls: Tensor,
        image: Tensor,
        positives: Tensor,
        wide_positives: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses of features ``[B, N, D]`` and ``[B, P, D]``, the logits of the CLS tokens, and the
        share of the texts whose best picture of this batch is a right one (by the CLS tokens with
        ``gather``, which has no scores of this batch alone)."""
        model = self.model
        wide = accumulation_dtype(text.dtype)
        text, text_cls, image = text.to(wide), text_cls.to(wide), image.to(wide)
        logits = text_cls @ image[:, 0].t() / model.cls_temperature()
        losses = {}
        if "ita" in self.weights and wide_positives is not None:
            # one bag and one patch each: late interaction is the inner product
            sides = Sides(text_cls[:, None], image[:, :1], None, None, wide_positives)
            gather, temperature = self.options.gather, model.cls_temperature()
            losses["ita"] = gathered_loss(sides, Rule(), gather, temperature, None, None)
        elif "ita" in self.weights:
            losses["ita"] = contrastive_loss(logits, logits.t(), positives=positives)
        ranked = logits
        if "twc" in self.weights and wide_positives is not None:
            losses["twc"] = model.twc_loss(text, image, text_mask, positives=wide_positives)
        elif "twc" in self.weights:
            scores = maxsim(
                text,
                image,
                text_mask=text_mask,
                **model.config.scoring,
            )
            losses["twc"] = model.twc_loss.from_scores(
                scores.text_to_image, scores.image_to_text, positives
            )
            ranked = scores.text_to_image
        best = ranked.detach().argmax(dim=1, keepdim=True)
        return losses, logits, positives.gather(1, best).float().mean()
