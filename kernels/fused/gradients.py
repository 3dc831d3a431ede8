"""Launches the backward of the scores: allocates, plans, recomputes indices that were not saved."""

import torch
import triton
from bagformer.kernels import plan as planning
from bagformer.kernels import scoring, tiles
from bagformer.kernels.maxsim_backward import grad_image_kernel, grad_text_kernel
from bagformer.kernels.plan import NOTHING, Plan
from torch import Tensor

INDEX_BYTES = 256 << 20  # of indices held at a time when they are recomputed


def maxsim_backward(
    grad_text_to_image: Tensor | None,
    grad_image_to_text: Tensor | None,
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    text_argmax: Tensor | None = None,
    image_argmax: Tensor | None = None,
    mask_mode: str = "exclude",
    mean: bool = False,
    wants_text: bool = True,
    wants_image: bool = True,
    precision: str = "ieee",
    wide: bool = False,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``text`` and ``image``, in their dtype, empty where not wanted.

    ``wide``: in float32, whatever the features' dtype.

    ``text_argmax`` and ``image_argmax`` are what ``maxsim_forward`` gave; where one that is needed
    is None or empty, both are computed again, a few texts at a time. ``held`` is what it left of
    the masks, made again where it is None or empty. A gradient that is None is zero.
    Deterministic to the last bit.
    """
    grads = tuple(
        None if grad is None else grad.to(torch.float32).contiguous()
        for grad in (grad_text_to_image, grad_image_to_text)
    )
    kept, dtype = (text, image), torch.float32 if wide else text.dtype
    if precision == "bf16":
        text, image, precision = text.to(torch.bfloat16), image.to(torch.bfloat16), "ieee"
    text, image = (x if x.stride(-1) == 1 else x.contiguous() for x in (text, image))
    chosen = text_argmax, image_argmax
    missing = any(
        grad is not None and (index is None or index.numel() == 0)
        for grad, index in zip(grads, chosen, strict=True)
    )
    nothing = grads == (None, None) or text.numel() == 0 or image.numel() == 0
    # every row is written, those of masked tokens with zeros; sums over chunks start from zeros
    grad_text, grad_image = (
        (x.new_zeros if nothing or missing else x.new_empty)(
            x.shape if wanted else [0] * x.dim(), dtype=dtype
        )
        for x, wanted in zip(kept, (wants_text, wants_image), strict=True)
    )
    if nothing:
        return grad_text, grad_image
    masks, settings = (text_mask, image_mask), (mean, precision)
    if missing:
        _recompute(grads, text, image, masks, mask_mode, settings, grad_text, grad_image)
    else:
        plan = _plan(text, image, masks, held)
        _launch(grads, text, image, plan, chosen, settings, grad_text, grad_image, False)
    return grad_text, grad_image


def _plan(text: Tensor, image: Tensor, masks, held: Tensor | None = None) -> Plan:
    """What the forward left, or the same again, without an order where none is of use here."""
    classes = _classes(text, image, masks[0])
    if held is None or held.numel() == 0:
        return planning.make(text, image, masks, classes)
    masked = masks[0] is not None, masks[1] is not None
    return planning.read(held, text, image, masked, classes > 0)


def _classes(text: Tensor, image: Tensor, text_mask: Tensor | None) -> int:
    if tiles.slot_of(text.shape[1]) > tiles.LONGEST_PIECE:
        return 0
    return scoring.slot_classes(text, image, text_mask)


def _recompute(grads, text, image, masks, mask_mode, settings, grad_text, grad_image) -> None:
    """Indices of a few texts, their gradients, and on to the next: memory is bounded."""
    n_images, n_patches = image.shape[-3:-1]
    each = n_images * (
        text.shape[1] * scoring.index_dtype(n_patches).itemsize
        + n_patches * scoring.index_dtype(text.shape[1]).itemsize
    )
    step = max(1, INDEX_BYTES // each)
    shared = image.dim() == 3 and step < text.shape[0] and grad_image.numel() > 0
    # several additions to one image's gradient are rounded once, at the end
    sums = grad_image.to(torch.float32) if shared else grad_image
    for first in range(0, text.shape[0], step):
        part = slice(first, first + step)
        words = text[part]
        pictures = image if image.dim() == 3 else image[part]
        word_mask = None if masks[0] is None else masks[0][part]
        picture_mask = masks[1] if image.dim() == 3 or masks[1] is None else masks[1][part]
        outputs = scoring.maxsim_forward(
            words, pictures, word_mask, picture_mask, mask_mode,
            grads[0] is not None, grads[1] is not None, want_argmax=True, precision=settings[1],
        )  # fmt: skip
        slopes = (
            None if grads[0] is None else grads[0][part],
            _of_texts(grads[1], part, image.dim() == 4),
        )
        into = sums if image.dim() == 3 or sums.numel() == 0 else sums[part]
        own = grad_text[part] if grad_text.numel() else grad_text
        plan = _plan(words, pictures, (word_mask, picture_mask))
        _launch(slopes, words, pictures, plan, outputs[2:], settings, own, into, shared)
    if sums is not grad_image:
        grad_image.copy_(sums)


def _of_texts(grad: Tensor | None, part: slice, candidates: bool) -> Tensor | None:
    if grad is None:
        return None
    return grad[part] if candidates else grad[:, part].contiguous()


def _launch(grads, text, image, plan: Plan, chosen, settings, grad_text, grad_image, add) -> None:
    slot, together = min(tiles.slot_of(text.shape[1]), tiles.LONGEST_PIECE), text.shape[0]
    if image.dim() == 4:
        slot, together = max(slot, tiles.SMALLEST_BLOCK), 1
    classes = 0
    if plan.order is not None:
        classes = (slot // tiles.SMALLEST_SLOT).bit_length()
    pieces = triton.cdiv(text.shape[1], slot)
    sizes = text.device, text.dtype, text.shape[2]
    common = (grads, text, image, plan, chosen, settings, pieces)
    if grad_text.numel():
        for slots in scoring.launches(
            slot, text.shape[0] * pieces, classes,
            lambda slot: tiles.text_gradient_tile(*sizes, slot, together),
        ):  # fmt: skip
            _launch_text(*common, slots, grad_text)
    if grad_image.numel():
        tile = tiles.image_gradient_tile(*sizes, slot, together)
        _launch_image(*common, slot, classes, tile, grad_image, add)


def _flags(grads, text, image, plan: Plan, chosen, settings) -> dict:
    n_texts, n_bags, width = text.shape
    n_images, n_patches = image.shape[-3:-1]
    widest = n_texts * max(n_images * n_bags, n_patches, n_bags * width, text.stride(0))
    if image.dim() == 4:
        widest = max(widest, n_texts * n_images * n_patches)
    return {
        "TEXT_MASK": plan.text is not NOTHING,
        "IMAGE_MASK": plan.image is not NOTHING,
        "MEAN": settings[0],
        "CANDIDATES": image.dim() == 4,
        "TO_IMAGE": grads[0] is not None,
        "TO_TEXT": grads[1] is not None,
        "SCALED": text.dtype == torch.float16,
        "PRECISION": settings[1],
        "WIDE": widest >= 1 << 31,
        "PACKED": text.dtype.itemsize == 2 and _narrow(grads, chosen),
    }


def _narrow(grads, chosen) -> bool:
    """Whether the indices that are used fit in 15 bits, so that two are compared at once."""
    used = [index for grad, index in zip(grads, chosen, strict=True) if grad is not None]
    return all(index.dtype.itemsize <= 2 for index in used)


def _launch_text(
    grads, text, image, plan: Plan, chosen, settings, pieces, slots: scoring.Slots, out
) -> None:
    n_texts, n_bags, width = text.shape
    n_images, n_patches = image.shape[-3:-1]
    tile = slots.tiles[0]
    strides = image.stride(0), image.stride(-3), image.stride(-2)
    unit = tiles.common_unit(width, *strides)
    grad_text_kernel[(slots.groups, triton.cdiv(width, tile.span))](
        image, tuple(plan.text), tuple(plan.image), plan.order, plan.bounds, grads, *chosen, out,
        n_texts, n_images, n_bags, n_patches, width // unit, pieces,
        *(stride // unit for stride in strides),
        UNIT=unit, BLOCK_P=tile.block_p, BLOCK_N=slots.columns, SLOT=slots.slots, SPAN=tile.span,
        WHOLE=width % tile.span == 0, CUT=pieces > 1, RANKS=slots.ranks,
        **_flags(grads, text, image, plan, chosen, settings),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


def _leftovers(block_p: int, text: Tensor, image: Tensor, flags: dict) -> int:
    """Rows of an image that share a tile with those of other images; 0: they have one of their own.

    float16 has a scale for each program, a masked image's rows are not the last ones, and offsets
    in a shared tile are 32-bit.
    """
    n_images, n_patches = image.shape[-3:-1]
    left = n_patches % block_p
    few = 0 < left <= block_p // 2 // tiles.FEWEST_SHARING and n_patches > block_p
    alone = any(flags[name] for name in ("CANDIDATES", "IMAGE_MASK", "SCALED", "WIDE"))
    far = text.shape[0] * n_patches * block_p >= 1 << 31
    return left if few and not alone and not far and n_images > 1 else 0


def _launch_image(
    grads, text, image, plan: Plan, chosen, settings, pieces, slot, classes, tile, out, add
) -> None:
    n_texts, n_bags, width = text.shape
    n_images, n_patches = image.shape[-3:-1]
    unit = tiles.common_unit(width, text.stride(0), text.stride(1))
    items = out.numel() // (n_patches * width)
    flags = _flags(grads, text, image, plan, chosen, settings)
    left = _leftovers(tile.block_p, text, image, flags)
    programs, tiles_of_image = items, triton.cdiv(n_patches, tile.block_p)
    if left:
        # first, since their rounds are longer than others
        programs += triton.cdiv(items, tile.block_p // 2 // left)
        tiles_of_image -= 1
    grid = (programs, tiles_of_image, triton.cdiv(width, tile.span))
    grad_image_kernel[grid](
        text, tuple(plan.text), tuple(plan.image), plan.order, plan.bounds, grads, *chosen, out,
        n_texts, n_images, n_bags, n_patches, width // unit, pieces, left,
        text.stride(0) // unit, text.stride(1) // unit,
        UNIT=unit, BLOCK_P=tile.block_p, BLOCK_N=tile.block_n,
        SLOT=tiles.SMALLEST_SLOT if classes else slot, CLASSES=classes, SPAN=tile.span,
        WHOLE=width % tile.span == 0, CUT=pieces > 1, ADD=add, SHARED=left > 0,
        **flags,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
