"""The contrastive loss in plain PyTorch, on any device: a matrix of scores is small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bagformer.reference import accumulation_dtype

FIELDS = 6  # of a row: maximum, log of the sum, positives, loss, two slopes


class Inputs(NamedTuple):
    """The tensors of a call; ``divisor`` counts where there is no ``temperature``."""

    text_to_image: Tensor | None
    image_to_text: Tensor | None
    positives: Tensor | None
    temperature: Tensor | None
    bias: Tensor | None
    divisor: float
    objective: str

    @property
    def scores(self) -> tuple[Tensor | None, Tensor | None]:
        return self[:2]

    @property
    def any_scores(self) -> Tensor:
        return next(one for one in self.scores if one is not None)

    @property
    def softmax(self) -> bool:
        return self.objective == "softmax"

    @property
    def n_rows(self) -> int:
        return sum(len(one) for one in self.scores if one is not None)

    @property
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.any_scores.dtype)

    def directions(self) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Number, rows among all, scores over the temperature, and positives, of each in use."""
        divisor = self.divisor if self.temperature is None else self.temperature.to(self.wide)
        above = 0
        for place, matrix in enumerate(self.scores):
            if matrix is None:
                continue
            rows = slice(above, above + len(matrix))
            above = rows.stop
            if self.positives is None:
                true = torch.eye(*matrix.shape, dtype=torch.bool, device=matrix.device)
            else:
                true = self.positives.t() if place else self.positives
            yield place, rows, matrix.to(self.wide) / divisor, true

    def weight(self, rows: slice) -> float:
        """Of one row in the loss."""
        used = sum(one is not None for one in self.scores)
        return 1.0 / (used * (rows.stop - rows.start))


def _softmax(value: Tensor, true: Tensor, fields: Tensor) -> None:
    best = value.amax(dim=1)
    power = (value - best[:, None]).exp()
    total, count = power.sum(dim=1), true.sum(dim=1)
    # where, not multiplication: -inf * 0 is NaN
    mean = torch.where(true, value, 0.0).sum(dim=1) / count
    fields[0], fields[1], fields[2] = best, total.log(), count
    fields[3] = (best - mean) + fields[1]
    fields[4] = (power * value).sum(dim=1) / total - mean


def _rise(logit: Tensor, true: Tensor) -> Tensor:
    """Slope of -log sigmoid(z logit); of a good positive, 1 minus a sigmoid would be no digit."""
    return torch.where(true, -(-logit).sigmoid(), logit.sigmoid())


def _sigmoid(value: Tensor, bias: Tensor | float, true: Tensor, fields: Tensor) -> None:
    logit = value + bias
    fields[3] = -F.logsigmoid(torch.where(true, logit, -logit)).sum(dim=1)
    rise = _rise(logit, true)
    fields[4], fields[5] = (rise * value).sum(dim=1), rise.sum(dim=1)


def _shift(bias: Tensor | None, place: int, wide: torch.dtype) -> Tensor | float:
    return 0.0 if bias is None else bias[place].to(wide)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, ``FIELDS`` of each row, and the loss's slopes by temperature and both biases."""
    zeros, wide = inputs.any_scores.new_zeros, inputs.wide
    fields = zeros([FIELDS, inputs.n_rows], dtype=wide)
    loss, slopes = zeros([], dtype=wide), zeros([3], dtype=wide)
    for place, rows, value, true in inputs.directions():
        if inputs.softmax:
            _softmax(value, true, fields[:, rows])
        else:
            _sigmoid(value, _shift(inputs.bias, place, inputs.wide), true, fields[:, rows])
        sums = fields[3:, rows].sum(dim=1) * inputs.weight(rows)
        loss += sums[0]
        slopes[0] -= sums[1]
        slopes[1 + place] = sums[2]
    slopes[0] /= inputs.divisor if inputs.temperature is None else inputs.temperature
    return loss, fields, slopes


def backward(
    grad: Tensor, inputs: Inputs, fields: Tensor, slopes: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of the matrices in their dtype, and ``slopes`` times ``grad``."""
    found: list[Tensor | None] = [None, None]
    divisor = inputs.divisor if inputs.temperature is None else inputs.temperature
    for place, rows, value, true in inputs.directions():
        if inputs.softmax:
            best, log_total, count = fields[:3, rows, None]
            slope = ((value - best) - log_total).exp() - true.to(value.dtype) / count
        else:
            logit = value + _shift(inputs.bias, place, inputs.wide)
            slope = _rise(logit, true)
        scores = inputs.scores[place]
        assert scores is not None
        found[place] = (slope * (grad * inputs.weight(rows) / divisor)).to(scores.dtype)
    return found[0], found[1], slopes * grad
