"""Pictures for train_tiny.py: the drawings of the three training themes in any colours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bagformer.data.muge import MugeImages

DARK, BLUE, WHITE = (51.0,) * 3, (47.0, 136.0, 255.0), (255.0,) * 3
LAYER_SIZE = 80


def icon_layers(images: MugeImages, icons: list[int]) -> Tensor:
    """``[icons, 4, 80, 80]`` uint8: how much of a pixel is outer stroke, outer surface, inner
    stroke and inner surface, read off the pictures filled and two-tone."""
    layers = torch.empty(len(icons), 4, LAYER_SIZE, LAYER_SIZE, dtype=torch.uint8)
    for row, icon in enumerate(icons):
        filled, two_tone = (
            torch.from_numpy(np.array(images[4 * icon + theme])).permute(2, 0, 1).float()
            for theme in (1, 2)
        )
        inside = _dark(filled)
        stroke = _dark(two_tone)
        surface = (1 - stroke - (two_tone[0] - DARK[0]).div(204).clamp(0, 1)).clamp(0, 1)
        parts = torch.stack(
            [stroke * inside, surface * inside, stroke * (1 - inside), surface * (1 - inside)]
        )
        small = F.interpolate(parts[None], size=LAYER_SIZE, mode="bilinear", antialias=True)
        layers[row] = small[0].clamp(0, 1).mul(255).round().byte()
    return layers


def _dark(picture: Tensor) -> Tensor:
    # blue and white both have a full blue channel, the stroke has not
    return (255 - picture[2]).div(204).clamp(0, 1)


def random_colours(batch: int) -> Tensor:
    """``[B, 5, 3]`` in [0, 1]: colours of the four layers and of the background.

    A share shows one of the three training themes as it is; the rest is random, often on white,
    often with a dark stroke, and often with layers that share a colour, as in drawings.
    """
    colours = torch.rand(batch, 5, 3)
    white = torch.rand(batch) < 0.6
    colours[white, 4] = 1.0
    dark = torch.rand(batch) < 0.7
    colours[dark, 0] *= 0.35
    for layer, shares in (
        (1, ((0.15, 4), (0.30, 0))),
        (2, ((0.35, 4), (0.65, 0))),
        (3, ((0.30, 4), (0.60, 1))),
    ):
        chance, copied = torch.rand(batch), torch.zeros(batch, dtype=torch.bool)
        for bound, source in shares:
            take = (chance < bound) & ~copied
            colours[take, layer] = colours[take, source]
            copied |= take
        if layer > 1:
            colours[~copied & (chance > 0.85), layer] = 1.0
    faint = (colours[:, 0] - colours[:, 4]).abs().mean(dim=1) < 0.25
    light = colours[:, 4].mean(dim=1) > 0.5
    colours[faint & light, 0] *= 0.2
    colours[faint & ~light, 0] = 1 - 0.2 * colours[faint & ~light, 0]
    dark_c, blue_c, white_c = (torch.tensor(colour) / 255 for colour in (DARK, BLUE, WHITE))
    themes = torch.stack(
        [
            torch.stack([dark_c, white_c, dark_c, white_c, white_c]),
            torch.stack([dark_c, dark_c, white_c, white_c, white_c]),
            torch.stack([dark_c, blue_c, dark_c, blue_c, white_c]),
        ]
    )
    plain = torch.rand(batch) < 0.3
    colours[plain] = themes[torch.randint(0, 3, (int(plain.sum()),))]
    return colours


def render(layers: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Pixel values ``[B, 3, size, size]`` of layers ``[B, 4, H, W]``, moved and recoloured."""
    batch = len(layers)
    angle = (torch.rand(batch) - 0.5) * 0.12
    scale = 1 + (torch.rand(batch, 2) - 0.5) * torch.tensor([0.2, 0.1])
    shift = (torch.rand(batch, 2) - 0.5) * 0.1
    cos, sin, zoom = angle.cos(), angle.sin(), 1 / scale[:, 0]
    theta = torch.stack(
        [
            torch.stack([cos * zoom * scale[:, 1], -sin * zoom, shift[:, 0]], dim=1),
            torch.stack([sin * zoom, cos * zoom, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [batch, 4, size, size], align_corners=False)
    moved = F.grid_sample(layers.float() / 255, grid, align_corners=False)
    ground = (1 - moved.sum(dim=1, keepdim=True)).clamp(0, 1)
    pixels = torch.einsum("bkhw,bkc->bchw", torch.cat([moved, ground], 1), random_colours(batch))
    pixels = (pixels.clamp(0, 1) - mean[:, None, None]) / std[:, None, None]
    return pixels.contiguous(memory_format=torch.channels_last)
