"""The contrastive loss in several processes over gloo, and the same batches in one."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagformer import BagwiseContrastiveLoss

SIZE = 6


class Case(NamedTuple):
    """``texts``, ``images``, ``bags``: of each process, as many as there are processes."""

    texts: tuple[int, ...]
    images: tuple[int, ...]
    bags: tuple[int, ...]
    options: dict[str, Any]
    labels: str | None = None
    masked: bool = True


def batches(case: Case) -> list[dict[str, Any]]:
    """The arguments of each process in float64, from the seed alone."""
    made = []
    maker = torch.Generator().manual_seed(5)
    for texts, images, bags in zip(case.texts, case.images, case.bags, strict=True):
        text = torch.randn(texts, bags, SIZE, generator=maker, dtype=torch.float64)
        image = torch.randn(images, 9, SIZE, generator=maker, dtype=torch.float64)
        mask = torch.rand(texts, bags, generator=maker) < 0.7
        batch = {"text": F.normalize(text, dim=-1), "image": F.normalize(image, dim=-1)}
        if case.masked:
            batch["text_mask"] = mask
            batch["image_mask"] = torch.rand(images, 9, generator=maker) < 0.8
        made.append(batch)
    rows = sum(case.texts)
    if case.labels == "positives":
        every = torch.zeros(rows, sum(case.images), dtype=torch.bool)
        every[torch.arange(rows), torch.arange(rows) % every.shape[1]] = True
        every[torch.arange(every.shape[1]) % rows, torch.arange(every.shape[1])] = True
        every[0, -1] = every[-1, 1] = True
        for batch, part in zip(made, every.split(case.texts), strict=True):
            batch["positives"] = part
    if case.labels == "ids":
        texts, images = torch.arange(rows), torch.arange(rows) + 2
        texts[-1], images[1] = texts[0], images[-2]
        for batch, *ids in zip(
            made, texts.split(case.texts), images.split(case.texts), strict=True
        ):
            batch["text_ids"], batch["image_ids"] = ids
    return made


def together(case: Case) -> dict[str, Any]:
    """The arguments of one process that holds all pairs, texts padded with masked bags."""
    parts, most = batches(case), max(case.bags)
    joined: dict[str, Any] = {}
    for part in parts:
        texts, bags, _ = part["text"].shape
        mask = part.pop("text_mask", torch.ones(texts, bags, dtype=torch.bool))
        part["text"] = F.pad(part["text"], (0, 0, 0, most - bags))
        part["text_mask"] = F.pad(mask, (0, most - bags))
    for name in parts[0]:
        joined[name] = torch.cat([part[name] for part in parts])
    return joined


def step(
    case: Case, batch: dict[str, Any], gather: str = "none", group: Any = None
) -> dict[str, Tensor]:
    """Loss and gradients, the features' not contiguous on their way."""
    loss = BagwiseContrastiveLoss(**case.options, gather=gather, process_group=group).double()
    leaves = {name: batch[name].clone().requires_grad_() for name in ("text", "image")}
    turned = {name: (leaf.mT * 1.0).mT for name, leaf in leaves.items()}
    value = loss(**{**batch, **turned})
    value.backward()
    found = {"loss": value.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    return found | {name: p.grad for name, p in loss.named_parameters()}


class Towers(nn.Module):
    """Two linear encoders and the loss, as one model."""

    def __init__(self, options: dict[str, Any], gather: str, group: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.text, self.image = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4)
        self.loss = BagwiseContrastiveLoss(**options, gather=gather, process_group=group)

    def forward(self, text: Tensor, image: Tensor, **others: Any) -> Tensor:
        return self.loss(self.text(text), self.image(image), **others)


def model_step(
    case: Case, batch: dict[str, Any], gather: str = "none", group: Any = None
) -> dict[str, Tensor]:
    """Loss and gradients of a model, under DistributedDataParallel if there is a group."""
    runner: Any = Towers(case.options, gather, group).double()
    if group is not None:
        runner = DistributedDataParallel(runner, process_group=group)
    value = runner(**batch)
    value.backward()
    named = runner.named_parameters()
    return {"loss": value.detach()} | {n.removeprefix("module."): p.grad for n, p in named}


def refusal(rank: int, gather: str, group: Any) -> str:
    """What the loss says on ``rank`` where process 1 alone brings bad arguments."""
    text, image = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    positives = torch.ones(2, 4, dtype=torch.bool)
    tried: list[tuple[Any, ...]] = [
        (text[: 2 - rank], image, None, None),
        (text, image, None, None, positives[:, : 4 - rank]),
        (text[..., : 4 - rank], image[..., : 4 - rank]),
    ]
    hidden = positives.clone()
    hidden[rank, :] = rank == 0
    tried.append((text, image, None, None, hidden))
    said = []
    for arguments in tried:
        try:
            BagwiseContrastiveLoss(gather=gather, process_group=group)(*arguments)
            said.append("nothing")
        except (RuntimeError, TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return "\n".join(said)


def _cases(rank: int, group: Any, cases: list[Case], gathers: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for gather in gathers:
        for number, case in enumerate(cases):
            batch = batches(case)[rank]
            if gather == "none" and (len(batch["text"]) != len(batch["image"]) or case.labels):
                continue
            found[f"{gather} {number}"] = step(case, batch, gather, group)
            found[f"{gather} {number} model"] = model_step(case, batch, gather, group)
    return found


def _work(rank: int, folder: str, two: list[Case], three: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=60),
    )
    pair = dist.new_group([0, 1])
    found = {"three": _cases(rank, dist.group.WORLD, three, ("ring",))}
    if rank < 2:
        found["two"] = _cases(rank, pair, two, ("none", "local", "ring"))
        found["refusals"] = {gather: refusal(rank, gather, pair) for gather in ("local", "ring")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_processes(two: list[Case], three: list[Case]) -> list[dict[str, Any]]:
    """What each of three processes found: ``three`` in all of them, ``two`` in a group of two, each
    by ``"gather number"`` and ``"gather number model"``."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (folder, two, three), nprocs=3)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(3)]
