"""Decode pictures that come from outside: few formats, a limit on pixels, always RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

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


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB picture from an encoded one.

    JPEG, PNG, WEBP, GIF (first frame) and BMP. Transparency is laid on white; 16-bit grey keeps its
    upper 8 bits; an EXIF orientation is not applied. More than ``max_pixels`` pixels are refused
    from the header, before anything is decoded. Raises :class:`ImageError`.
    """
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
        return _to_rgb(picture)
    except _BROKEN as error:
        raise ImageError("broken image", f"truncated or damaged: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert("RGB")
