"""Contrastive losses over late-interaction scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bagformer.ops.maxsim import maxsim
from bagformer.reference import DIRECTIONS, MASK_MODES, REDUCTIONS

# Where a learned temperature starts: sums over tokens are already large, means are not.
START = {"sum": 1.0, "mean": 0.07}
TEMPERATURE_RANGE = (0.01, 100.0)


def check_positives(positives: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``positives`` is bool ``shape``, each row and column with a True."""
    if positives.dtype != torch.bool:
        raise ValueError(f"positives must be bool, got {positives.dtype}")
    if tuple(positives.shape) != tuple(shape):
        raise ValueError(f"positives must be {list(shape)}, got {list(positives.shape)}")
    for dim, what in ((1, "row"), (0, "column")):
        empty = (~positives.any(dim=dim)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"positives has no True in {what} {empty[0]}")


def multi_positive_cross_entropy(logits: Tensor, positives: Tensor | None = None) -> Tensor:
    """Mean over the rows of the mean over a row's positives of -log softmax.

    ``logits [R, C]``; ``positives [R, C]`` bool, or None for the diagonal. Computed in at least
    float32. The targets are uniform on a row's positives.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = logits.log_softmax(dim=1)
    if positives is None:
        return -log_probs.diagonal().mean()
    # where, not multiplication: -inf * 0 is NaN
    picked = torch.where(positives, log_probs, torch.zeros_like(log_probs)).sum(dim=1)
    return -(picked / positives.sum(dim=1)).mean()


class BagwiseContrastiveLoss(nn.Module):
    """Symmetric cross-entropy over late-interaction scores of both directions.

    - ``directions``: ``both`` (the mean of the two losses), ``text_to_image`` or ``image_to_text``.
    - ``mask_mode``, ``reduction``: as in :func:`bagformer.ops.maxsim`.
    - ``temperature``: scores are divided by it. None: no division. A number: that one. ``learn``:
      ``exp(log_temperature)``, a parameter kept inside ``TEMPERATURE_RANGE``.

    ``temperature=None, mask_mode="zero", reduction="sum"`` is the loss of the paper. No tensor of
    the size texts x images x tokens x patches is made.
    """

    def __init__(
        self,
        directions: str = "both",
        mask_mode: str = "exclude",
        reduction: str = "sum",
        temperature: float | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("directions", directions, DIRECTIONS),
            ("mask_mode", mask_mode, MASK_MODES),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.directions, self.mask_mode, self.reduction = directions, mask_mode, reduction
        self.fixed_temperature: float | None = None
        self.log_temperature: nn.Parameter | None = None
        if temperature == "learn":
            self.log_temperature = nn.Parameter(torch.empty(()))
            self.reset_parameters()
        elif temperature is not None:
            number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
            if not number or not 0 < float(temperature) < math.inf:
                raise ValueError(
                    f"temperature must be None, 'learn' or a number above 0, got {temperature!r}"
                )
            self.fixed_temperature = float(temperature)

    def reset_parameters(self) -> None:
        """Put a learned temperature back to where it starts."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(START[self.reduction]))

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
        return f"{self.directions}, mask_mode={self.mask_mode}, reduction={self.reduction}"

    def from_scores(
        self, text_to_image: Tensor | None, image_to_text: Tensor | None, positives: Tensor | None
    ) -> Tensor:
        """The loss of score matrices ``[Nt, Ni]`` and ``[Ni, Nt]`` that are already there."""
        used = [s for s in (text_to_image, image_to_text) if s is not None]
        first, second = used[0].shape
        shape = (first, second) if text_to_image is not None else (second, first)
        if 0 in shape:
            raise ValueError(f"the loss needs at least one text and one image, got {list(shape)}")
        if positives is None and shape[0] != shape[1]:
            raise ValueError(
                f"without positives, text b belongs to image b: expected as many texts as images, "
                f"got {shape[0]} and {shape[1]}"
            )
        if positives is not None and not torch.compiler.is_compiling():
            check_positives(positives, shape)
        temperature = self.temperature()
        losses = []
        for scores, targets in (
            (text_to_image, positives),
            (image_to_text, None if positives is None else positives.t()),
        ):
            if scores is not None:
                logits = scores if temperature is None else scores / temperature
                losses.append(multi_positive_cross_entropy(logits, targets))
        return torch.stack(losses).mean()

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        positives: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss.

        ``text [Nt, N, D]``, ``image [Ni, P, D]``, masks ``[Nt, N]`` and ``[Ni, P]`` (True =
        counts), ``positives [Nt, Ni]`` bool (None: text b belongs to image b alone). Raises
        ValueError where a text or an image has no positive, naming the row or column.
        """
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
