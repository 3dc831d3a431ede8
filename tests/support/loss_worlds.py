"""The contrastive loss in several processes over gloo, and the same batches in one."""

from __future__ import annotations

import datetime
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.memory import Largest
from support.models import make_inputs, tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagformer import BagwiseContrastiveLoss
from bagformer.losses.collectives import logsumexp_over
from bagformer.training.gradient_cache import average_gradients, cached_step

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
    (1.5 * value).backward()
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


def cached_step_of_model(
    case: Case, batch: dict[str, Any], gather: str, group: Any
) -> dict[str, Tensor]:
    """As :func:`model_step`, in chunks, the gradients averaged afterwards."""
    model = Towers(case.options, gather, group).double()
    texts = list(zip(batch["text"].split(1), batch["text_mask"].split(1), strict=True))
    value = cached_step(
        lambda chunk: (model.text(chunk[0]), chunk[1]),
        model.image,
        texts,
        batch["image"].split(2),
        lambda text, image, mask: model.loss(text, image, mask, batch["image_mask"]),
    )
    average_gradients(model.parameters(), group)
    return {"loss": value} | {name: p.grad for name, p in model.named_parameters()}


def largest(rank: int, gather: str) -> int:
    """Elements of the largest tensor in a step of 8 texts of 16 bags in each of three processes."""
    case = Case((8, 8, 8), (8, 8, 8), (16, 16, 16), {}, masked=False)
    batch = batches(case)[rank]
    with Largest() as seen:
        step(case, batch, gather)
    return seen.found


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
    loss = BagwiseContrastiveLoss(gather=gather, process_group=group)
    said = [_says(lambda arguments=arguments: loss(*arguments)) for arguments in tried]
    return "\n".join(said)


def _says(call: Any) -> str:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreements(rank: int, group: Any) -> list[str]:
    """What the loss says where each process's arguments are good, but not those of the others."""
    text, image, ids = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.arange(2)
    made = partial(BagwiseContrastiveLoss, process_group=group)
    first = rank == 0
    labels = {"text_ids" if first else "image_ids": ids}
    wanting = text.clone().requires_grad_(first), image.clone().requires_grad_()
    tried = [
        partial(made(gather="ring"), text, image, **labels),
        partial(made(gather="local" if first else "ring"), text, image),
        partial(made("both" if first else "text_to_image", gather="local"), text, image),
        partial(made(gather="ring", objective="softmax" if first else "sigmoid"), text, image),
        partial(made(gather="ring"), *wanting),
        partial(made(gather="local", temperature=None if first else "learn"), text, image),
    ]
    return [_says(call) for call in tried]


def model_losses(inputs: dict[str, Any], positives: Tensor, gather: str, group: Any) -> Any:
    """``loss_twc`` and ``loss_ita`` of a small model, the same in every process."""
    model = tiny_model(use_itm_head=False).double()
    model.gather_losses(gather, group)
    output = model(**inputs, positives=positives, return_loss=True)
    return output.loss_twc.detach(), output.loss_ita.detach()


def model_batch() -> tuple[dict[str, Any], Tensor]:
    """Four pairs, of which the first text suits two pictures, one of the other process."""
    inputs, positives = make_inputs(4), torch.eye(4, dtype=torch.bool)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    positives[0, 2] = True
    return inputs, positives


def in_a_model(rank: int, group: Any) -> dict[str, Any]:
    """The losses of half a batch, and what is said where process 1 labels it wrongly."""
    inputs, positives = model_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    half = {name: value[mine] for name, value in inputs.items()}
    found: dict[str, Any] = {
        gather: model_losses(half, positives[mine], gather, group) for gather in ("local", "ring")
    }
    narrow = positives[mine, : 4 - rank]
    found["refusals"] = [
        _says(partial(model_losses, half, narrow, "local", group)),
        _says(partial(model_losses, half, [[True]] if rank else positives[mine], "ring", group)),
    ]
    return found


def narrow_batches() -> list[tuple[Tensor, Tensor]]:
    """bfloat16 ``text [1, 1, 128]`` and ``image [1, 1, 128]`` of each of three processes, every
    inner product 0."""
    maker = torch.Generator().manual_seed(7)
    values = torch.randn(3, 2, 64, generator=maker).bfloat16()
    nothing = torch.zeros(64, dtype=torch.bfloat16)
    return [
        (torch.cat([text, nothing])[None, None], torch.cat([nothing, image])[None, None])
        for text, image in values
    ]


def narrow_sums(rank: int, gather: str, group: Any) -> tuple[Tensor, Tensor]:
    """Gradients of bfloat16 features under the sigmoid loss with a bias of 0."""
    text, image = (side.requires_grad_() for side in narrow_batches()[rank])
    loss = BagwiseContrastiveLoss(
        "text_to_image", objective="sigmoid", gather=gather, process_group=group
    )
    torch.nn.init.zeros_(loss.bias)
    loss(text, image).backward()
    return text.grad, image.grad


# Of each of three processes: far apart, all without a number, one NaN.
EXPONENTS = [
    [0.0, 1e3, -math.inf, 5.0, 1.0],
    [1e3, -1e3, -math.inf, -math.inf, math.nan],
    [2.0] * 5,
]
EXPONENTS[2][2] = -math.inf


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
    found["log-sum-exp"] = logsumexp_over(torch.tensor(EXPONENTS[rank]), dist.group.WORLD)
    found["narrow"] = {
        gather: narrow_sums(rank, gather, dist.group.WORLD) for gather in ("local", "ring")
    }
    found["largest"] = {gather: largest(rank, gather) for gather in ("local", "ring")}
    if rank < 2:
        found["two"] = _cases(rank, pair, two, ("none", "local", "ring"))
        found["cached"] = {
            gather: cached_step_of_model(two[0], batches(two[0])[rank], gather, pair)
            for gather in ("local", "ring")
        }
        found["model"] = in_a_model(rank, pair)
        found["disagreements"] = disagreements(rank, pair)
        found["refusals"] = {gather: refusal(rank, gather, pair) for gather in ("local", "ring")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_processes(two: list[Case], three: list[Case]) -> list[dict[str, Any]]:
    """What each of three processes found: ``three`` in all of them, ``two`` in a group of two, each
    by ``"gather number"`` and ``"gather number model"``."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (folder, two, three), nprocs=3)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(3)]
