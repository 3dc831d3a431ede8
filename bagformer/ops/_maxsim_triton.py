"""MaxSim through the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from bagformer.ops._maxsim_torch import Options
from bagformer.ops._triton import near, on_device, precision_of


def forward(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    options: Options,
    argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores and narrow winners, each empty with its rank where it is not wanted, and the plan."""
    from bagformer.kernels.scoring import maxsim_forward

    plan = new_plan(text, image, text_mask, image_mask, argmax)

    if text.shape[-1] == 0:
        # similarities of no features are 0, as those of a zero, and somebody still wins
        text, image = (side.new_zeros(*side.shape[:-1], 1) for side in (text, image))
    with on_device(text):
        found = maxsim_forward(
            near("text", text),
            near("image", image),
            text_mask,
            image_mask,
            options.mask_mode,
            options.wants_text,
            options.wants_image,
            options.reduction == "mean",
            argmax,
            precision_of(text.dtype, options.precision),
            plan if plan.numel() else None,
        )
    return *found, plan


def new_plan(
    text: Tensor, image: Tensor, text_mask: Tensor | None, image_mask: Tensor | None, argmax: bool
) -> Tensor:
    """Unwritten int32 for what the forward leaves of the masks; empty where it leaves nothing."""
    masked = text_mask is not None, image_mask is not None
    size = 0
    if argmax and any(masked):
        from bagformer.kernels import plan

        size = plan.size(text, image, masked)
    return text.new_empty([size], dtype=torch.int32)


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    winners: tuple[Tensor, Tensor],
    options: Options,
    wants: tuple[bool, bool],
    wide: bool,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients in the features' dtype or, ``wide``, in float32; empty where not wanted.

    Winners that are empty are computed again, a few texts at a time, and so is an empty plan.

    Raises:
        ValueError: a plan that is not of these features' forward.
    """
    from bagformer.kernels.gradients import maxsim_backward

    if plan is not None and plan.numel():
        expected = new_plan(text, image, text_mask, image_mask, True)
        if plan.shape != expected.shape or plan.dtype != expected.dtype:
            raise ValueError(
                f"plan must be the one that the forward gave, {expected.numel()} elements in "
                f"int32, got {plan.numel()} in {plan.dtype}"
            )
    with on_device(text):
        return maxsim_backward(
            *grads,
            near("text", text),
            near("image", image),
            text_mask,
            image_mask,
            *winners,
            options.mask_mode,
            options.reduction == "mean",
            *wants,
            precision_of(text.dtype, options.precision),
            wide,
            plan,
        )


def describe(text: Tensor, image: Tensor) -> str:
    """The tile of the scoring kernel for these tensors, at the default precision."""
    from bagformer.kernels import scoring, tiles

    together, slot = text.shape[0], tiles.slot_of(min(text.shape[1], scoring.LONGEST_SLOT))
    if image.dim() == 4:
        together, slot = 1, max(slot, tiles.SMALLEST_BLOCK)
    sizes = text.device, text.dtype, text.shape[2], slot, together
    eight_bits = image.dtype in (torch.int8, torch.float8_e4m3fn)
    tile = tiles.quantized_tile(*sizes) if eight_bits else tiles.forward_tile(*sizes, "ieee")
    features = f"in steps of {tile.step} features" if tile.step else "all features at once"
    return (
        f"tiles for {tiles.family_of(text.device)} of {tile.block_p} patches x {tile.block_n} bags "
        f"in slots of at most {slot}, {features}, {tile.warps} warps, {tile.stages} stages"
    )
