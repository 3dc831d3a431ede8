"""What the losses send between processes, on NCCL and on gloo.

``torch.distributed.nn.all_gather`` is not used: on gloo its backward is wrong for gradients that
are not contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bagformer.reference import accumulation_dtype


def gather_equal(value: Tensor, world: int, group: Any) -> Tensor:
    """``value [n, ...]``, of one shape everywhere, as ``[world, n, ...]`` in order of rank."""
    sent = value.contiguous()
    if sent.dtype == torch.bool:
        return gather_equal(sent.to(torch.uint8), world, group).bool()
    found = sent.new_empty(world * len(sent), *sent.shape[1:])
    # the older name is deprecated where the newer exists
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(found, sent, group=group)
    return found.unflatten(0, (world, len(sent)))


def pad_to(value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``value`` at the head of zeros (False) whose leading axes have ``sizes``."""
    if tuple(value.shape[: len(sizes)]) == sizes:
        return value
    padded = value.new_zeros(*sizes, *value.shape[len(sizes) :])
    padded[tuple(slice(0, size) for size in value.shape[: len(sizes)])] = value
    return padded


def cut_rows(value: Tensor, counts: list[int]) -> Tensor:
    """``[world, n, ...]`` without its padding: ``[sum(counts), ...]``."""
    if min(counts) == value.shape[1]:
        return value.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(value, counts, strict=True)])


def sum_over(value: Tensor, group: Any) -> Tensor:
    """The sum over all processes, without a gradient."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def logsumexp_over(value: Tensor, group: Any) -> Tensor:
    """log of the sum over all processes of exp, entry by entry; NaN stays NaN."""
    highest = value.detach().clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    # the maximum of a reduction may lose a NaN: the sum below brings it back
    shift = torch.where(highest.isfinite(), highest, torch.zeros_like(highest))
    total = (value.detach() - shift).exp()
    dist.all_reduce(total, group=group)
    return total.log() + shift


class GatherRows(torch.autograd.Function):
    """``value [n, N, D]`` of every process as ``[sum of counts, bags, D]``.

    The backward sums over the processes what each found for a row, in the accumulation dtype.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, counts: list[int], bags: int, rank: int, group: Any):
        ctx.counts, ctx.rank, ctx.group, ctx.shape = counts, rank, group, value.shape
        padded = pad_to(value, (max(counts), bags))
        return cut_rows(gather_equal(padded, len(counts), group), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        counts, most = ctx.counts, max(ctx.counts)
        wide = grad.to(accumulation_dtype(grad.dtype))
        if min(counts) < most:
            wide = torch.cat([pad_to(part, (most,)) for part in wide.split(counts)])
        found = wide.new_empty(most, *wide.shape[1:])
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        call(found, wide.contiguous(), group=ctx.group)
        rows, bags = ctx.shape[:2]
        return found[:rows, :bags].to(grad.dtype), None, None, None, None


class MeanGradient(torch.autograd.Function):
    """A parameter that every process holds; its gradient is the mean over the processes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, world: int, group: Any) -> Tensor:
        ctx.world, ctx.group = world, group
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return sum_over(grad, ctx.group) / ctx.world, None, None


class Shift:
    """Tensors on their way round the ring: sent to the next process, received from the last."""

    def __init__(self, values: list[Tensor], rank: int, world: int, group: Any) -> None:
        to, back = (rank + 1) % world, (rank - 1) % world
        self.sent = [value.contiguous() for value in values]
        self.received = [torch.empty_like(value) for value in self.sent]
        operations = []
        for kind, peer, tensors in ((dist.isend, to, self.sent), (dist.irecv, back, self.received)):
            operations += [dist.P2POp(kind, x, group=group, group_peer=peer) for x in tensors]
        self.requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.received
