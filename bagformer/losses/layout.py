"""How a batch lies over the processes, and which of its texts and images belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bagformer.losses.collectives import gather_equal, pad_to, sum_over
from bagformer.losses.objectives import check_ids, check_positives_shape
from bagformer.ops.maxsim import check_sides

REFUSED = -1
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Sides(NamedTuple):
    """Features and masks of this process, and what it says about its pairs."""

    text: Tensor
    image: Tensor
    text_mask: Tensor | None
    image_mask: Tensor | None
    positives: Tensor | None = None
    text_ids: Tensor | None = None
    image_ids: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """``texts`` and ``images``: how many each process holds; ``bags``: the largest N; ``masked``:
    whether any process brings or needs a text mask."""

    rank: int
    world: int
    group: Any
    texts: list[int]
    images: list[int]
    bags: int
    masked: bool

    def rows(self, process: int) -> slice:
        """Where a process's texts lie among all of them."""
        start = sum(self.texts[:process])
        return slice(start, start + self.texts[process])

    def columns(self, process: int) -> slice:
        """Where a process's images lie among all of them."""
        start = sum(self.images[:process])
        return slice(start, start + self.images[process])


def _checked(sides: Sides) -> Sides:
    features = check_sides(
        sides.text, sides.image, sides.text_mask, sides.image_mask, ("[Ni, P, D]",)
    )
    sides = Sides(*features, *sides[4:])
    texts, images = len(sides.text), len(sides.image)
    if 0 in (texts, images):
        raise ValueError(
            f"the loss needs at least one text and one image on every process, got {texts} texts "
            f"and {images} images"
        )
    for name in ("text_ids", "image_ids"):
        check_ids(name, getattr(sides, name), texts, images)
    with_ids = sides.text_ids is not None or sides.image_ids is not None
    if sides.positives is not None and with_ids:
        raise ValueError("give positives or text_ids and image_ids, not both")
    if sides.positives is None and texts != images:
        raise ValueError(
            f"without positives, text b belongs to image b: expected as many texts as images, "
            f"got {texts} and {images}"
        )
    return sides


def _wire(group: Any) -> torch.device:
    """Where small integers lie while they are exchanged."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def refuse_together(refusal: Exception | None, group: Any) -> None:
    """Raise ``refusal`` where there is one, and RuntimeError that names it in all other processes.

    So that none is left waiting for one that has given up. All processes must call it.
    """
    world = dist.get_world_size(group)
    wire = torch.tensor([0 if refusal is None else 1], device=_wire(group))
    refused = gather_equal(wire, world, group).flatten().tolist()
    if refusal is not None:
        raise refusal
    if any(refused):
        raise RuntimeError(f"process {refused.index(1)} refused its arguments to the loss")


class Choice(NamedTuple):
    """What the processes must agree on: the name, this one's value, and the values there are."""

    name: str
    value: Any
    among: tuple


def _said(sides: Sides, options: list[Choice]) -> list[Choice]:
    """All that must be the same in every process."""
    given = [
        name for name in ("positives", "text_ids", "image_ids") if getattr(sides, name) is not None
    ]
    labels = " and ".join(given) or "none"
    kinds = ("none", "positives", "text_ids", "image_ids", "text_ids and image_ids")
    return [
        Choice("dtype", sides.text.dtype, FLOATS),
        Choice("kind of labels", labels, kinds),
        *options,
    ]


def exchange(sides: Sides, group: Any, options: list[Choice]) -> tuple[Sides, Layout]:
    """Check the arguments of all processes together; ``options`` as well must be equal.

    A process that refuses its own raises as it would alone; the others raise RuntimeError that
    names it, so that none is left waiting.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    refusal: Exception | None = None
    said: list[Choice] = []
    numbers = [REFUSED] * (7 + len(options))
    try:
        sides = _checked(sides)
        said = _said(sides, options)
        numbers = [len(sides.text), len(sides.image), sides.text.shape[1], sides.text.shape[2]]
        numbers.append(int(sides.text_mask is not None))
        numbers += [choice.among.index(choice.value) for choice in said]
    except (TypeError, ValueError) as error:
        refusal = error
    wire = torch.tensor([numbers], device=_wire(group))
    table = gather_equal(wire, world, group).flatten(0, 1).tolist()
    if refusal is not None:
        raise refusal
    texts, images, bags, depth, masks, *codes = map(list, zip(*table, strict=True))
    if REFUSED in texts:
        raise RuntimeError(f"process {texts.index(REFUSED)} refused its arguments to the loss")
    _check_alike("feature size", depth)
    for choice, found in zip(said, codes, strict=True):
        _check_alike(choice.name, [choice.among[code] for code in found])
    masked = any(masks) or len(set(bags)) > 1
    layout = Layout(rank, world, group, texts, images, max(bags), masked)
    _check_width(sides, layout)
    return sides, layout


def _check_alike(name: str, found: list) -> None:
    if len(set(found)) > 1:
        raise ValueError(f"every process must bring the same {name}, got {found}")


def _check_width(sides: Sides, layout: Layout) -> None:
    if sides.positives is None:
        return
    refusal: Exception | None = None
    try:
        check_positives_shape(sides.positives, (len(sides.text), sum(layout.images)))
    except (TypeError, ValueError) as error:
        refusal = error
    refuse_together(refusal, layout.group)


def need_processes(gather: str) -> None:
    """Raise RuntimeError unless torch.distributed is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"gather={gather!r} needs torch.distributed: start with torchrun and call "
            "torch.distributed.init_process_group first, or use gather='none'"
        )


