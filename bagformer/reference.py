"""The truth that every kernel of this project is judged against.

Plain PyTorch, slow on purpose, exact in float64. Nothing here is tiled, fused or clever; the
docstrings are the contract, and a kernel that disagrees with them is wrong.

Shapes: ``B`` batch, ``T`` tokens, ``N`` bags (padded per text), ``P`` patches, ``D`` feature size,
``Nt`` and ``Ni`` numbers of texts and images, ``K`` candidates per text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MASK_MODES = ("exclude", "zero")
DIRECTIONS = ("both", "text_to_image", "image_to_text")
REDUCTIONS = ("sum", "mean")
OBJECTIVES = ("softmax", "sigmoid")
# what is stored, and the largest magnitude that it is used for
QUANTIZED_DTYPES = {"int8": (torch.int8, 127.0), "fp8_e4m3": (torch.float8_e4m3fn, 448.0)}
MATCHERS = ("leftmost_longest", "original", "backward_max")


class MaxSimScores(NamedTuple):
    """Scores of both directions, and which token won each maximum.

    ``text_to_image`` is ``[Nt, Ni]`` and ``image_to_text`` is ``[Ni, Nt]``; the candidate form
    gives ``[Nt, K]`` for both, the pair form ``[B]``. ``text_argmax`` ``[Nt, Ni, N]`` is the patch
    that each bag chose and ``image_argmax`` ``[Ni, Nt, P]`` the bag that each patch chose
    (candidate form ``[Nt, K, N]`` and ``[Nt, K, P]``, pair form ``[B, N]`` and ``[B, P]``), int32,
    -1 where there is none. A field that was not asked for is None.
    """

    text_to_image: Tensor | None
    image_to_text: Tensor | None
    text_argmax: Tensor | None = None
    image_argmax: Tensor | None = None


class TopK(NamedTuple):
    """The ``k`` best per row: ``scores [rows, k]`` falling, ``indices [rows, k]`` int64."""

    scores: Tensor
    indices: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every narrower float accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bag_pool(hidden_states: Tensor, offsets: Tensor) -> Tensor:
    """Sum the token rows of each bag.

    ``hidden_states [B, T, D]`` and ``offsets [B, N + 1]`` give ``[B, N, D]`` in the dtype of
    ``hidden_states``: bag ``n`` of row ``b`` is the sum of tokens ``offsets[b, n]`` up to but not
    including ``offsets[b, n + 1]``, added in token order in at least float32. An empty bag is a
    zero vector. NaN and Inf in a token reach its own bag and no other.
    """
    batch, _, width = hidden_states.shape
    n_bags = offsets.shape[1] - 1
    wide = hidden_states.to(accumulation_dtype(hidden_states.dtype))
    pooled = wide.new_zeros(batch, n_bags, width)
    for row, bounds in enumerate(offsets.tolist()):
        for bag in range(n_bags):
            pooled[row, bag] = wide[row, bounds[bag] : bounds[bag + 1]].sum(dim=0)
    return pooled.to(hidden_states.dtype)


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Divide each vector of the last axis by its Euclidean norm, clamped from below at ``eps``.

    The norm itself is clamped, not its square, as ``torch.nn.functional.normalize`` does; a zero
    vector therefore stays zero. Computed in at least float32, returned in the dtype of ``x``.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    squares = wide.square().sum(dim=-1, keepdim=True)
    # the square root has no finite slope at zero, and a zero vector has no direction to move in
    norm = torch.where(squares == 0, 1, squares).sqrt().masked_fill(squares == 0, 0)
    return (wide / norm.clamp_min(eps)).to(x.dtype)


def _directed(
    similarity: Tensor, own: Tensor, other: Tensor, mask_mode: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """Max over the last axis, then sum or mean over the one before it.

    ``similarity [..., Q, C]``; ``own [..., Q]``, ``other [..., C]`` are True where a token counts.
    """
    fill = float("-inf") if mask_mode == "exclude" else 0.0
    masked = similarity.masked_fill(~other[..., None, :], fill)
    any_other = other.any(dim=-1)
    if similarity.shape[-1] == 0 or similarity.shape[-2] == 0:
        shape = similarity.shape[:-1]
        return similarity.new_zeros(shape[:-1]), similarity.new_full(shape, -1, dtype=torch.int32)
    wins = (masked == masked.amax(dim=-1, keepdim=True)) | masked.isnan()
    if mask_mode == "exclude":
        # where every similarity that counts is -inf, the fill of a masked token must not win
        wins = wins & other[..., None, :]
    index = wins.to(torch.int8).argmax(dim=-1)
    # gathered, so that of equal values the first alone takes the gradient
    best = masked.gather(-1, index[..., None]).squeeze(-1)
    valid = own & any_other[..., None]
    # where, not multiplication: a masked token's NaN must not survive as NaN * 0
    total = torch.where(valid, best, torch.zeros_like(best)).sum(dim=-1)
    if reduction == "mean":
        total = total / own.sum(dim=-1).clamp_min(1).to(total.dtype)
    return total, torch.where(valid, index, -1).to(torch.int32)


def _ones(features: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)
    return mask.to(torch.bool)


def _scores(
    similarity: Tensor,
    text_mask: Tensor,
    image_mask: Tensor,
    *,
    mask_mode: str = "exclude",
    directions: str = "both",
    reduction: str = "sum",
    return_argmax: bool = False,
) -> MaxSimScores:
    """Scores of ``similarity [Nt, Ni, N, P]``, or of ``[Nt, K, N, P]`` and masks of three axes."""
    candidates, lead = image_mask.dim() == 3, similarity.shape[:2]
    own = text_mask[:, None].expand(*lead, text_mask.shape[-1])
    other = image_mask.expand(*lead, image_mask.shape[-1])
    t2i, text_argmax = _directed(similarity, own, other, mask_mode, reduction)
    turned = similarity.transpose(-1, -2)
    i2t, image_argmax = _directed(turned, other, own, mask_mode, reduction)
    if not candidates:
        i2t, image_argmax = i2t.transpose(0, 1), image_argmax.transpose(0, 1)
    wants_text, wants_image = directions != "image_to_text", directions != "text_to_image"
    return MaxSimScores(
        t2i if wants_text else None,
        i2t if wants_image else None,
        text_argmax if return_argmax and wants_text else None,
        image_argmax if return_argmax and wants_image else None,
    )


def maxsim(
    text: Tensor,
    image: Tensor,
    *,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    mask_mode: str = "exclude",
    directions: str = "both",
    reduction: str = "sum",
    return_argmax: bool = False,
) -> MaxSimScores:
    """Late interaction of every text with every image, in both directions.

    With ``S = text @ image.T`` per pair, ``text_to_image`` sums over bags the maximum over patches,
    ``image_to_text`` sums over patches the maximum over bags.

    - ``text [Nt, N, D]``, ``image [Ni, P, D]`` (all pairs) or ``[Nt, K, P, D]`` (candidates of each
      text, with ``image_mask [Nt, K, P]``); masks are True where a token counts.
    - ``exclude``: a masked token never wins a maximum and adds nothing to a sum.
    - ``zero``: a masked token is a zero vector: it competes with similarity 0 and adds nothing.
      What a masked token holds is never read, in either mode; a NaN there has no effect.
    - A masked token's own argmax is -1. If the other side is wholly masked or has no tokens, the
      maxima are 0, their argmax -1 and their gradient zero.
    - ``mean`` divides a sum by the number of unmasked tokens that it runs over (at least 1).
    - Ties go to the lowest index. NaN propagates as in ``torch.amax``: a maximum over values of
      which one is NaN is NaN, and its argmax is the first NaN.
    - Scores are float32, or float64 for float64 inputs, and so is everything accumulated.
    """
    dtype = accumulation_dtype(text.dtype)
    zero = torch.zeros((), dtype=dtype, device=text.device)
    text_mask, image_mask = _ones(text, text_mask), _ones(image, image_mask)
    text = torch.where(text_mask[..., None], text.to(dtype), zero)
    image = torch.where(image_mask[..., None], image.to(dtype), zero)
    return _scores(
        text[:, None] @ image.transpose(-1, -2),
        text_mask,
        image_mask,
        mask_mode=mask_mode,
        directions=directions,
        reduction=reduction,
        return_argmax=return_argmax,
    )


def quantize_features(image: Tensor, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """Eight-bit values and one scale for each patch: ``image`` is about ``values * scales``.

    ``image [..., P, D]`` gives ``values [..., P, D]``, int8 or float8_e4m3fn, and float32
    ``scales [..., P]``. A scale is the patch's largest magnitude over the largest that is stored,
    127 or 448; values are rounded to the nearest, ties to even, and never -128.

    - A patch of zeros, or one so small that its scale is 0 in float32, has scale 0 and values 0.
    - A patch with a NaN or Inf, or whose scale is no finite float32, has scale NaN and values 0:
      its similarities are NaN.
    """
    stored, largest = QUANTIZED_DTYPES[dtype]
    wide = image.detach().to(accumulation_dtype(image.dtype))
    # amax of an empty axis has no value
    peak = wide.abs().amax(dim=-1) if image.shape[-1] else wide.new_zeros(image.shape[:-1])
    scales = (peak / largest).to(torch.float32)
    scales = scales.masked_fill(~scales.isfinite(), float("nan"))
    usable = scales > 0
    divisor = torch.where(usable, scales, 1).to(wide.dtype)
    # a scale rounded down, or a subnormal one, leaves quotients beyond the largest
    values = (wide / divisor[..., None]).clamp(-largest, largest)
    values = values.masked_fill(~usable[..., None], 0.0)
    return (values.round() if dtype == "int8" else values).to(stored), scales


def dequantize_features(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``values * scales [..., None]``, multiplied in at least float32."""
    wide = accumulation_dtype(dtype)
    return (values.to(wide) * scales.to(wide)[..., None]).to(dtype)


