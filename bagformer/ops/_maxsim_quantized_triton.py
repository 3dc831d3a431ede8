"""MaxSim on eight-bit image features through the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from bagformer.ops._maxsim_torch import Options
from bagformer.ops._triton import near, on_device


def forward(
    text: Tensor,
    values: Tensor,
    scales: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    options: Options,
    argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and narrow winners, each empty with its rank where it is not wanted."""
    from bagformer.kernels.maxsim_quantized import maxsim_quantized_forward

    if text.shape[-1] == 0:
        # similarities of no features are 0, as those of a zero, and somebody still wins
        text, values = (side.new_zeros(*side.shape[:-1], 1) for side in (text, values))
    with on_device(text):
        return maxsim_quantized_forward(
            near("text", text),
            near("image", values),
            scales,
            text_mask,
            image_mask,
            options.mask_mode,
            options.wants_text,
            options.wants_image,
            options.reduction == "mean",
            argmax,
        )
