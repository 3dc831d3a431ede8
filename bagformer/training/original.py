"""The original's training step in parts: losses of each interaction, groups, learning rates.

Nothing here reads files or draws batches; ``bagformer train-muge`` puts the parts together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagformer.models.conversion import from_original
from bagformer.models.fusion import Negatives, match
from bagformer.ops.maxsim import maxsim

# Iterations that one step of the warm-up lasts.
WARMUP_STRIDE = 100
# Parts of the model that the baselines keep a slow copy of, by the original's names.
_COPIED = {
    "visual_encoder": "vision_model.backbone",
    "text_encoder": "text_model",
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two groups of the original, without decay first.

    Only vectors and biases go without: unlike what is usual, the temperature (which has no
    dimension), the CLS token and the embeddings decay.
    """
    without: list[Any] = []
    decayed: list[Any] = []
    for name, value in model.named_parameters():
        if value.requires_grad:
            (without if value.dim() == 1 or name.endswith(".bias") else decayed).append(value)
    return [
        {"params": without, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """``opt: adamW`` of the original's config."""
    groups = param_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


def learning_rate(
    time: int, *, lr: float, epochs: int, warmup_epochs: int, warmup_lr: float, min_lr: float
) -> float:
    """The rate at the schedule's own ``time``, which :func:`schedule_time` gives.

    Linear from ``warmup_lr`` to ``lr`` while ``time < warmup_epochs``, then half a cosine over
    ``epochs``, then ``min_lr``.
    """
    if time < warmup_epochs:
        return warmup_lr + time * (lr - warmup_lr) / warmup_epochs
    place = time - warmup_epochs
    if place >= epochs:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * place / epochs))


