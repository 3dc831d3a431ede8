"""The contrastive loss in plain PyTorch: a matrix of scores is small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bagformer.reference import accumulation_dtype


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
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.any_scores.dtype)

    def directions(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Number, scores over the temperature, and positives, of each in use."""
        for place, matrix in enumerate(self.scores):
            if matrix is None:
                continue
            value = matrix.to(self.wide)
            if self.temperature is not None:
                value = value / self.temperature.to(self.wide)
            elif self.divisor != 1.0:
                value = value / self.divisor
            true = self.positives.t() if self.positives is not None and place else self.positives
            yield place, value, true

    def weight(self, rows: int) -> float:
        """Of each of so many rows in the loss."""
        return 1.0 / (rows * sum(one is not None for one in self.scores))

    def shift(self, place: int) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias[place].to(self.wide)


def _shares(value: Tensor, true: Tensor | None) -> Tensor:
    """What each row adds to a softmax's loss, negative."""
    log_probs = value.log_softmax(dim=1)
    if true is None:
        return log_probs.diagonal()
    # where, not multiplication: -inf * 0 is NaN
    return torch.where(true, log_probs, 0.0).sum(dim=1) / true.sum(dim=1)


def _given(true: Tensor | None, value: Tensor) -> Tensor:
    if true is not None:
        return true
    return torch.eye(len(value), dtype=torch.bool, device=value.device)


def forward(inputs: Inputs) -> Tensor:
    loss = inputs.any_scores.new_zeros([], dtype=inputs.wide)
    for place, value, true in inputs.directions():
        if inputs.softmax:
            total = _shares(value, true).sum()
        else:
            logit = value + inputs.shift(place)
            total = F.logsigmoid(torch.where(_given(true, value), logit, -logit)).sum()
        loss -= total * inputs.weight(len(value))
    return loss


def _slope(inputs: Inputs, place: int, value: Tensor, true: Tensor | None) -> Tensor:
    """Of the sum of the rows' losses by each logit; a new tensor."""
    if not inputs.softmax:
        logit = value + inputs.shift(place)
        # of a good positive, 1 minus a sigmoid would be no digit
        return torch.where(_given(true, value), -(-logit).sigmoid(), logit.sigmoid())
    slope = value.softmax(dim=1)
    if true is None:
        slope.diagonal().sub_(1.0)
        return slope
    return slope.sub_(true.to(slope.dtype) / true.sum(dim=1, keepdim=True))


def backward(grad: Tensor, inputs: Inputs) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of the matrices in their dtype, and by temperature and both biases ``[3]``."""
    found: list[Tensor | None] = [None, None]
    slopes = inputs.any_scores.new_zeros([3], dtype=inputs.wide)
    divisor = inputs.divisor if inputs.temperature is None else inputs.temperature.to(inputs.wide)
    for place, value, true in inputs.directions():
        slope, scale = _slope(inputs, place, value, true), grad * inputs.weight(len(value))
        if inputs.temperature is not None:
            slopes[0] -= (slope * value).sum() * scale / divisor
        if inputs.bias is not None:
            slopes[1 + place] = slope.sum() * scale
        # rows one after the other, as the operator says, also of a transposed matrix
        found[place] = slope.mul_(scale / divisor).to(inputs.any_scores.dtype).contiguous()
    return found[0], found[1], slopes
