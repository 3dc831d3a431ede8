"""The best images of each text by an int8 screen, and exact scores where its bound demands them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagformer import reference
from bagformer.ops import _maxsim_int8, _maxsim_ops, maxsim_topk
from bagformer.ops._checks import check_alike, check_features, check_mask
from bagformer.ops._library import define, dims, wants_grad
from bagformer.ops._nested import pad_nested
from bagformer.ops.maxsim import check_options
from bagformer.ops.quantize import QuantizedFeatures
from bagformer.reference import TopK

# Int8 scores held at once, and pictures gathered at once for exact ones.
SCORES, PICTURES = 1 << 21, 256
# Where more of the pictures are left than this share, all are scored where they lie.
LEFT = 0.25
LARGEST = 1e36  # sums of products beyond might overflow float32, which no bound foresees
_ARGUMENTS = (
    "Tensor text, Tensor image, Tensor values, Tensor scales, Tensor limits, Tensor? text_mask, "
    "Tensor? image_mask, int k, str mask_mode, str reduction, str backend"
)


@dataclass(frozen=True, eq=False)
class ScreenedImages:
    """A collection with an int8 copy of itself, made by :func:`screen_images`.

    Attributes:
        image: ``[Ni, P, D]``, the features, not copied.
        int8: their int8 copy.
        limits: ``[Ni, 3]`` float64, the largest norm of a picture's counted patches: as they are,
            as int8 holds them, and of the difference.
        image_mask: ``[Ni, P]`` bool, or None.
    """

    image: Tensor
    int8: QuantizedFeatures
    limits: Tensor
    image_mask: Tensor | None = None

    def __len__(self) -> int:
        """Number of pictures."""
        return self.image.shape[0]


class Norms(NamedTuple):
    """Of tokens as they are, as int8 holds them, and of the difference; ``[..., L]`` float64."""

    own: Tensor
    kept: Tensor
    lost: Tensor


def store(features: Tensor, mask: Tensor | None) -> tuple[QuantizedFeatures, Norms]:
    """An int8 copy and its norms, 0 where a token is masked."""
    stored = QuantizedFeatures(*reference.quantize_features(features, "int8"))
    wide, kept = features.double(), stored.dequantize(torch.float64)
    norms = [x.norm(dim=-1) for x in (wide, kept, wide - kept)]
    if mask is not None:
        norms = [norm.masked_fill(~mask, 0.0) for norm in norms]
    return stored, Norms(*norms)


def screen_images(image: Tensor, image_mask: Tensor | None = None) -> ScreenedImages:
    """Prepare a collection for :func:`maxsim_topk_screened`: once, for many searches.

    Args:
        image: ``[Ni, P, D]`` on the CPU, float32, bfloat16, float16 or float64. It is kept, not
            copied: do not change it afterwards.
        image_mask: ``[Ni, P]`` bool, True where a patch counts.

    Returns:
        The collection with an int8 copy, ``Ni * P * (D + 4) + 24 * Ni`` bytes.

    Raises:
        TypeError, ValueError: as :func:`maxsim`, or ``image`` is not on the CPU.
    """
    check_features("image", image, ("[Ni, P, D]",))
    check_mask("image_mask", image_mask, "image", image)
    if image.device.type != "cpu":
        raise ValueError(
            f"image must be on the CPU to be screened, got {image.device}; maxsim_topk serves it"
        )
    values = torch.empty(image.shape, dtype=torch.int8)
    scales = torch.empty(image.shape[:-1], dtype=torch.float32)
    limits = torch.zeros(image.shape[0], 3, dtype=torch.float64)
    for first in range(0, len(image), PICTURES):
        part = slice(first, first + PICTURES)
        mask = None if image_mask is None else image_mask[part]
        stored, norms = store(image[part].detach(), mask)
        values[part], scales[part] = stored.values, stored.scales
        if image.shape[1]:
            limits[part] = torch.stack([norm.amax(dim=-1) for norm in norms], dim=-1)
    return ScreenedImages(image.detach(), QuantizedFeatures(values, scales), limits, image_mask)


def maxsim_topk_screened(
    text: Tensor,
    images: ScreenedImages,
    k: int,
    *,
    text_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    reduction: str = "sum",
    backend: str = "auto",
) -> TopK:
    """The ``k`` best images of each text: the answer of :func:`maxsim_topk`, often sooner.

    Int8 scores come first, with a proved bound of their distance from the exact ones. Pictures that
    cannot be among the ``k`` best by that bound are done; the rest are scored exactly. With the
    C++ kernels scores and indices are those of ``maxsim_topk`` to the bit. It pays where scores of
    a text lie far apart, as a trained model's do, and ``k`` is small; where they lie close together
    it costs more than ``maxsim_topk`` (docs/maxsim.md).

    Args:
        text: ``[Nt, N, D]`` in the dtype of the images, on the CPU; or jagged ``[Nt, j, D]``.
        images: what :func:`screen_images` made.
        k: how many, at least 1 and at most ``Ni``.
        text_mask, mask_mode, reduction, backend: as in :func:`maxsim`.

    Returns:
        ``TopK(scores [Nt, k], indices [Nt, k] int64)``. Not differentiable.

    Raises:
        TypeError, ValueError: as :func:`maxsim_topk`, or ``images`` is not ScreenedImages.
        RuntimeError: ``text`` requires a gradient while gradients are recorded.
    """
    check_options(mask_mode, reduction, "fp32", backend)
    if not isinstance(images, ScreenedImages):
        raise TypeError(
            f"images must be ScreenedImages (see screen_images), got {type(images).__name__}"
        )
    text, text_mask = pad_nested("text", text, "text_mask", text_mask)
    check_features("text", text, ("[Nt, N, D]",))
    check_alike("images", images.image, "text", text)
    check_mask("text_mask", text_mask, "text", text)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1 or k > len(images):
        raise ValueError(f"k must be at least 1 and at most Ni = {len(images)}, got {k}")
    if text.shape[-1] > _maxsim_int8.MAX_FEATURES:
        raise ValueError(
            f"text must have at most {_maxsim_int8.MAX_FEATURES:,} features D, "
            f"got shape {dims(text.shape)}"
        )
    if wants_grad(text):
        raise RuntimeError(
            "maxsim_topk_screened gives no gradient, but text requires one: call it under "
            "torch.no_grad(), or use maxsim_topk"
        )
    stored = images.image, images.int8.values, images.int8.scales, images.limits
    settings = k, mask_mode, reduction, backend
    return TopK(
        *torch.ops.bagformer.maxsim_topk_screened(
            text, *stored, text_mask, images.image_mask, *settings
        )
    )


def bounds(norms: Norms, limits: Tensor, width: int, counts: Tensor | None) -> Tensor:
    """How far an int8 score may lie from the exact one, ``[Nt, Ni]``.

    With t = t8 + r and v = v8 + q, a similarity t.v = t8.v8 + r.v8 + t.q; maxima and sums move no
    farther than similarities do. Then both sides' roundings: of D products, N maxima and a few
    more, and what vanishes below float32's smallest normal number.
    """
    own, kept, lost = (norm.sum(dim=-1, keepdim=True) for norm in norms)
    image_own, image_kept, image_lost = limits.unbind(dim=-1)
    steps = width + norms.own.shape[1] + 16
    size = own * image_own + kept * image_kept
    far = lost * image_kept + own * image_lost + steps * 2.0**-23 * size
    far = far * (1 + 2.0**-20) + steps * steps * 2.0**-120 * (image_own + own + 1)
    if counts is not None:
        far = far / counts.clamp_min(1)[:, None]
    return far.masked_fill(size >= LARGEST, float("inf")) if steps < 1 << 20 else far + float("inf")


def _run(
    text: Tensor,
    image: Tensor,
    values: Tensor,
    scales: Tensor,
    limits: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    k: int,
    mask_mode: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    best, indices = _fake(text, image, values, scales, limits, None, None, k)
    rows = max(1, SCORES // max(1, image.shape[0]))
    for first in range(0, text.shape[0], rows):
        part = slice(first, first + rows)
        some, mask = text[part], None if text_mask is None else text_mask[part]
        stored, norms = store(some, mask)
        masks, options = (mask, image_mask), (mask_mode, "text_to_image", reduction)
        both = stored.values, values, stored.scales, scales
        guess = _maxsim_int8.run(*both, *masks, *options, False, backend)[0].double()
        counts = None
        if reduction == "mean":
            counts = torch.full((len(some),), text.shape[1]) if mask is None else mask.sum(-1)
        reach = guess + bounds(norms, limits, text.shape[-1], counts)
        for row in range(len(some)):
            one = slice(row, row + 1)
            sides = some[one], image, None if mask is None else mask[one], image_mask
            found = _search(sides, (mask_mode, reduction, backend), guess[row], reach[row], k)
            best[first + row], indices[first + row] = found
    return best, indices


def _search(
    sides: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    options: tuple[str, str, str],
    guess: Tensor,
    reach: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best pictures of one text."""
    text, image, text_mask, image_mask = sides
    mask_mode, reduction, backend = options

    def exact(chosen: Tensor) -> Tensor:
        parts = []
        for part in chosen.split(PICTURES):
            mask = None if image_mask is None else image_mask[part]
            settings = mask_mode, "text_to_image", reduction, False, "fp32", backend
            parts.append(_maxsim_ops.run(text, image[part], text_mask, mask, *settings)[0][0])
        return torch.cat(parts)

    scores = reach.new_empty(len(guess), dtype=reference.accumulation_dtype(text.dtype))
    likely = guess.topk(k).indices
    scores[likely] = exact(likely)
    # a NaN is never below anything: a broken picture is scored
    left = ~(reach < scores[likely].min())
    left[likely] = False
    more = left.nonzero()[:, 0]
    if len(more) > LEFT * len(guess):
        settings = "text_to_image", mask_mode, reduction, "fp32", backend
        whole = maxsim_topk._run(text, image, text_mask, image_mask, k, *settings)
        return whole[0][0], whole[1][0]
    if len(more):
        scores[more] = exact(more)
    chosen = torch.cat([likely, more]).sort().values
    values, order = scores[chosen].sort(descending=True, stable=True)
    return values[:k], chosen[order[:k]]


def _fake(
    text: Tensor,
    image: Tensor,
    values: Tensor,
    scales: Tensor,
    limits: Tensor,
    text_mask: Tensor | None,
    image_mask: Tensor | None,
    k: int,
    *options: str,
) -> tuple[Tensor, Tensor]:
    best = text.new_empty([text.shape[0], k], dtype=reference.accumulation_dtype(text.dtype))
    return best, text.new_empty([text.shape[0], k], dtype=torch.int64)


def _flops(text_shape: Any, image_shape: Any, *_: Any, **__: Any) -> int:
    """Those of the int8 scores; how many exact ones follow depends on the numbers."""
    pairs = text_shape[0] * image_shape[0]
    return 2 * pairs * text_shape[1] * image_shape[1] * text_shape[2]


define(f"maxsim_topk_screened({_ARGUMENTS}) -> (Tensor, Tensor)", _run, _fake, _flops)
