"""Lay an :class:`~bagformer.retrieval.explain.Explanation` over the picture, as pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

Colour = tuple[int, int, int]

# Lightness rises all the way, so that the order survives grey printing and colour blindness.
_ANCHORS = (
    (38, 24, 74),
    (56, 68, 140),
    (38, 122, 142),
    (60, 170, 122),
    (166, 206, 74),
    (252, 232, 90),
)
OUTLINE: Colour = (226, 38, 77)


def colour_table(size: int = 256) -> np.ndarray:
    """The scale's colours, uint8 ``[size, 3]``, from low to high."""
    anchors = np.asarray(_ANCHORS, dtype=np.float64)
    places = np.linspace(0, len(anchors) - 1, size)
    channels = [np.interp(places, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


_TABLE = colour_table()


def colours(heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """Look ``heat [rows, columns]`` up between ``low`` and ``high``: uint8 ``[rows, columns, 3]``.

    Values beyond the ends take the end's colour; where ``high <= low`` all take the middle's.
    Raises ValueError for NaN.
    """
    if np.isnan(heat).any():
        raise ValueError("heat: NaN has no colour")
    if high <= low:
        place = np.full(heat.shape, 0.5)
    else:
        place = np.clip((heat.astype(np.float64) - low) / (high - low), 0.0, 1.0)
    return _TABLE[np.rint(place * (len(_TABLE) - 1)).astype(np.int64)]


def square(picture: Image.Image, size: int) -> Image.Image:
    """The picture stretched to ``size`` pixels square, as the model sees it."""
    return picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def thumbnail(picture: Image.Image, size: int) -> Image.Image:
    """The picture in its own shape, at most ``size`` pixels high and wide, and at least 1."""
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _edges(cells: int, size: int) -> list[int]:
    return [round(place * size / cells) for place in range(cells + 1)]


def _blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Repeat each cell of ``[rows, columns, 3]`` over its part of a ``size`` pixel square."""
    for axis in (0, 1):
        widths = np.diff(_edges(values.shape[axis], size))
        values = np.repeat(values, widths, axis=axis)
    return values


def _frame(canvas: Image.Image, cell: tuple[int, int] | None, grid: tuple[int, int]) -> None:
    """Outline one cell, or the whole canvas for None."""
    size = canvas.width
    rows, columns = _edges(grid[0], size), _edges(grid[1], size)
    row, column = cell or (0, 0)
    bottom, right = (rows[row + 1], columns[column + 1]) if cell else (size, size)
    box = (columns[column], rows[row], right - 1, bottom - 1)
    width = max(2, size // 56)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(box, outline=(255, 255, 255), width=width + max(1, width // 2))
    draw.rectangle(box, outline=OUTLINE, width=width)


def overlay_heat(
    picture: Image.Image,
    heat: Tensor,
    cell: tuple[int, int] | None,
    *,
    low: float,
    high: float,
    size: int = 192,
    strength: float = 0.62,
) -> Image.Image:
    """The picture in grey under the colours of ``heat [rows, columns]``, the chosen cell outlined.

    ``cell`` None outlines the whole picture: the bag chose patch 0.
    """
    values = heat.detach().float().cpu().numpy()
    grey = np.asarray(ImageOps.grayscale(square(picture, size)).convert("RGB"), dtype=np.float64)
    colour = _blocks(colours(values, low, high), size)
    mixed = np.rint((1 - strength) * grey + strength * colour).astype(np.uint8)
    canvas = Image.fromarray(mixed)
    _frame(canvas, cell, values.shape)
    return canvas


def overlay_choice(
    picture: Image.Image,
    patch_bags: Tensor,
    palette: Sequence[Colour],
    *,
    size: int = 192,
    strength: float = 0.55,
) -> Image.Image:
    """The picture in grey, each patch in the colour ``palette[bag]`` of the bag that it chose."""
    chosen = patch_bags.detach().cpu().numpy()
    grey = np.asarray(ImageOps.grayscale(square(picture, size)).convert("RGB"), dtype=np.float64)
    # the last row serves -1, a patch without a bag
    table = np.asarray([*palette, (128, 128, 128)], dtype=np.uint8)
    colour = _blocks(table[chosen], size)
    return Image.fromarray(np.rint((1 - strength) * grey + strength * colour).astype(np.uint8))
