"""Launches the scoring kernel: allocates, plans, picks tiles. Checks nothing; the ops do that.

Nothing here waits for the device: sizes come from shapes, masks are digested by kernels of plan.py,
and texts are sorted into slots of 8, 16, 32 ... columns on the device (see ``slot_launches``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from bagformer.kernels import tiles
from bagformer.kernels.maxsim import maxsim_forward_kernel
from bagformer.kernels.nan_argmax import nan_argmax_kernel
from bagformer.kernels.plan import NOTHING, Tokens, bucket, compact_both
from torch import Tensor

LONGEST_SLOT = 128  # a text of more bags is cut into pieces of this many
SORTED_PAIRS = 1 << 16  # with fewer pairs, a launch for each slot costs more than emptier tiles
PAIRS_LOOKED_OVER = 1024  # by one program of the kernel that mends the indices of NaN maxima
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``text_to_image``, ``image_to_text``, ``text_argmax``, ``image_argmax`` of the contract.

    Args:
        text: ``[Nt, N, D]`` in bfloat16, float16 or float32.
        image: ``[Ni, P, D]``, or ``[Nt, K, P, D]`` for candidates (pairs: ``K = 1``), same dtype.
        text_mask: bool ``[Nt, N]``; ``image_mask`` bool ``[Ni, P]`` or ``[Nt, K, P]``.
        mask_mode: ``"exclude"`` or ``"zero"``.
        precision: of float32 products: ``"ieee"``, ``"tf32"`` or ``"bf16"``.

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
        return outputs
    options = Options(mask_mode == "zero", mean, precision)
    if text.shape[1] > LONGEST_SLOT:
        _forward_in_pieces(text, image, (text_mask, image_mask), options, outputs)
    else:
        _forward(text, image, (text_mask, image_mask), options, outputs)
    return outputs


def _forward(text, image, masks, options: Options, outputs: Outputs) -> None:
    plans = compact_both(*masks)
    for index, mask in zip(outputs[2:], masks, strict=True):
        if mask is not None:
            _fill_none(index)
    for slots in slot_launches(text, image, plans[0]):
        _launch(text, image, plans, options, outputs, *slots)
    if outputs.text_argmax.numel() + outputs.image_argmax.numel() > 0:
        _mend_nan_indices(text, image, plans, outputs)


def _mend_nan_indices(text, image, plans, outputs: Outputs) -> None:
    pairs = text.shape[0] * image.shape[-3]
    nan_argmax_kernel[(triton.cdiv(pairs, PAIRS_LOOKED_OVER),)](
        text, image, tuple(plans[0]), tuple(plans[1]), *outputs,
        text.shape[0], image.shape[-3], text.shape[1], image.shape[-2], text.shape[2],
        text.stride(0), text.stride(1), image.stride(0), image.stride(-3), image.stride(-2),
        PAIRS=PAIRS_LOOKED_OVER, TEXT_MASK=plans[0] is not NOTHING,
        IMAGE_MASK=plans[1] is not NOTHING, CANDIDATES=image.dim() == 4,
        WANTS_TEXT=outputs.text_argmax.numel() > 0, WANTS_IMAGE=outputs.image_argmax.numel() > 0,
        num_warps=4,
    )  # fmt: skip


def slot_launches(
    text: Tensor, image: Tensor, plan: Tokens
) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
    """Slot, order and bounds of each launch: one, or one for each slot class over its texts.

    How many texts a class holds is known on the device alone, so each launch has programs for all
    texts, and those past the end of its class leave at once.
    """
    slot = tiles.slot_of(text.shape[1])
    pairs = text.shape[0] * image.shape[-3]
    if image.dim() == 4:
        yield max(slot, tiles.SMALLEST_BLOCK), None, None
    elif plan.counts is None or slot == tiles.SMALLEST_SLOT or pairs < SORTED_PAIRS:
        yield slot, None, None
    else:
        classes = (slot // tiles.SMALLEST_SLOT).bit_length()
        order, bounds = bucket(plan.counts, classes)
        for rank in range(classes):
            yield tiles.SMALLEST_SLOT << rank, order, bounds[rank]


def _launch(
    text: Tensor,
    image: Tensor,
    plans: tuple[Tokens, Tokens],
    options: Options,
    outputs: Outputs,
    slot: int,
    order: Tensor | None = None,
    bounds: Tensor | None = None,
) -> None:
    candidates = image.dim() == 4
    n_texts, n_bags, width = text.shape
    n_images, n_patches = image.shape[-3:-1]
    argmax = outputs.text_argmax.numel() + outputs.image_argmax.numel() > 0
    together = 1 if candidates else n_texts
    floors = options.zero and plans[0] is not NOTHING
    both = outputs.text_to_image.numel() > 0 and outputs.image_to_text.numel() > 0
    tile = tiles.forward_tile(
        text.device, text.dtype, width, slot, together, options.precision, argmax,
        floors or plans[1] is not NOTHING or not both,
    )  # fmt: skip
    groups = triton.cdiv(n_texts, tile.block_n // slot)
    strides = text.stride(0), text.stride(1), image.stride(0), image.stride(-3), image.stride(-2)
    unit = tiles.common_unit(width, *strides)
    run = tiles.images_per_program(text.device, groups, n_images, LARGEST_GRID)
    left, run = tiles.leftovers(tile, n_patches, run)
    maxsim_forward_kernel[(groups, triton.cdiv(n_images, run))](
        text, image, tuple(plans[0]), tuple(plans[1]), order, bounds, *outputs,
        n_texts, n_images, n_bags, n_patches, width // unit, run, left,
        *(stride // unit for stride in strides),
        UNIT=unit, BLOCK_P=tile.block_p, BLOCK_N=tile.block_n, SLOT=slot,
        SHAPE=(tile.head, tile.tail, tile.step, tile.covers(width), options.precision),
        ORDERED=order is not None, TEXT_MASK=plans[0] is not NOTHING,
        IMAGE_MASK=plans[1] is not NOTHING, ZERO=options.zero, MEAN=options.mean,
        CANDIDATES=candidates, SHARED=left > 0, WANTS_TEXT=outputs.text_to_image.numel() > 0,
        WANTS_IMAGE=outputs.image_to_text.numel() > 0, ARGMAX=argmax,
        num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
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
