"""The pictures of a set: read by workers, encoded in chunks, kept only where they are needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

STORE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
# What numpy holds such numbers as; it has no bfloat16.
_ON_DISK = {torch.float16: np.float16, torch.bfloat16: np.uint16, torch.float32: np.float32}


class OpaqueImages(Mapping[Any, Image.Image]):
    """Pictures as the original reads them: :func:`bagformer.data.images.to_rgb` with "drop".

    ``images``: of a reader of ours; a mapping of another kind gives its pictures as they are, and
    the image processor treats them.
    """

    def __init__(self, images: Mapping[Any, Any]) -> None:
        self.images = images

    def __getitem__(self, key: Any) -> Any:
        read = getattr(self.images, "picture", None)
        return self.images[key] if read is None else read(key, "drop")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)


class _Pixels(Dataset):
    """Pixels of each picture, or the error that it gave: an error that is raised in a worker
    reaches the other process as another one."""

    def __init__(self, images: Mapping[Any, Any], ids: Sequence[Any], processor: Any) -> None:
        self.images, self.ids, self.processor = images, ids, processor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor | Exception:
        key = self.ids[index]
        try:
            return self.processor.one(self.images[key], f"picture {key!r}")
        except Exception as error:
            return error


def _stack(rows: list[Tensor | Exception]) -> Tensor | Exception:
    broken = next((row for row in rows if isinstance(row, Exception)), None)
    if broken is not None:
        return broken
    return torch.stack([row for row in rows if isinstance(row, Tensor)])


class ImageChunk(NamedTuple):
    """Images ``start`` to ``start + len(features)``: ``features [c, P, D]`` for scoring and
    ``embeds [c, P, W]`` for the matching head."""

    start: int
    features: Tensor
    embeds: Tensor


def encode_chunks(
    model: Any,
    processor: Any,
    images: Mapping[Any, Any],
    ids: Sequence[Any],
    *,
    batch_size: int,
    num_workers: int,
) -> Iterator[ImageChunk]:
    """Encode the pictures ``ids`` of ``images`` in that order, a batch at a time.

    Whatever reading a picture raised is raised here. Use under ``torch.inference_mode``.
    """
    weight = next(model.parameters())
    loader: Any = DataLoader(
        _Pixels(images, ids, processor.image_processor),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=weight.is_cuda,
        # of its own, or making it would draw from the caller's random numbers
        generator=torch.Generator(),
    )
    start = 0
    for pixels in loader:
        if isinstance(pixels, Exception):
            raise pixels
        output = model.get_image_features(pixels.to(weight.device, non_blocking=True))
        yield ImageChunk(start, output.image_features, output.image_embeds)
        start += len(pixels)


class TokenStore:
    """The image tokens ``[Ni, P, W]`` that the matching head reads, in memory or in a file.

    ``dtype``: of the numbers kept. ``spill``: a folder for the file, which goes when the store is
    closed; None keeps them in memory. Raises NotADirectoryError.
    """

    def __init__(self, n_images: int, dtype: torch.dtype, spill: str | Path | None = None) -> None:
        self.n_images, self.dtype = n_images, dtype
        self._tokens: Any = None
        self._folder: tempfile.TemporaryDirectory | None = None
        if spill is not None:
            if not Path(spill).is_dir():
                raise NotADirectoryError(f"spill: there is no folder {spill}")
            self._folder = tempfile.TemporaryDirectory(prefix="bagformer-", dir=spill)

    def _make(self, shape: list[int]) -> Tensor:
        if self._folder is None:
            return torch.empty(shape, dtype=self.dtype)
        path = Path(self._folder.name) / "image_tokens.npy"
        array = np.lib.format.open_memmap(path, "w+", _ON_DISK[self.dtype], tuple(shape))
        tokens = torch.from_numpy(array)
        return tokens.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tokens

    def put(self, start: int, embeds: Tensor) -> None:
        """Keep ``embeds [c, P, W]`` as the images from ``start`` on.

        Raises ValueError if ``dtype`` has no room for them.
        """
        if bool((embeds.abs() > torch.finfo(self.dtype).max).any()):
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"store_dtype: image tokens of up to {embeds.abs().max().item():.3g} are beyond "
                f"{name}: take bfloat16 or float32"
            )
        if self._tokens is None:
            self._tokens = self._make([self.n_images, *embeds.shape[1:]])
        self._tokens[start : start + len(embeds)] = embeds.to("cpu", self.dtype)

    def get(self, rows: Tensor) -> Tensor:
        """Tokens ``[len(rows), P, W]`` of the images ``rows``, on the CPU."""
        return self._tokens[rows]

    def close(self) -> None:
        self._tokens = None
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
