"""The contrastive loss of a batch that lies over many processes.

Images stay where they are: only texts, of 25 vectors or so against 257 of an image, travel. Each
process scores every text with its own images, in both directions from one pass. That completes the
rows of image_to_text; a row of text_to_image lies over all processes, which exchange one number a
text for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bagformer.losses.collectives import (
    GatherRows,
    MeanGradient,
    Shift,
    cut_rows,
    gather_equal,
    logsumexp_over,
    pad_to,
    sum_over,
)
from bagformer.losses.layout import Choice, Layout, Sides, Targets, exchange, need_processes
from bagformer.losses.objectives import logistic_sum
from bagformer.ops.maxsim import maxsim
from bagformer.reference import (
    DIRECTIONS,
    MASK_MODES,
    OBJECTIVES,
    REDUCTIONS,
    accumulation_dtype,
)

GATHERS = ("none", "local", "ring")


@dataclass(frozen=True)
class Rule:
    """Options of the loss: see :class:`bagformer.losses.BagwiseContrastiveLoss`."""

    directions: str = "both"
    mask_mode: str = "exclude"
    reduction: str = "sum"
    objective: str = "softmax"


class Logits(NamedTuple):
    """``text_to_image [Mt', Ni]`` and ``image_to_text [Ni, Mt']`` of a block of texts."""

    text_to_image: Tensor | None
    image_to_text: Tensor | None


def block_logits(
    rule: Rule,
    text: Tensor,
    image: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    temperature: Tensor | None,
    bias: Tensor | None,
) -> Logits:
    """Scores over the temperature, plus the bias of their direction."""
    scores = maxsim(
        text,
        image,
        text_mask=masks[0],
        image_mask=masks[1],
        mask_mode=rule.mask_mode,
        directions=rule.directions,
        reduction=rule.reduction,
    )

    def scaled(matrix: Tensor | None, place: int) -> Tensor | None:
        if matrix is None:
            return None
        matrix = matrix if temperature is None else matrix / temperature
        return matrix if bias is None else matrix + bias[place]

    return Logits(scaled(scores.text_to_image, 0), scaled(scores.image_to_text, 1))


class Totals:
    """What is summed over the blocks of a process, then over the processes, to get the loss."""

    def __init__(self, rule: Rule, targets: Targets, layout: Layout, wide: torch.dtype) -> None:
        self.rule, self.targets, self.layout = rule, targets, layout
        self.texts, self.images = sum(layout.texts), sum(layout.images)
        images, device = layout.images[layout.rank], targets.device
        lowest = float("-inf")
        self.text_lse = torch.full((self.texts,), lowest, dtype=wide, device=device)
        self.image_lse = torch.full((images,), lowest, dtype=wide, device=device)
        # the part of the loss that adds up over blocks and processes
        self.additive = torch.zeros((), dtype=wide, device=device)

    def add(self, logits: Logits, rows: slice, positives: Tensor) -> None:
        """Take in one block of texts; each process meets each block once."""
        self.additive += self._additive(logits, rows, positives)
        if self.rule.objective == "sigmoid":
            return
        if logits.text_to_image is not None:
            self.text_lse[rows] = logits.text_to_image.logsumexp(dim=1)
        if logits.image_to_text is not None:
            self.image_lse = torch.logaddexp(self.image_lse, logits.image_to_text.logsumexp(dim=1))

    def _directions(self, logits: Logits, rows: slice, positives: Tensor) -> list[tuple]:
        """``(logits, positives, counts, log-sum-exp of the whole rows, weight)`` of each in use."""
        weight = 1.0 if None in logits else 0.5
        found: list[tuple] = []
        if logits.text_to_image is not None:
            counts, lse = self.targets.text_counts[rows], self.text_lse[rows]
            found.append((logits.text_to_image, positives, counts, lse, weight / self.texts))
        if logits.image_to_text is not None:
            counts, lse = self.targets.image_counts, self.image_lse
            found.append((logits.image_to_text, positives.t(), counts, lse, weight / self.images))
        return found

    def _additive(self, logits: Logits, rows: slice, positives: Tensor) -> Any:
        total: Any = 0.0
        for matrix, true, counts, _, weight in self._directions(logits, rows, positives):
            if self.rule.objective == "sigmoid":
                total = total - weight * logistic_sum(matrix, true)
            else:
                picked = torch.where(true, matrix, torch.zeros_like(matrix)).sum(dim=1)
                total = total - weight * (picked / counts).sum()
        return total

    def value(self) -> Tensor:
        """The loss of the whole batch, the same on every process; no gradient."""
        total = self.additive.detach().clone()
        weight = 0.5 if self.rule.directions == "both" else 1.0
        if self.rule.objective == "softmax" and self.rule.directions != "text_to_image":
            total += weight / self.images * self.image_lse.sum()
        total = sum_over(total, self.layout.group)
        if self.rule.objective == "softmax" and self.rule.directions != "image_to_text":
            self.text_lse = logsumexp_over(self.text_lse, self.layout.group)
            total += weight / self.texts * self.text_lse.sum()
        return total

    def surrogate(self, logits: Logits, rows: slice, positives: Tensor) -> Tensor:
        """A number whose gradient is the whole loss's, as far as it passes through this block.

        To be called after :meth:`value`, when the log-sum-exp are those of whole rows.
        """
        total = self._additive(logits, rows, positives)
        if self.rule.objective == "softmax":
            for matrix, _, _, lse, weight in self._directions(logits, rows, positives):
                total = total + weight * (matrix - lse[:, None]).exp().sum()
        return total


class _ValueWithGradientOf(torch.autograd.Function):
    """Returns ``value``; the backward goes to ``surrogate``, ``factor`` times."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None, None


