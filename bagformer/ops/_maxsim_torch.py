"""MaxSim in plain PyTorch, in chunks: any device, never the whole similarity tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagformer.reference import accumulation_dtype

# Similarities held at once: 16 MB of float32, so that a chunk stays near the cache of a CPU and
# still fills a GPU.
CHUNK_ELEMENTS = 1 << 22


class Options(NamedTuple):
    mask_mode: str
    directions: str
    reduction: str
    precision: str

    @property
    def wants_text(self) -> bool:
        return self.directions != "image_to_text"

    @property
    def wants_image(self) -> bool:
        return self.directions != "text_to_image"


def argmax_dtype(count: int) -> torch.dtype:
    """The narrowest dtype for an index below ``count`` and one value more for "none"."""
    if count <= 255:
        return torch.uint8
    return torch.int16 if count <= 32767 else torch.int32


def narrow_argmax(index: Tensor, count: int) -> Tensor:
    """int32 or int64 with -1 for none, as ``argmax_dtype``; there, none is 255 in uint8."""
    return index.to(argmax_dtype(count))


def widen_argmax(index: Tensor) -> Tensor:
    """Back to int32 with -1 for none."""
    wide = index.to(torch.int32)
    return wide.masked_fill(wide == 255, -1) if index.dtype == torch.uint8 else wide


@contextmanager
def matmul_precision(dtype: torch.dtype, device: torch.device, precision: str) -> Iterator[None]:
    """Float32 products at least as good as asked, whatever the user's global setting says."""
    # products of two bfloat16 or float16 numbers are exact in TF32
    tf32 = device.type == "cuda" and (precision != "fp32" or dtype.itemsize == 2)
    # the switch of one backend: the global one raises where a user has set any of these
    switch: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    switch = switch.matmul
    before, wanted = switch.fp32_precision, "tf32" if tf32 else "ieee"
    if before == wanted:
        yield
        return
    switch.fp32_precision = wanted
    try:
        yield
    finally:
        switch.fp32_precision = before


