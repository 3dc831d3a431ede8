"""Where this process stands among those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bagformer.training.config import ConfigError

# The first process validates while the others wait.
_PATIENCE = timedelta(hours=3)


@dataclass(frozen=True)
class Place:
    """``rank`` of ``world`` processes, and the device of this one."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the processes, which must all have the same names."""
        if self.world == 1:
            return values
        names = sorted(values)
        table = torch.tensor([values[name] for name in names], dtype=torch.float64)
        if self.device.type == "cuda":
            table = table.to(self.device)
        dist.all_reduce(table)
        return dict(zip(names, (table / self.world).tolist(), strict=True))


def start(device: str) -> Place:
    """This process's place. Under torchrun it joins the others: NCCL on GPUs, gloo on CPUs.

    Raises ConfigError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, and PyTorch sees no GPU")
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    own = torch.device(device if kind == "cpu" or ":" in device else f"cuda:{local}")
    if kind == "cuda":
        torch.cuda.set_device(own)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_PATIENCE)
    return Place(rank, world, own)


def finish() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_numbers(numbers: Tensor, world: int) -> Tensor:
    """int64 ``[B]`` of every process, joined in the order of their ranks: ``[world * B]``."""
    if world == 1:
        return numbers
    parts = [torch.empty_like(numbers) for _ in range(world)]
    dist.all_gather(parts, numbers)
    return torch.cat(parts)
