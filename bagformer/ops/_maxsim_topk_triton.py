"""Top-k through the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from bagformer.ops._triton import near, on_device, precision_of

# A program holds one row's k best in registers; more are merged by torch.sort.
LONGEST = 512


def forward(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    k: int,
    to_image: bool,
    mask_mode: str,
    mean: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Scores and indices ``[rows, k]``, for ``k <= LONGEST``."""
    from bagformer.kernels.topk import maxsim_topk

    with on_device(text):
        return maxsim_topk(
            near("text", text),
            near("image", image),
            k,
            text_mask,
            image_mask,
            mask_mode,
            to_image,
            mean,
            precision_of(text.dtype, precision),
        )