def maxsim_quantized(
    text: Tensor,
    values: Tensor,
    scales: Tensor,
    *,
    text_scales: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    **options,
) -> MaxSimScores:
    """:func:`maxsim` on features that :func:`quantize_features` stored; not differentiable.

    ``values [Ni, P, D]`` or ``[Nt, K, P, D]`` with ``scales`` of the same shape without ``D``.

    - A float ``text``: exactly :func:`maxsim` of the text and the dequantized image, both in the
      dtype of scores. What was lost is lost in the stored values alone; a kernel may apply a scale
      after the sum over ``D``.
    - An int8 ``text`` with ``text_scales [Nt, N]``, for int8 ``values``: a similarity is
      ``float32(sum over d of text * values) * (text_scale * scale)``, where the sum is an exact
      integer, rounded once, and each product is rounded to float32, the one in brackets first. A
      similarity therefore has one right answer to the bit, and so do maxima and their indices.
      Scores are float32. ``D`` is at most 131,071, so that sums fit in 32 bits.
    """
    if text_scales is None:
        wide = accumulation_dtype(text.dtype)
        image = dequantize_features(values, scales, wide)
        return maxsim(
            text.detach().to(wide), image, text_mask=text_mask, image_mask=image_mask, **options
        )
    # float64 holds every such integer
    sums = text.double()[:, None] @ values.double().transpose(-1, -2)
    similarity = sums.float() * (text_scales[:, None, :, None] * scales[..., None, :])
    return _scores(similarity, _ones(text, text_mask), _ones(values, image_mask), **options)