def own_columns(images: int, group: Any) -> tuple[int, slice]:
    """The number of images of all processes, and where this process's ``images`` lie in it."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    wire = torch.tensor([images], device=_wire(group))
    counts = gather_equal(wire, world, group).flatten().tolist()
    return sum(counts), slice(sum(counts[:rank]), sum(counts[: rank + 1]))


class Targets:
    """Which texts of all processes are positives of this process's images.

    ``text_counts [Mt]`` and ``image_counts [Ni]``: how many positives each has over all processes.
    """

    def __init__(self, sides: Sides, layout: Layout) -> None:
        self.layout = layout
        self.device = sides.image.device
        self.matrix: Tensor | None = None
        self.ids: list[Tensor] = []
        if sides.positives is not None:
            self.matrix = self._own_columns(sides.positives)
        for ids in (sides.text_ids, sides.image_ids):
            if ids is not None:
                padded = pad_to(ids.to(self.device), (max(layout.texts),))
                self.ids.append(gather_equal(padded, layout.world, layout.group))
        self.text_counts, self.image_counts = self._counts()

    def _own_columns(self, positives: Tensor) -> Tensor:
        """This process's columns of every process's rows; one process's rows at a time."""
        layout = self.layout
        rows = []
        for process, count in enumerate(layout.texts):
            block = torch.empty(
                count, sum(layout.images), dtype=torch.uint8, device=positives.device
            )
            if process == layout.rank:
                block.copy_(positives)
            dist.broadcast(block, group=layout.group, group_src=process)
            rows.append(block[:, layout.columns(layout.rank)].bool())
        return torch.cat(rows)

    def block(self, process: int) -> Tensor:
        """Bool ``[texts of that process, images of this one]``."""
        layout = self.layout
        if self.matrix is not None:
            return self.matrix[layout.rows(process)]
        count, own = layout.texts[process], layout.texts[layout.rank]
        if process == layout.rank:
            same = torch.eye(count, dtype=torch.bool, device=self.device)
        else:
            same = torch.zeros(count, own, dtype=torch.bool, device=self.device)
        for ids in self.ids:
            same |= ids[process, :count, None] == ids[layout.rank, None, :own]
        return same

    def _counts(self) -> tuple[Tensor, Tensor]:
        layout = self.layout
        texts, images = sum(layout.texts), sum(layout.images)
        own = layout.columns(layout.rank)
        if self.matrix is None and not self.ids:
            ones = torch.ones(texts, dtype=torch.long, device=self.device)
            return ones, ones[: own.stop - own.start]
        counts = torch.zeros(texts + images, dtype=torch.long, device=self.device)
        for process in range(layout.world):
            block = self.block(process)
            counts[layout.rows(process)] = block.sum(dim=1)
            counts[texts:][own] += block.sum(dim=0)
        counts = sum_over(counts, layout.group)
        if self.matrix is not None:
            for what, part, starts in (
                ("row", counts[:texts], layout.texts),
                ("column", counts[texts:], layout.images),
            ):
                empty = (part == 0).nonzero().flatten().tolist()
                if empty:
                    process = next(p for p in range(len(starts)) if empty[0] < sum(starts[: p + 1]))
                    raise ValueError(
                        f"positives has no True in {what} {empty[0]} "
                        f"(number {empty[0] - sum(starts[:process])} of process {process})"
                    )
        return counts[:texts], counts[texts:][own]
