"""A contrastive step over a batch larger than fits: the encoders see it chunk by chunk.

The features of the whole batch are made without a graph, the loss and its gradients are taken of
them, and each chunk is then encoded once more to carry its gradients to the parameters. The
encoders run twice, and only one chunk's activations are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _RandomState(NamedTuple):
    """State of the CPU's generator and of the current GPU's, where one is in use."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _RandomState:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class _Side(NamedTuple):
    """Features of all chunks as leaves, the mask, and what each chunk contributed to them."""

    leaves: list[Tensor]
    mask: Tensor | None
    spans: list[tuple[slice, int]]
    states: list[_RandomState]


def _tensors(name: str, output: Any, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """Features first, then the mask if the encoder gives one, then whatever else it gives."""
    parts = list(output) if isinstance(output, (tuple, list)) else [output]
    if masked and len(parts) < 2:
        raise TypeError(f"{name} must return (features, mask), got {type(output).__name__}")
    mask = parts.pop(1) if masked else None
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must return tensors, got {type(part).__name__}")
    features = parts[0]
    if features.dim() != 3:
        raise ValueError(f"{name} must return features [b, n, D], got {list(features.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != features.shape[:2]):
        raise ValueError(
            f"{name} must return a bool mask {list(features.shape[:2])}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    for part in parts[1:]:
        if part.dim() == 0 or len(part) != len(features):
            raise ValueError(
                f"{name}: every output must have the {len(features)} rows of the features, "
                f"got {list(part.shape)}"
            )
    return parts, mask


def _padded(parts: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Chunks as one tensor; shorter ones end in zeros that the mask leaves out."""
    longest = max(part.shape[1] for part in parts)
    lengths = {part.shape[1] for part in parts}
    mask = None
    if len(lengths) > 1 or any(one is not None for one in masks):
        mask = torch.cat(
            [
                F.pad(
                    part.new_ones(part.shape[:2], dtype=torch.bool) if one is None else one,
                    (0, longest - part.shape[1]),
                )
                for part, one in zip(parts, masks, strict=True)
            ]
        )
    if len(lengths) > 1:
        parts = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    return torch.cat(parts), mask


@torch.no_grad()
def _encode(name: str, encode: Callable[[Any], Any], chunks: list[Any], masked: bool) -> _Side:
    if not chunks:
        raise ValueError(f"{name.replace('encode_', '')}_chunks is empty")
    columns: list[list[Tensor]] = []
    masks: list[Tensor | None] = []
    states, spans, start = [], [], 0
    for chunk in chunks:
        states.append(_RandomState.now())
        parts, mask = _tensors(name, encode(chunk), masked)
        if columns and len(columns) != len(parts):
            raise ValueError(f"{name} returned {len(columns)} tensors, then {len(parts)}")
        columns = columns or [[] for _ in parts]
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
        masks.append(mask)
        spans.append((slice(start, start + len(parts[0])), parts[0].shape[1]))
        start += len(parts[0])
    if not masked and len({part.shape[1] for part in columns[0]}) > 1:
        raise ValueError(f"{name}: every chunk must have as many patches, and no mask says which")
    features, mask = _padded(columns[0], masks)
    leaves = [features]
    columns[0] = []
    leaves += [torch.cat(column) for column in columns[1:]]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    return _Side(leaves, mask, spans, states)


@contextmanager
def _no_autocast(device: str) -> Any:
    """Gradients are made in the dtypes of the forward, not cast once more."""
    with torch.autocast(device, enabled=False):
        yield


def _backward(encode: Callable[[Any], Any], chunks: list[Any], side: _Side, masked: bool) -> None:
    for chunk, (rows, length), state in zip(chunks, side.spans, side.states, strict=True):
        state.restore()
        parts, _ = _tensors("", encode(chunk), masked)
        outputs, grads = [], []
        for place, (part, leaf) in enumerate(zip(parts, side.leaves, strict=True)):
            if leaf.grad is not None and part.requires_grad:
                outputs.append(part)
                grads.append(leaf.grad[rows, :length] if place == 0 else leaf.grad[rows])
        if outputs:
            with _no_autocast(outputs[0].device.type):
                torch.autograd.backward(outputs, grads)


def cached_step(
    encode_text: Callable[[Any], Any],
    encode_image: Callable[[Any], Any],
    text_chunks: Iterable[Any],
    image_chunks: Iterable[Any],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Loss of the whole batch, detached; its gradients are added to every parameter's ``grad``.

    The result is that of one backward through all chunks at once, dropout included: the random
    state of each chunk's first pass is put back for its second. Call it under the autocast that
    the encoders want; it calls backward itself, outside it.

    Args:
        encode_text: ``chunk -> (features [b, N, D], mask [b, N] bool or None)``. Chunks may differ
            in N; shorter ones are padded with masked bags. Tensors ``[b, ...]`` after the mask are
            handed on to the loss.
        encode_image: ``chunk -> features [b, P, D]``, or a tuple of it and further tensors.
        text_chunks, image_chunks: what the encoders take; sizes need not agree.
        loss: ``loss(text, image, text_mask, *more of text, *more of image)`` -> scalar. May scale
            (GradScaler, accumulation): gradients and the returned number are of what it returns.

    Raises:
        TypeError, ValueError: an encoder returns something else, no chunks, a loss that is no
            scalar or has no gradient.

    Random numbers are drawn from the default generators of the CPU and the current GPU; other
    generators are not replayed. Buffers that change in the forward (running means of batch norm)
    change twice. Under DistributedDataParallel pass encoders that call ``ddp.module``, and call
    :func:`average_gradients` afterwards.
    """
    texts, images = list(text_chunks), list(image_chunks)
    text = _encode("encode_text", encode_text, texts, masked=True)
    image = _encode("encode_image", encode_image, images, masked=False)
    # weights that were cast without a graph must not serve the second pass
    torch.clear_autocast_cache()
    value = loss(text.leaves[0], image.leaves[0], text.mask, *text.leaves[1:], *image.leaves[1:])
    if value.dim() or not value.requires_grad:
        raise ValueError(
            f"loss must return a scalar with a gradient, got {list(value.shape)}, "
            f"requires_grad={value.requires_grad}"
        )
    with _no_autocast(value.device.type):
        value.backward()
    after = _RandomState.now()
    _backward(encode_text, texts, text, masked=True)
    _backward(encode_image, images, image, masked=False)
    after.restore()
    return value.detach()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], process_group: Any = None) -> None:
    """Replace every ``grad`` by its mean over the processes, as DistributedDataParallel does.

    All processes must pass the same parameters in the same order. A parameter without ``grad``
    counts as zero, and keeps None where no process has one.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        return
    world = dist.get_world_size(process_group)
    has = torch.tensor([p.grad is not None for p in wanted], device=wanted[0].device).int()
    dist.all_reduce(has, group=process_group)
    for parameter, holders in zip(wanted, has.tolist(), strict=True):
        if holders:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=process_group)
            parameter.grad /= world