class _Ring(torch.autograd.Function):
    """Texts go round; in the backward they go round again and bring their gradients home."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, image: Tensor, temperature: Any, bias: Any, plan: Any):
        masks, totals = plan
        ctx.plan = plan
        ctx.save_for_backward(text, image, temperature, bias)
        for process, rows, block, mask in _rounds(text, masks[0], totals.layout):
            logits = block_logits(totals.rule, block, image, (mask, masks[1]), temperature, bias)
            totals.add(logits, rows, totals.targets.block(process))
        return totals.value()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        text, image, temperature, bias = ctx.saved_tensors
        masks, totals = ctx.plan
        layout, wants = totals.layout, ctx.needs_input_grad[:4]
        sums: list[Tensor | None] = [None] * 4
        for process, rows, block, mask in _rounds(text, masks[0], layout):
            with torch.enable_grad():
                sides = (block, image, temperature, bias)
                leaves: list[Any] = [
                    None if x is None else x.detach().requires_grad_(want)
                    for x, want in zip(sides, wants, strict=True)
                ]
                here, there, divisor, shift = leaves
                both = mask, masks[1]
                logits = block_logits(totals.rule, here, there, both, divisor, shift)
                positives = totals.targets.block(process)
                surrogate = totals.surrogate(logits, rows, positives)
            asked = [place for place, want in enumerate(wants) if want]
            found = torch.autograd.grad(
                surrogate, [leaves[place] for place in asked], grad * layout.world
            )
            for place, part in zip(asked, found, strict=True):
                part = part.to(accumulation_dtype(part.dtype))
                before = sums[place]
                sums[place] = part if before is None else before.add_(part)
            sums[0] = _pass_on(sums[0], process, layout)
        if sums[0] is not None:
            sums[0] = sums[0][:, : text.shape[1]]
        inputs = (text, image, temperature, bias)
        kept = [None if s is None else s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)]
        return (*kept, None)


def _pass_on(carried: Tensor | None, process: int, layout: Layout) -> Tensor | None:
    """Send the gradient of a process's texts after them; receive that of the texts to come."""
    if carried is None or layout.world == 1:
        return carried
    sent = [pad_to(carried, (max(layout.texts),))]
    received = Shift(sent, layout.rank, layout.world, layout.group).wait()
    return received[0][: layout.texts[(process - 1) % layout.world]]