def _clean(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Wide features whose masked tokens are zero, and the mask written out."""
    wide = features.to(accumulation_dtype(features.dtype))
    if mask is None:
        return wide, torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)
    return torch.where(mask[..., None], wide, torch.zeros_like(wide[..., :1])), mask


def _directed(
    similarity: Tensor, own: Tensor, other: Tensor, options: Options, argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores ``[a, b]`` and winners ``[a, b, Q]`` of ``similarity [a, b, Q, C]``."""
    if similarity.shape[-1] == 0 or similarity.shape[-2] == 0:
        none = similarity.new_full(similarity.shape[:-1], -1, dtype=torch.int32)
        return similarity.new_zeros(similarity.shape[:2]), none if argmax else None
    fill = float("-inf") if options.mask_mode == "exclude" else 0.0
    masked = similarity.masked_fill(~other[..., None, :], fill)
    valid = own & other.any(dim=-1, keepdim=True)
    index = None
    if argmax:
        best, index = masked.max(dim=-1)
        if options.mask_mode == "exclude":
            # where all counted similarities are -inf, a masked token must not win the tie
            first = other.to(torch.uint8).argmax(dim=-1, keepdim=True)
            index = torch.where(best == fill, first.expand_as(index), index)
        index = torch.where(valid, index, -1).to(torch.int32)
    else:
        best = masked.amax(dim=-1)
    total = torch.where(valid, best, torch.zeros_like(best[..., :1])).sum(dim=-1)
    if options.reduction == "mean":
        total = total / own.sum(dim=-1).clamp_min(1).to(total.dtype)
    return total, index


class Chunk(NamedTuple):
    """One block of pairs, brought to ``[a, b, ...]``: ``a`` texts with ``b`` images each."""

    rows: slice
    columns: slice
    text: Tensor  # [a, N, D]
    image: Tensor  # [b, P, D] or, candidates, [a, b, P, D]
    text_keep: Tensor  # [a, 1, N]
    image_keep: Tensor  # [1, b, P] or [a, b, P]

    def similarity(self) -> Tensor:
        if self.image.dim() == 4:
            return self.text[:, None] @ self.image.transpose(-1, -2)
        (a, n, d), (b, p, _) = self.text.shape, self.image.shape
        flat = self.text.reshape(a * n, d) @ self.image.reshape(b * p, d).t()
        return flat.view(a, n, b, p).permute(0, 2, 1, 3)


def chunks(
    text: Tensor, image: Tensor, text_mask: Tensor | None, image_mask: Tensor | None
) -> Iterator[Chunk]:
    """Blocks of at most ``CHUNK_ELEMENTS`` similarities (or one pair), in index order."""
    n_texts, n_images = text.shape[0], image.shape[-3]
    pair = max(1, text.shape[1] * image.shape[-2])
    width = max(1, min(n_images, CHUNK_ELEMENTS // pair))
    height = max(1, CHUNK_ELEMENTS // (pair * width))
    per_text = image.dim() == 4
    for row in range(0, n_texts, height):
        rows = slice(row, min(row + height, n_texts))
        text_part, text_keep = _clean(text[rows], None if text_mask is None else text_mask[rows])
        for column in range(0, n_images, width):
            columns = slice(column, min(column + width, n_images))
            at = (rows, columns) if per_text else (columns,)
            image_part, image_keep = _clean(
                image[at], None if image_mask is None else image_mask[at]
            )
            if not per_text:
                image_keep = image_keep[None]
            yield Chunk(rows, columns, text_part, image_part, text_keep[:, None], image_keep)


def score_chunk(chunk: Chunk, options: Options, argmax: bool) -> tuple[Tensor | None, ...]:
    """``(t2i [a, b], i2t [a, b], text winners [a, b, N], image winners [a, b, P])``."""
    similarity = chunk.similarity()
    lead = similarity.shape[:2]
    text_keep = chunk.text_keep.expand(*lead, -1)
    image_keep = chunk.image_keep.expand(*lead, -1)
    t2i = i2t = text_winner = image_winner = None
    if options.wants_text:
        t2i, text_winner = _directed(similarity, text_keep, image_keep, options, argmax)
    if options.wants_image:
        i2t, image_winner = _directed(
            similarity.transpose(-1, -2), image_keep, text_keep, options, argmax
        )
    return t2i, i2t, text_winner, image_winner


def forward(
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    options: Options,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill ``outputs`` (empty where not wanted); ``image [Nt, K, P, D]`` is the candidate form."""
    argmax = outputs[2].numel() + outputs[3].numel() > 0
    candidates = image.dim() == 4
    with matmul_precision(text.dtype, text.device, options.precision):
        for chunk in chunks(text, image, text_mask, image_mask):
            results = score_chunk(chunk, options, argmax)
            for slot, (result, output) in enumerate(zip(results, outputs, strict=True)):
                if result is None or output.numel() == 0:
                    continue
                if slot >= 2:
                    result = narrow_argmax(result, image.shape[-2] if slot == 2 else text.shape[1])
                if slot % 2 and not candidates:
                    output[chunk.columns, chunk.rows] = result.transpose(0, 1)
                else:
                    output[chunk.rows, chunk.columns] = result


def _part(tensor: Tensor, chunk: Chunk, transposed: bool) -> Tensor:
    """The block of a stored ``[Nt, Ni, ...]`` or, transposed, ``[Ni, Nt, ...]`` tensor."""
    if transposed:
        return tensor[chunk.columns, chunk.rows].transpose(0, 1)
    return tensor[chunk.rows, chunk.columns]


def _winner_weights(
    chunk: Chunk, winner: Tensor, grad: Tensor, own: Tensor, axis: int, options: Options
) -> Tensor:
    """The gradient of each similarity ``[a, b, N, P]``, zero but at the winners along ``axis``."""
    scale = grad.to(chunk.text.dtype)
    if options.reduction == "mean":
        scale = scale / own.sum(dim=-1).clamp_min(1).to(scale.dtype)
    value = torch.where(winner >= 0, scale[..., None], torch.zeros_like(scale[..., None]))
    weights = scale.new_zeros(*grad.shape, chunk.text.shape[1], chunk.image.shape[-2])
    if weights.numel() == 0:
        return weights
    # one winner for each maximum, so the scatter never meets the same place twice
    index = winner.clamp_min(0).to(torch.int64)
    return weights.scatter_(axis, index.unsqueeze(axis), value.unsqueeze(axis))


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    text: Tensor,
    image: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    winners: tuple[Tensor, Tensor],
    options: Options,
    grad_text: Tensor,
    grad_image: Tensor,
) -> None:
    """Add to ``grad_text`` and ``grad_image`` (wide; skipped where empty).

    ``winners`` are those that the forward saved, narrow or int32, or empty: then they are computed
    again, chunk by chunk.
    """
    if text.numel() == 0 or image.numel() == 0:
        return
    candidates = image.dim() == 4
    saved = winners[0].numel() + winners[1].numel() > 0
    for chunk in chunks(text, image, text_mask, image_mask):
        again = (None, None) if saved else score_chunk(chunk, options, argmax=True)[2:]
        weights = None
        for slot, own in enumerate((chunk.text_keep, chunk.image_keep)):
            grad, transposed = grads[slot], slot == 1 and not candidates
            if grad is None:
                continue
            grad = _part(grad, chunk, transposed)
            winner = again[slot]
            if winner is None:
                winner = widen_argmax(_part(winners[slot], chunk, transposed))
            part = _winner_weights(chunk, winner, grad, own, -1 - slot, options)
            weights = part if weights is None else weights + part
        if weights is None:
            continue
        if grad_text.numel():
            grad_text[chunk.rows] += _rows_gradient(weights, chunk)
        if grad_image.numel():
            if candidates:
                grad_image[chunk.rows, chunk.columns] += (
                    weights.transpose(-1, -2) @ (chunk.text[:, None])
                )
            else:
                grad_image[chunk.columns] += _columns_gradient(weights, chunk)
    for grad, mask in ((grad_text, text_mask), (grad_image, image_mask)):
        if mask is not None and grad.numel():
            grad.masked_fill_(~mask[..., None], 0.0)


def _rows_gradient(weights: Tensor, chunk: Chunk) -> Tensor:
    """``[a, N, D]`` from weights ``[a, b, N, P]``."""
    a, b, n, p = weights.shape
    if chunk.image.dim() == 4:
        return (weights @ chunk.image).sum(dim=1)
    flat = weights.permute(0, 2, 1, 3).reshape(a * n, b * p)
    return (flat @ chunk.image.reshape(b * p, -1)).view(a, n, -1)


def _columns_gradient(weights: Tensor, chunk: Chunk) -> Tensor:
    """``[b, P, D]`` from weights ``[a, b, N, P]``."""
    a, b, n, p = weights.shape
    flat = weights.permute(1, 3, 0, 2).reshape(b * p, a * n)
    return (flat @ chunk.text.reshape(a * n, -1)).view(b, p, -1)
