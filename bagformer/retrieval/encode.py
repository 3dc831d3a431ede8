"""Encode many texts and pictures, a batch at a time, with the time that each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

Progress = Callable[[int], Any]


class Stages(dict[str, float]):
    """Seconds spent in each named stage, added up."""

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start


class Texts(NamedTuple):
    """``features [Nt, N, D]``, ``mask [Nt, N]``, and ``truncated [Nt]``: which texts were cut off.

    Where they were asked for, ``names`` holds the characters of each text's bags, those that do not
    count included, and ``bags`` those that count.
    """

    features: Tensor
    mask: Tensor
    truncated: Tensor
    names: list[list[str]]
    bags: list[list[str]]


class Images(NamedTuple):
    """``features [Ni, P, D]`` and the (rows, columns) of the patches behind patch 0."""

    features: Tensor
    patch_grid: tuple[int, int]


def _widen(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate over axis 0, filling axis 1 with zeros up to the widest."""
    width = max(row.shape[1] for row in rows)
    padded = []
    for row in rows:
        room = row.new_zeros(row.shape[0], width - row.shape[1], *row.shape[2:])
        padded.append(torch.cat([row, room], dim=1) if room.shape[1] else row)
    return torch.cat(padded)


@torch.inference_mode()
def encode_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    with_names: bool = False,
    stages: Stages | None = None,
    progress: Progress | None = None,
) -> Texts:
    """Features of the bags of ``texts``, with stages ``tokenise``, ``segment``, ``encode_texts``.

    The processor segments while it tokenises; the segmenter is therefore run once more on the same
    ids to be timed alone, and ``tokenise`` is the rest. Under ``protocol="original"`` a text's bags
    depend on its batch, so ``batch_size`` is part of the result. Raises ValueError without texts.
    """
    if not texts:
        raise ValueError("texts: none given")
    stages = Stages() if stages is None else stages
    device = next(model.parameters()).device
    features, masks, truncated = [], [], []
    names: list[list[str]] = []
    bags: list[list[str]] = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        begin = time.perf_counter()
        inputs = processor(text=batch, return_truncated=True)
        both = time.perf_counter() - begin
        before = stages.get("segment", 0.0)
        with stages.time("segment"):
            processor.segmenter(inputs["input_ids"])
        rest = max(0.0, both - (stages["segment"] - before))
        stages["tokenise"] = stages.get("tokenise", 0.0) + rest
        truncated.append(inputs.pop("truncated"))
        if with_names:
            named = processor.bag_texts(batch, counted_only=False)
            names += named
            bags += [
                list(compress(row, keep))
                for row, keep in zip(named, inputs["bag_mask"].tolist(), strict=True)
            ]
        with stages.time("encode_texts"):
            output = model.get_text_features(**inputs.to(device))
            features.append(output.text_features)
            masks.append(output.text_mask)
        if progress:
            progress(len(batch))
    return Texts(_widen(features), _widen(masks), torch.cat(truncated), names, bags)


@torch.inference_mode()
def encode_images(
    model: Any,
    processor: Any,
    pictures: Iterable[Any],
    *,
    batch_size: int = 32,
    stages: Stages | None = None,
    progress: Progress | None = None,
) -> Images:
    """Features of the patches of ``pictures`` (anything the processor takes), read as they come.

    Stages ``read_pictures`` (decoding and resizing) and ``encode_pictures``. Raises ValueError
    without pictures.
    """
    stages = Stages() if stages is None else stages
    device = next(model.parameters()).device
    source = iter(pictures)
    features: list[Tensor] = []
    grid = (0, 0)
    while True:
        with stages.time("read_pictures"):
            batch = list(islice(source, batch_size))
            if not batch:
                break
            pixels = processor(images=batch)["pixel_values"]
        with stages.time("encode_pictures"):
            output = model.get_image_features(pixels.to(device))
        features.append(output.image_features)
        grid = (int(output.patch_grid[0]), int(output.patch_grid[1]))
        if progress:
            progress(len(batch))
    if not features:
        raise ValueError("pictures: none given")
    return Images(torch.cat(features), grid)
