"""Contrastive losses over late-interaction scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bagformer.losses.distributed import GATHERS, Rule, gathered_loss
from bagformer.losses.layout import Sides
from bagformer.losses.objectives import (
    check_ids,
    check_positives,
    positives_from_ids,
)
from bagformer.ops.contrastive_loss import check_scores, contrastive_loss
from bagformer.ops.maxsim import maxsim
from bagformer.reference import DIRECTIONS, MASK_MODES, OBJECTIVES, REDUCTIONS

# Where a learned temperature starts: sums over tokens are already large, means are not.
START = {"sum": 1.0, "mean": 0.07}
TEMPERATURE_RANGE = (0.01, 100.0)
# SigLIP's: nearly all pairs are negatives
BIAS_START = -10.0


# The loss of the paper; of its total, the losses on CLS tokens and of matching are the model's.
PAPER_LOSS: dict[str, Any] = {
    "directions": "both",
    "mask_mode": "zero",
    "reduction": "sum",
    "temperature": None,
    "objective": "softmax",
}


class BagwiseContrastiveLoss(nn.Module):
    """Contrastive loss over late-interaction scores of both directions.

    - ``directions``: ``both`` (the mean of the two losses), ``text_to_image`` or ``image_to_text``.
    - ``mask_mode``, ``reduction``: as in :func:`bagformer.ops.maxsim`.
    - ``temperature``: scores are divided by it. None: no division. A number: that one. ``learn``:
      ``exp(log_temperature)``, a parameter kept inside ``TEMPERATURE_RANGE``.
    - ``objective``: ``softmax``, cross-entropy over rows; or ``sigmoid``, each pair by itself as in
      SigLIP, where ``bias [2]`` (text_to_image, image_to_text), a parameter that starts at
      ``BIAS_START``, is added to the logits.
    - ``gather``: ``none``: this process's batch alone. ``local``: negatives from all processes of
      ``process_group`` (None: the default group), whose texts are gathered. ``ring``: the same
      result; texts go round, so a process holds only its own and one other process's.

    With ``gather`` every process returns the loss of the whole batch, and gradients follow the
    convention of DistributedDataParallel: see :func:`bagformer.losses.gathered_loss`.

    ``BagwiseContrastiveLoss(**PAPER_LOSS)`` is the loss of the paper. No tensor of the size texts x
    images x tokens x patches is made.
    """

    def __init__(
        self,
        directions: str = "both",
        mask_mode: str = "exclude",
        reduction: str = "sum",
        temperature: float | str | None = None,
        gather: str = "none",
        process_group: Any = None,
        objective: str = "softmax",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("directions", directions, DIRECTIONS),
            ("mask_mode", mask_mode, MASK_MODES),
            ("reduction", reduction, REDUCTIONS),
            ("gather", gather, GATHERS),
            ("objective", objective, OBJECTIVES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.directions, self.mask_mode, self.reduction = directions, mask_mode, reduction
        self.gather, self.process_group, self.objective = gather, process_group, objective
        self.fixed_temperature: float | None = None
        self.log_temperature: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.empty(2)) if objective == "sigmoid" else None
        if temperature == "learn":
            self.log_temperature = nn.Parameter(torch.empty(()))
        elif temperature is not None:
            number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
            if not number or not 0 < float(temperature) < math.inf:
                raise ValueError(
                    f"temperature must be None, 'learn' or a number above 0, got {temperature!r}"
                )
            self.fixed_temperature = float(temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put a learned temperature and the bias back to where they start."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(START[self.reduction]))
        if self.bias is not None:
            nn.init.constant_(self.bias, BIAS_START)

    def temperature(self) -> Tensor | float | None:
        """The temperature now in force, or None."""
        if self.log_temperature is None:
            return self.fixed_temperature
        low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
        if not self.training:
            return self.log_temperature.clamp(low, high).exp()
        # in place, because a clamp in the graph has no gradient to come back by
        with torch.no_grad():
            self.log_temperature.clamp_(low, high)
        return self.log_temperature.exp()

    def extra_repr(self) -> str:
        return (
            f"{self.directions}, mask_mode={self.mask_mode}, reduction={self.reduction}, "
            f"objective={self.objective}, gather={self.gather}"
        )

    def rule(self) -> Rule:
        """The options that decide what is computed."""
        return Rule(self.directions, self.mask_mode, self.reduction, self.objective)

    def from_scores(
        self, text_to_image: Tensor | None, image_to_text: Tensor | None, positives: Tensor | None
    ) -> Tensor:
        """The loss of score matrices ``[Nt, Ni]`` and ``[Ni, Nt]`` that are already there.

        Both are whole: ``gather`` plays no part here.
        """
        if positives is not None and not torch.compiler.is_compiling():
            check_positives(positives, check_scores(text_to_image, image_to_text)[1])
        return contrastive_loss(
            text_to_image,
            image_to_text,
            positives=positives,
            temperature=self.temperature(),
            bias=self.bias,
            objective=self.objective,
        )

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        positives: Tensor | None = None,
        text_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss.

        ``text [Nt, N, D]``, ``image [Ni, P, D]``, masks ``[Nt, N]`` and ``[Ni, P]`` (True =
        counts). Text b belongs to image b alone, unless one of these says otherwise:

        - ``positives [Nt, Ni]`` bool; with ``gather`` ``[Nt, images of all processes]``, in order
          of rank.
        - ``text_ids``, ``image_ids``, int64 ``[B]`` of the pairs (text b, image b), either or both:
          text a and image b are positive too if pairs a and b have equal text ids or equal image
          ids. The same text or the same product is then never a negative.

        With ``gather``, processes may hold different numbers of texts and of bags; the texts count
        as padded to the largest N with masked bags. Raises ValueError where a text or an image has
        no positive, naming the row or column, and RuntimeError if ``gather`` finds no initialised
        torch.distributed.
        """
        if self.gather != "none":
            sides = Sides(text, image, text_mask, image_mask, positives, text_ids, image_ids)
            return gathered_loss(
                sides, self.rule(), self.gather, self.temperature(), self.bias, self.process_group
            )
        if text_ids is not None or image_ids is not None:
            if positives is not None:
                raise ValueError("give positives or text_ids and image_ids, not both")
            check_ids("text_ids", text_ids, len(text), len(image))
            check_ids("image_ids", image_ids, len(text), len(image))
            positives = positives_from_ids(text_ids, image_ids)
        scores = maxsim(
            text,
            image,
            text_mask=text_mask,
            image_mask=image_mask,
            mask_mode=self.mask_mode,
            directions=self.directions,
            reduction=self.reduction,
        )
        return self.from_scores(scores.text_to_image, scores.image_to_text, positives)
