"""Launches the scoring kernel: allocates, plans, picks tiles. Checks nothing; the ops do that.

Nothing here waits for the device: sizes come from shapes, masks are digested by the kernel of
plan.py, and texts are sorted into slots of 8, 16, 32 ... columns on the device (``slot_classes``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from bagformer.kernels import plan as planning
from bagformer.kernels import tiles
from bagformer.kernels.maxsim import maxsim_forward_kernel
from bagformer.kernels.plan import NOTHING, Plan
from torch import Tensor

LONGEST_SLOT = 128  # a text of more bags is cut into pieces of this many
SORTED_PAIRS = 1 << 16  # with fewer pairs, a device is not full, and emptier tiles cost nothing
LARGEST_GRID = 65535  # CUDA's limit on program axis 1


class Outputs(NamedTuple):
    """Scores and indices as ``reference.MaxSimScores``; one that is not wanted is empty."""

    text_to_image: Tensor
    image_to_text: Tensor
    text_argmax: Tensor
    image_argmax: Tensor


class Options(NamedTuple):
    zero: bool
    mean: bool
    precision: str


def index_dtype(count: int) -> torch.dtype:
    """The narrowest dtype for an index below ``count`` and one value more (-1, or 255) for none."""
    if count <= 255:
        return torch.uint8
    return torch.int16 if count <= 32767 else torch.int32


def _outputs(
    text: Tensor, image: Tensor, wants_text: bool, wants_image: bool, argmax: bool
) -> Outputs:
    n_texts, n_bags, n_images, n_patches = *text.shape[:2], *image.shape[-3:-1]
    lead = [n_texts, n_images]
    turned = lead if image.dim() == 4 else [n_images, n_texts]
    wanted = (
        (lead, wants_text, torch.float32),
        (turned, wants_image, torch.float32),
        ([*lead, n_bags], wants_text and argmax, index_dtype(n_patches)),
        ([*turned, n_patches], wants_image and argmax, index_dtype(n_bags)),
    )
    return Outputs(
        *(
            torch.empty(shape if want else [0] * len(shape), dtype=dtype, device=text.device)
            for shape, want, dtype in wanted
        )
    )


def _fill_none(index: Tensor) -> None:
    """A masked token's own index is none; the kernel writes the others."""
    index.fill_(255 if index.dtype == torch.uint8 else -1)


