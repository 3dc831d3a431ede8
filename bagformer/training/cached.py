"""A batch encoded in pieces: the loss of the whole batch at the memory of one piece."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bagformer.training.config import ConfigError
from bagformer.training.gradient_cache import cached_step
from bagformer.training.step import TrainStep

_TEXT_KEYS = ("input_ids", "attention_mask", "bag_offsets", "bag_mask")


def check_cachable(weights: dict[str, float]) -> None:
    """Raise ConfigError if a loss of weight above 0 needs all of a batch at once."""
    if "itm" in weights:
        raise ConfigError(
            "mini_batch: the matching loss cannot be computed in pieces; set loss.itm to 0 or "
            "model.use_itm_head to false"
        )


def cached_losses(
    step: TrainStep,
    inputs: dict[str, Tensor],
    positives: tuple[Tensor, Tensor | None],
    size: int,
    scale: float,
) -> dict[str, Tensor]:
    """As a :class:`TrainStep` gives them for ``positives`` (own and wide); ``scale`` times the
    gradient is added to ``.grad``.

    Raises ConfigError with a matching head: its pairs need whole encoder outputs.
    """
    check_cachable(step.weights)
    model, device = step.model, positives[0].device
    found: dict[str, Tensor] = {}

    def encode_text(chunk: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        with step.autocast(device):
            text = model.get_text_features(*(chunk.get(key) for key in _TEXT_KEYS))
        return text.text_features, text.text_mask, text.text_cls

    def encode_image(chunk: Tensor) -> Tensor:
        with step.autocast(device):
            return model.get_image_features(chunk).image_features

    def loss(text: Tensor, image: Tensor, text_mask: Tensor, text_cls: Tensor) -> Tensor:
        losses, _, accuracy = step.contrast(text, text_mask, text_cls, image, *positives)
        totals = step.total(losses)
        found.update(totals, loss=totals["loss"].detach(), accuracy=accuracy)
        return totals["loss"] * scale

    texts = {key: inputs[key].split(size) for key in _TEXT_KEYS if key in inputs}
    count = len(inputs["input_ids"].split(size))
    text_chunks: list[Any] = [{key: parts[i] for key, parts in texts.items()} for i in range(count)]
    cached_step(encode_text, encode_image, text_chunks, inputs["pixel_values"].split(size), loss)
    return found