def maxsim_pairs(text: Tensor, image: Tensor, *, image_mask: Tensor | None = None, **options):
    """Score text ``b`` with image ``b`` only: ``[B, N, D]`` and ``[B, P, D]`` give ``[B]``.

    Exactly the candidate form of :func:`maxsim` with one candidate for each text.
    """
    mask = None if image_mask is None else image_mask[:, None]
    scores = maxsim(text, image[:, None], image_mask=mask, **options)
    return MaxSimScores(*(None if field is None else field[:, 0] for field in scores))


def maxsim_topk(
    text: Tensor,
    image: Tensor,
    k: int,
    *,
    direction: str = "text_to_image",
    **options,
) -> TopK:
    """The ``k`` best images of each text (or texts of each image), best first.

    Equal scores are ordered by the lower index, so that cutting the collection into shards never
    changes an answer. NaN ranks above every number, as in ``torch.topk``: a broken feature is seen,
    not hidden.
    """
    scores = getattr(maxsim(text, image, directions=direction, **options), direction)
    # a stable descending sort keeps the lower index first among equals, and puts NaN first
    values, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return TopK(values[:, :k], order[:, :k])


def contrastive_loss(scores, positives, temperature=1.0, bias=None, objective="softmax") -> Tensor:
    """Mean over the directions of the mean over their rows.

    ``scores``: ``[Nt, Ni]`` and ``[Ni, Nt]``, one of which may be None; ``positives [Nt, Ni]``
    bool. Logits are scores over ``temperature``, plus ``bias[0]`` or ``bias[1]``. A row of
    ``softmax`` has the mean over its positives of -log softmax; one of ``sigmoid`` the sum over its
    columns of -log sigmoid(z logit), z = 1 for a positive, else -1. In at least float32.
    """
    means = []
    for place, (matrix, true) in enumerate(zip(scores, (positives, positives.t()), strict=True)):
        if matrix is None:
            continue
        logits = matrix.to(accumulation_dtype(matrix.dtype)) / temperature
        logits = logits if bias is None else logits + bias[place]
        if objective == "softmax":
            rows = [-row.log_softmax(0)[its].mean() for row, its in zip(logits, true, strict=True)]
            means.append(torch.stack(rows).mean())
        else:
            each = torch.nn.functional.logsigmoid(torch.where(true, logits, -logits))
            means.append(-each.sum(dim=1).mean())
    return torch.stack(means).mean()