def maxsim_forward(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    wants_text: bool = True,
    wants_image: bool = True,
    mean: bool = False,
    want_argmax: bool = False,
    precision: str = "ieee",
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``text_to_image``, ``image_to_text``, ``text_argmax``, ``image_argmax`` of the contract.

    Args:
        text: ``[Nt, N, D]`` in bfloat16, float16 or float32.
        image: ``[Ni, P, D]``, or ``[Nt, K, P, D]`` for candidates (pairs: ``K = 1``), same dtype.
        text_mask: bool ``[Nt, N]``; ``image_mask`` bool ``[Ni, P]`` or ``[Nt, K, P]``.
        mask_mode: ``"exclude"`` or ``"zero"``.
        precision: of float32 products: ``"ieee"``, ``"tf32"`` or ``"bf16"``.
        held: int32 of ``plan.size``; left as ``maxsim_backward`` takes it.

    What is not wanted comes back empty with its rank. Indices have ``index_dtype`` of what they
    point at, -1 (255 in uint8) for none. One image must span fewer than 2**31 elements.
    """
    if precision == "bf16":
        text, image, precision = text.to(torch.bfloat16), image.to(torch.bfloat16), "ieee"
    text, image = (x if x.stride(-1) == 1 else x.contiguous() for x in (text, image))
    outputs = _outputs(text, image, wants_text, wants_image, want_argmax)
    if text.numel() == 0 or image.numel() == 0:
        outputs.text_to_image.zero_()
        outputs.image_to_text.zero_()
        for index in outputs[2:]:
            _fill_none(index)
        if held is not None:
            held.zero_()
        return outputs
    masks, options = (text_mask, image_mask), Options(mask_mode == "zero", mean, precision)
    if text.shape[1] <= LONGEST_SLOT:
        _forward(text, image, masks, options, outputs, held)
        return outputs
    _forward_in_pieces(text, image, masks, options, outputs)
    if held is not None:
        planning.make(text, image, masks, held=held)
    return outputs


def _forward(text, image, masks, options: Options, outputs: Outputs, held=None) -> None:
    classes = slot_classes(text, image, masks[0])
    plan = planning.make(text, image, masks, classes, outputs[2:], held)
    argmax = outputs.text_argmax.numel() + outputs.image_argmax.numel() > 0
    both = outputs.text_to_image.numel() > 0 and outputs.image_to_text.numel() > 0
    odd = (options.zero and masks[0] is not None) or masks[1] is not None or not both

    together, slot = text.shape[0], tiles.slot_of(text.shape[1])
    if image.dim() == 4:
        together, slot = 1, max(slot, tiles.SMALLEST_BLOCK)

    def tile_of(slot: int) -> tiles.Tile:
        return tiles.forward_tile(
            text.device, text.dtype, text.shape[2], slot, together, options.precision, argmax, odd
        )

    for slots in launches(slot, text.shape[0], classes, tile_of):
        _launch(text, image, plan, options, outputs, slots)


def slot_classes(text: Tensor, image: Tensor, text_mask: Tensor | None) -> int:
    """Into how many classes of slots the texts are sorted; 0: they are not."""
    slot = tiles.slot_of(text.shape[1])
    pairs = text.shape[0] * image.shape[-3]
    alike = slot == tiles.SMALLEST_SLOT or slot > LONGEST_SLOT
    if image.dim() == 4 or text_mask is None or alike or pairs < SORTED_PAIRS:
        return 0
    return (slot // tiles.SMALLEST_SLOT).bit_length()


class Slots(NamedTuple):
    """The slot classes that one launch serves, their slots and tiles, and programs enough for all.

    How many texts a class holds is known on the device alone. ``groups`` programs suffice however
    the texts are divided; those past the end of the last class leave at once.
    """

    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    tiles: tuple[Any, ...]
    groups: int

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(tile.block_n for tile in self.tiles)


def launches(slot: int, n_places: int, classes: int, tile_of: Callable[[int], Any]) -> list[Slots]:
    """One launch, or, of texts sorted into ``classes``, one for all whose tiles can share one.

    Those differ in nothing but columns: a launch has one number of warps, stages and registers.
    """
    if not classes:
        tile = tile_of(slot)
        return [Slots((), (slot,), (tile,), triton.cdiv(n_places, tile.block_n // slot))]
    alike: dict[Any, list[tuple[int, int, Any]]] = {}
    for rank in range(classes):
        slot = tiles.SMALLEST_SLOT << rank
        tile = tile_of(slot)
        alike.setdefault(tile.frame, []).append((rank, slot, tile))
    found = []
    for served in alike.values():
        ranks, slots, chosen = zip(*served, strict=True)
        fewest = min(tile.block_n // slot for _, slot, tile in served)
        groups = triton.cdiv(n_places, fewest) + len(served) - 1
        found.append(Slots(ranks, slots, chosen, groups))
    return found


def _launch(
    text: Tensor, image: Tensor, plan: Plan, options: Options, outputs: Outputs, slots: Slots
) -> None:
    n_texts, n_bags, width = text.shape
    n_images, n_patches = image.shape[-3:-1]
    tile = max(slots.tiles, key=lambda one: one.shares)
    strides = text.stride(0), text.stride(1), image.stride(0), image.stride(-3), image.stride(-2)
    unit = tiles.common_unit(width, *strides)
    run = tiles.images_per_program(text.device, slots.groups, n_images, LARGEST_GRID)
    left, run = tiles.leftovers(tile, n_patches, run)
    maxsim_forward_kernel[(slots.groups, triton.cdiv(n_images, run))](
        text, image, tuple(plan.text), tuple(plan.image), plan.order, plan.bounds, *outputs,
        n_texts, n_images, n_bags, n_patches, width // unit, run, left,
        *(stride // unit for stride in strides),
        UNIT=unit, BLOCK_P=tile.block_p, BLOCK_N=slots.columns, SLOT=slots.slots,
        SHAPE=(tile.head, tile.tail, tile.step, tile.covers(width), options.precision),
        RANKS=slots.ranks, TEXT_MASK=plan.text is not NOTHING,
        IMAGE_MASK=plan.image is not NOTHING, ZERO=options.zero, MEAN=options.mean,
        CANDIDATES=image.dim() == 4, SHARED=tuple(one.shares and left > 0 for one in slots.tiles),
        WANTS_TEXT=outputs.text_to_image.numel() > 0,
        WANTS_IMAGE=outputs.image_to_text.numel() > 0,
        ARGMAX=outputs.text_argmax.numel() + outputs.image_argmax.numel() > 0,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def _forward_in_pieces(text, image, masks, options: Options, outputs: Outputs) -> None:
    """Texts of more bags than a tile holds: each direction alone, its own side cut into pieces.

    A direction's sum runs over its own tokens, so pieces of that side only add up, in a fixed
    order. The image's direction is the text's with the sides exchanged.
    """
    if outputs.text_to_image.numel():
        _sum_pieces(text, image, masks, options, outputs.text_to_image, outputs.text_argmax)
    if outputs.image_to_text.numel() and image.dim() == 3:
        turned = masks[1], masks[0]
        _sum_pieces(image, text, turned, options, outputs.image_to_text, outputs.image_argmax)
    elif outputs.image_to_text.numel():
        own = image.flatten(0, 1)
        others = text[:, None].expand(-1, image.shape[1], -1, -1).flatten(0, 1)[:, None]
        own_mask = None if masks[1] is None else masks[1].flatten(0, 1)
        other_mask = masks[0]
        if other_mask is not None:
            other_mask = other_mask.repeat_interleave(image.shape[1], 0)[:, None]
        score, index = outputs.image_to_text, outputs.image_argmax
        _sum_pieces(
            own, others, (own_mask, other_mask), options,
            score.view(-1, 1), index.view(-1, 1, own.shape[1]),
        )  # fmt: skip


def _sum_pieces(own, others, masks, options: Options, scores: Tensor, index: Tensor) -> None:
    for first in range(0, own.shape[1], LONGEST_SLOT):
        piece = slice(first, first + LONGEST_SLOT)
        cut = None if masks[0] is None else masks[0][:, piece]
        part = _outputs(own[:, piece], others, True, False, index.numel() > 0)
        _forward(own[:, piece], others, (cut, masks[1]), options._replace(mean=False), part)
        scores.copy_(part.text_to_image if first == 0 else scores + part.text_to_image)
        if index.numel():
            index[..., piece] = part.text_argmax
    if options.mean:
        scores /= own.shape[1] if masks[0] is None else masks[0].sum(-1).clamp_min(1)[:, None]