def _rounds(
    text: Tensor, mask: Tensor | None, layout: Layout
) -> Iterator[tuple[int, slice, Tensor, Tensor | None]]:
    """Every process's texts in turn, own first: ``(process, rows, text, mask)``.

    The next block is on its way while the caller works on this one.
    """
    sizes = (max(layout.texts), layout.bags)
    held = [pad_to(text.detach(), sizes)]
    if mask is not None:
        held.append(pad_to(mask, sizes).to(torch.uint8))
    for step in range(layout.world):
        process = (layout.rank - step) % layout.world
        ahead = None
        if step < layout.world - 1:
            ahead = Shift(held, layout.rank, layout.world, layout.group)
        count = layout.texts[process]
        cut = None if mask is None else held[1][:count].bool()
        yield process, layout.rows(process), held[0][:count], cut
        if ahead is not None:
            held = ahead.wait()


def _local(sides: Sides, temperature: Any, bias: Any, totals: Totals) -> Tensor:
    layout = totals.layout
    text = GatherRows.apply(sides.text, layout.texts, layout.bags, layout.rank, layout.group)
    mask = sides.text_mask
    if mask is not None:
        padded = pad_to(mask, (max(layout.texts), layout.bags))
        mask = cut_rows(gather_equal(padded, layout.world, layout.group), layout.texts)
    masks = mask, sides.image_mask
    logits = block_logits(totals.rule, text, sides.image, masks, temperature, bias)
    positives = torch.cat([totals.targets.block(process) for process in range(layout.world)])
    rows = slice(0, len(text))
    with torch.no_grad():
        totals.add(logits, rows, positives)
    value = totals.value()
    return _ValueWithGradientOf.apply(
        totals.surrogate(logits, rows, positives), value, layout.world
    )


def _options(
    sides: Sides, rule: Rule, gather: str, temperature: Any, bias: Tensor | None
) -> list[Choice]:
    """What decides which collectives run, in the forward and in the backward."""
    found = [
        Choice("gather", gather, GATHERS),
        Choice("directions", rule.directions, DIRECTIONS),
        Choice("mask_mode", rule.mask_mode, MASK_MODES),
        Choice("reduction", rule.reduction, REDUCTIONS),
        Choice("objective", rule.objective, OBJECTIVES),
    ]
    for name, value in (("text", sides.text), ("temperature", temperature), ("bias", bias)):
        wanted = torch.is_grad_enabled() and getattr(value, "requires_grad", False)
        choices = "not wanted", "wanted"
        found.append(Choice(f"gradient of the {name}", choices[bool(wanted)], choices))
    return found


def gathered_loss(
    sides: Sides,
    rule: Rule,
    gather: str,
    temperature: Tensor | float | None = None,
    bias: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """The loss of the batches of all processes, and gradients through all of it.

    The value is the whole batch's, the same everywhere. Features get ``world_size`` times their
    gradient and ``temperature`` and ``bias`` their own whole gradient, so that the mean over
    processes that DistributedDataParallel takes is the gradient of one process with all pairs.

    Raises:
        RuntimeError: torch.distributed is not initialised; another process refused its arguments.
        TypeError, ValueError: this process's arguments.
    """
    need_processes(gather)
    group = dist.group.WORLD if process_group is None else process_group
    sides, layout = exchange(sides, group, _options(sides, rule, gather, temperature, bias))
    if layout.masked and sides.text_mask is None:
        every = torch.ones(sides.text.shape[:2], dtype=torch.bool, device=sides.text.device)
        sides = sides._replace(text_mask=every)
    wide = accumulation_dtype(sides.text.dtype)
    totals = Totals(rule, Targets(sides, layout), layout, wide)
    if isinstance(temperature, (int, float)):
        temperature = torch.tensor(temperature, dtype=wide, device=sides.text.device)
    if temperature is not None and temperature.requires_grad:
        temperature = MeanGradient.apply(temperature, layout.world, group)
    if bias is not None and bias.requires_grad:
        bias = MeanGradient.apply(bias, layout.world, group)
    if gather == "local":
        return _local(sides, temperature, bias, totals)
    masks = sides.text_mask, sides.image_mask
    return _Ring.apply(sides.text, sides.image, temperature, bias, (masks, totals))
