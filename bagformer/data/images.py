"""Decode pictures that come from outside: few formats, a limit on pixels, always RGB.

How a picture becomes RGB is said once, in :func:`to_rgb`, for readers and image processor alike.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Literal

import numpy as np
from PIL import Image

Transparency = Literal["white", "drop"]
TRANSPARENCY = ("white", "drop")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000

_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """Bytes that are no acceptable picture; ``reason`` is a short word for counting."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(reason, problem)
        self.reason, self.problem = reason, problem

    def __str__(self) -> str:
        return self.problem


def transparency_of(protocol: str) -> Transparency:
    """How pictures become RGB under a model's protocol: "drop" for ``original``, else "white"."""
    return "drop" if protocol == "original" else "white"


def check_transparency(transparency: str) -> None:
    """Raises ValueError unless it is "white" or "drop"."""
    if transparency not in TRANSPARENCY:
        known = ", ".join(TRANSPARENCY)
        raise ValueError(f"transparency must be one of {known}, got {transparency!r}")


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, transparency: Transparency = "white"
) -> Image.Image:
    """RGB picture from an encoded one, by :func:`to_rgb` with ``transparency``.

    JPEG, PNG, WEBP, GIF (first frame) and BMP; an EXIF orientation is not applied. More than
    ``max_pixels`` pixels are refused from the header, before anything is decoded. Raises
    :class:`ImageError`, and ValueError for another ``transparency``.
    """
    check_transparency(transparency)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too large", f"more than {max_pixels} pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        head = data[:8].hex(" ")
        raise ImageError(
            "unknown format", f"none of {', '.join(FORMATS)}; starts with {head or 'nothing'}"
        ) from error
    except _BROKEN as error:
        raise ImageError("broken image", f"cannot be read: {error}") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            "too large", f"{width} x {height} pixels, more than the limit of {max_pixels}"
        )
    if not width * height:
        raise ImageError("broken image", f"{width} x {height} pixels")
    try:
        picture.load()
        return to_rgb(picture, transparency)
    except _BROKEN as error:
        raise ImageError("broken image", f"truncated or damaged: {error}") from error


def to_rgb(picture: Image.Image, transparency: Transparency = "white") -> Image.Image:
    """RGB picture, 8 bits a channel, from one of any mode.

    - "white": transparency is laid on white, and 16-bit grey keeps its upper 8 bits. Mode ``I``,
      which no format of :data:`FORMATS` gives, is 16-bit grey if it holds a number above 255.
    - "drop": Pillow's ``convert("RGB")``, as the original: transparency is dropped, and numbers
      of 16-bit grey above 255 become 255.

    Raises ValueError for a picture that Pillow cannot convert, or another ``transparency``.
    """
    check_transparency(transparency)
    has_key = "transparency" in picture.info
    if picture.mode == "RGB" and not (has_key and transparency == "white"):
        return picture
    if transparency == "drop":
        # the same values as straight from a palette, without Pillow's warning
        return (picture.convert("RGBA") if picture.mode == "P" else picture).convert("RGB")
    if picture.mode.startswith("I"):
        return _from_grey(picture).convert("RGB")
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    if picture.mode in ("RGBA", "LA", "PA") or has_key:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert("RGB")


def _from_grey(picture: Image.Image) -> Image.Image:
    """8-bit grey from mode ``I`` or ``I;16``; the level that a PNG calls transparent is white."""
    deep = np.asarray(picture).astype(np.int64).clip(0, 65535)
    wide = picture.mode != "I" or deep.max() > 255
    grey = deep >> 8 if wide else deep
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(deep == key, 255, grey)
    return Image.fromarray(grey.astype(np.uint8))