def schedule_time(epoch: int, iteration: int, warmup_epochs: int) -> int:
    """The schedule's time that is in force in an iteration, both counted from 0.

    The whole warm-up lies in epoch 0, one step every 100 iterations, each taken behind its
    iteration; after it the time moves between epochs only.
    """
    if epoch:
        return epoch + warmup_epochs
    return min(max(iteration - 1, 0) // WARMUP_STRIDE, warmup_epochs)


def alpha_at(alpha: float, epoch: int, iteration: int, per_epoch: int, warm_up: bool) -> float:
    """The weight of the slow copies' opinion, which grows over epoch 0 if ``warm_up``."""
    if epoch or not warm_up:
        return alpha
    return alpha * min(1.0, iteration / per_epoch)


@dataclass
class Slow:
    """What the baselines compare with: slow copies of the encoders and fixed queues.

    ``image_queue`` and ``text_queue`` ``[D, Q]``, ``idx_queue [1, Q]`` int64. The original never
    puts anything into the queues. ``copies`` are of our modules, by the original's names, and draw
    dropout as the model does.
    """

    copies: dict[str, nn.Module]
    image_queue: Tensor
    text_queue: Tensor
    idx_queue: Tensor
    momentum: float = 0.995

    def to(self, device: torch.device | str) -> Slow:
        """Move everything to ``device``."""
        for copied in self.copies.values():
            copied.to(device)
        for name in ("image_queue", "text_queue", "idx_queue"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Move every copy towards the model, as each forward of the original does."""
        for name, copied in self.copies.items():
            copied.train(model.training)
            own = model.get_submodule(_COPIED[name])
            for slow, fast in zip(copied.parameters(), own.parameters(), strict=True):
                slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)

    @torch.no_grad()
    def features(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """CLS features ``[B, D]`` of the texts and of the pictures by the copies."""
        encoder = copy.copy(model.vision_model)
        encoder._modules = {**encoder._modules, "backbone": self.copies["visual_encoder"]}
        tokens, _ = encoder(inputs["pixel_values"])
        states = self.copies["text_encoder"](
            inputs["input_ids"], inputs["attention_mask"], mode="text"
        ).last_hidden_state
        text = self.copies["text_proj"](states[:, 0])
        image = self.copies["vision_proj"](tokens[:, 0])
        return F.normalize(text, dim=-1), F.normalize(image, dim=-1)


def make_slow(
    model: Any, tensors: Mapping[str, Tensor], *, queue_size: int, momentum: float = 0.995
) -> Slow:
    """The slow part of a checkpoint, ``tensors`` by the original's names.

    Copies that the checkpoint lacks start as the model is. The queues are random unit vectors, as
    the original throws the checkpoint's away, unless ``queue_size`` is 0, which takes them from
    ``tensors``. Draws from torch's global generator. Raises ValueError for wrong shapes.
    """
    copies: dict[str, nn.Module] = {}
    for name, ours in _COPIED.items():
        copied = copy.deepcopy(model.get_submodule(ours)).requires_grad_(False)
        start = f"{name}_m."
        found = {
            from_original(f"{name}.{key.removeprefix(start)}").removeprefix(f"{ours}."): value
            for key, value in tensors.items()
            if key.startswith(start) and not key.endswith("position_ids")
        }
        known = copied.state_dict()
        for key, value in found.items():
            if key in known and known[key].shape != value.shape:
                raise ValueError(
                    f"{start}{key} is {list(value.shape)}, expected {list(known[key].shape)}"
                )
        copied.load_state_dict({key: value for key, value in found.items() if key in known}, False)
        copies[name] = copied
    size = model.config.embed_dim
    if queue_size:
        image_queue, text_queue = (
            F.normalize(torch.randn(size, queue_size), dim=0) for _ in range(2)
        )
        idx_queue = torch.full((1, queue_size), -100)
    else:
        image_queue, text_queue = tensors["image_queue"], tensors["text_queue"]
        idx_queue = torch.full((1, image_queue.shape[1]), -100)
    recorded = tensors.get("idx_queue")
    if recorded is not None and recorded.shape == idx_queue.shape:
        idx_queue = recorded.long()
    return Slow(copies, image_queue, text_queue, idx_queue, momentum)


def _draw(weights: Tensor) -> Tensor:
    # one draw per row, as the original's random stream has it
    return torch.cat([torch.multinomial(row, 1) for row in weights])


def _negatives(text_weights: Tensor, image_weights: Tensor) -> Negatives:
    every = torch.arange(len(text_weights), device=text_weights.device)
    return Negatives(every, _draw(text_weights), every, _draw(image_weights))


def baseline_losses(
    model: Any,
    slow: Slow,
    inputs: Mapping[str, Tensor],
    idx: Tensor,
    *,
    alpha: float = 0.0,
    distill: bool = False,
    negatives: Negatives | None = None,
) -> dict[str, Tensor]:
    """``ita``, ``itm`` and, for ``tokenwise``, ``twc`` of one batch of the two baselines.

    ``idx [B]`` names the pairs: equal ones, in the batch or the queue, are positives of each other.
    The slow copies move first. ``inputs`` as the model takes them; ``negatives`` None draws them by
    similarity. Raises ValueError if a row has no negative.
    """
    slow.update(model)
    slow_text, slow_image = slow.features(model, inputs)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    image = model.get_image_features(inputs["pixel_values"])
    texts = torch.cat([slow_text.t(), slow.text_queue], dim=1)
    images = torch.cat([slow_image.t(), slow.image_queue], dim=1)
    column = idx.view(-1, 1)
    same = (column == torch.cat([column.t(), slow.idx_queue], dim=1)).float()
    targets = same / same.sum(dim=1, keepdim=True)
    temperature = model.cls_temperature()
    losses, logits = [], []
    for own, slow_own, others in (
        (image.image_cls, slow_image, texts),
        (text.text_cls, slow_text, images),
    ):
        wanted = targets
        if distill:
            with torch.no_grad():
                opinion = (slow_own @ others / temperature).softmax(dim=1)
                wanted = alpha * opinion + (1 - alpha) * targets
        logits.append(own @ others / temperature)
        losses.append(-(logits[-1].log_softmax(dim=1) * wanted).sum(dim=1).mean())
    if negatives is None:
        batch = len(idx)
        mine = column == column.t()
        with torch.no_grad():
            of_image, of_text = (
                # NaN is for the loss to show: a draw by it would only fail
                (part[:, :batch] + 1e-4).softmax(dim=1).nan_to_num(1.0).masked_fill(mine, 0.0)
                for part in logits
            )
        if mine.all(dim=1).any():
            raise ValueError("idx: every pair of the batch is a positive of some pair")
        negatives = _negatives(of_text, of_image)
    found = {"ita": sum(losses) / 2, "itm": _matching(model, text, image, negatives)}
    if model.config.interaction == "tokenwise":
        found["twc"] = _contrast(model, text, image)
    return found


def _matching(model: Any, text: Any, image: Any, negatives: Negatives) -> Tensor:
    return match(
        model.text_model,
        model.itm_head,
        text.text_embeds,
        text.text_attention_mask,
        image.image_embeds,
        negatives,
    ).loss


def _contrast(model: Any, text: Any, image: Any) -> Tensor:
    """The original's loss on both matrices of raw sums; only pair b, b is positive."""
    scores: Any = maxsim(
        text.text_features,
        image.image_features,
        text_mask=text.text_mask,
        **model.config.scoring,
    )
    own = torch.arange(len(scores.text_to_image), device=scores.text_to_image.device)
    both = (scores.image_to_text, scores.text_to_image)
    return sum((F.cross_entropy(part, own) for part in both), torch.zeros(())) / 2


def bagwise_losses(
    model: Any, inputs: Mapping[str, Tensor], *, negatives: Negatives | None = None
) -> dict[str, Tensor]:
    """``ita``, ``itm`` and ``twc`` of one batch of the bag-wise model.

    No slow copies and no queues. ``negatives`` None draws them evenly, images first. Raises
    ValueError for a batch of one, which has none.
    """
    text = model.get_text_features(
        *(inputs[name] for name in ("input_ids", "attention_mask", "bag_offsets", "bag_mask"))
    )
    image = model.get_image_features(inputs["pixel_values"])
    logits = text.text_cls @ image.image_cls.t() / model.cls_temperature()
    own = torch.arange(len(logits), device=logits.device)
    if negatives is None:
        if len(logits) < 2:
            raise ValueError("a batch of one pair has no negatives to match")
        weights = 1 - torch.eye(len(logits), device=logits.device)
        negatives = _negatives(weights, weights)
    return {
        "ita": (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2,
        "itm": _matching(model, text, image, negatives),
        "twc": _contrast(model, text, image),
    }
