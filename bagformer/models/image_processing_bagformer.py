"""Pictures to ``pixel_values``: RGB, bicubic resize, CLIP's mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from bagformer.data.images import Transparency, check_transparency, to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos")


def to_pil(image: Any, name: str) -> Image.Image:
    """From a PIL image, a uint8 array ``[H, W(, C)]`` or tensor ``[C, H, W]``, or 16-bit grey."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3, 4):
            raise ValueError(
                f"{name}: a tensor must be uint8 [1|3|4, H, W], "
                f"got {image.dtype} {list(image.shape)}"
            )
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"{name} must be a PIL image, an array or a tensor, got {type(image).__name__}"
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    grey = image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
    colour = image.ndim == 3 and image.shape[2] in (3, 4) and image.dtype == np.uint8
    if not (grey or colour):
        raise ValueError(
            f"{name}: an array must be uint8 [H, W, 3|4], or uint8 or uint16 [H, W], "
            f"got {image.dtype} {list(image.shape)}"
        )
    if 0 in image.shape:
        raise ValueError(f"{name} has no pixels: {list(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(image))


class BagFormerImageProcessor(BaseImageProcessor):
    """Resize to exactly ``size`` (an int, or height and width), scale to [0, 1], normalise.

    ``resample``: nearest, bilinear, bicubic or lanczos. ``transparency``: how a picture becomes
    RGB, "white" or "drop" (what the original did): see :func:`bagformer.data.images.to_rgb`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: int | dict[str, int] = 256,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        resample: str = "bicubic",
        transparency: Transparency = "white",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if set(size) != {"height", "width"} or any(
            not isinstance(side, int) or side < 1 for side in size.values()
        ):
            raise ValueError(f"size must be a positive int or have height and width, got {size!r}")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(
                f"image_mean and image_std must hold 3 numbers, the latter above 0, "
                f"got {image_mean!r} and {image_std!r}"
            )
        if resample not in RESAMPLING:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLING)}, got {resample!r}")
        check_transparency(transparency)
        self.size = dict(size)
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self.resample = resample
        self.transparency: Transparency = transparency

    def one(self, image: Any, name: str = "image") -> Tensor:
        """One picture to float32 ``[3, height, width]``."""
        picture = to_pil(image, name)
        if 0 in picture.size:
            raise ValueError(f"{name} has no pixels: {picture.size}")
        rgb = to_rgb(picture, self.transparency)
        target = (self.size["width"], self.size["height"])
        if rgb.size != target:
            rgb = rgb.resize(target, getattr(Image.Resampling, self.resample.upper()))
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float().div(255)
        mean = torch.tensor(self.image_mean)[:, None, None]
        std = torch.tensor(self.image_std)[:, None, None]
        return pixels.sub(mean).div(std)

    def preprocess(self, images: Any, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """``pixel_values [B, 3, height, width]`` float32 of one picture or a list of pictures."""
        if kwargs:
            raise TypeError(f"unknown arguments: {', '.join(sorted(kwargs))}")
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("images is empty")
        pixels = torch.stack([self.one(image, f"images[{i}]") for i, image in enumerate(images)])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