def leftmost_longest_starts(ids: Sequence[int], entities: set[tuple[int, ...]]) -> list[int]:
    """Bag starts of one row: from left to right the longest entity at hand, else one token."""
    longest = max(map(len, entities), default=1)
    starts, at = [], 0
    while at < len(ids):
        starts.append(at)
        ends = range(min(at + longest, len(ids)), at, -1)
        at = next((end for end in ends if tuple(ids[at:end]) in entities), at + 1)
    return starts


def _starts_of_spans(spans: Iterable[tuple[int, int]], length: int) -> list[int]:
    """The original's offsets: both ends of every span, and every token outside that is no end."""
    spans = list(spans)
    ends = [bound for span in spans for bound in span]
    inside = {token for start, end in spans for token in range(start, end)}
    return sorted(ends + [t for t in range(length) if t not in inside and t not in ends])


def original_starts(ids: Sequence[int], entities: set[tuple[int, ...]]) -> list[int]:
    """Bag starts of one row by the rule of the original's ``EmbeddingBagHelperAutomaton``.

    A word grows by the next token as long as it is still an entity, so a longer entity is found
    only if its prefixes of two and more tokens are entities too. Words of two and more tokens are
    spans; a token 0 that is an entity by itself is left out of its span. A span that ends where the
    next one starts, or at the row's end, leaves an empty bag there.
    """
    spans, first = [], 0
    while first < len(ids):
        end = first + 1
        while end < len(ids) and tuple(ids[first : end + 1]) in entities:
            end += 1
        if end - first > 1:
            spans.append((first + (first == 0 and tuple(ids[:1]) in entities), end))
        first = end
    return _starts_of_spans(spans, len(ids))


def backward_max_starts(ids: Sequence[int], entities: set[tuple[int, ...]]) -> list[int]:
    """Bag starts of one row by the rule of the original's ``EmbeddingBagHelper``.

    From the end, the longest entity that ends there is a span, single tokens included; empty bags
    arise as in :func:`original_starts`, so a row may have more bags than tokens.
    """
    spans, end = [], len(ids)
    while end > 0:
        found = (first for first in range(end) if tuple(ids[first:end]) in entities)
        first = next(found, None)
        if first is None:
            end -= 1
        else:
            spans.append((first, end))
            end = first
    return _starts_of_spans(spans, len(ids))


def segment(
    rows: Sequence[Sequence[int]],
    entities: Iterable[Sequence[int]],
    *,
    matcher: str = "leftmost_longest",
    masked_ids: Iterable[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut rows of one length into bags: ``offsets [B, N + 1]``, ``mask [B, N]``, ``counts [B]``.

    A bag is masked (False) if it is exactly one token of ``masked_ids``; empty bags count. The two
    compatible matchers keep as many bags of each row as the row with the fewest has: the last one
    kept then runs to the row's end, while the mask stays that of the bags before the cut.
    """
    known, masked = {tuple(entity) for entity in entities}, set(masked_ids)
    rule = {
        "leftmost_longest": leftmost_longest_starts,
        "original": original_starts,
        "backward_max": backward_max_starts,
    }[matcher]
    starts = [rule(list(row), known) for row in rows]
    length = len(rows[0]) if rows else 0
    counts = [len(row) for row in starts]
    if matcher != "leftmost_longest":
        counts = [min(counts)] * len(counts) if counts else []
    width = max(counts, default=0)
    offsets = torch.full((len(rows), width + 1), length, dtype=torch.int32)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (row, bounds) in enumerate(zip(rows, starts, strict=True)):
        ends = [*bounds, length][1:]
        for n, (start, end) in enumerate(zip(bounds[: counts[b]], ends, strict=False)):
            offsets[b, n] = start
            mask[b, n] = not (end - start == 1 and row[start] in masked)
    return offsets, mask, torch.tensor(counts, dtype=torch.int32)
