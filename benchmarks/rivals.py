"""Ways to compute MaxSim in plain PyTorch, on any device: what the kernels are compared with.

Each takes ``text [Nt, N, D]`` and ``image [Ni, P, D]`` and gives ``text_to_image [Nt, Ni]`` and
``image_to_text [Ni, Nt]``. Sums are taken in float32 or wider, as every kernel here does, so that a
rival in bfloat16 is judged for its products alone. ``text_mask [Nt, N]`` and ``image_mask [Ni, P]``
are True where a bag or patch counts; one that does not is left out of sums and maxima.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scores = tuple[Tensor, Tensor]
Function = Callable[..., Scores]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _sum(best: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the last axis of the maxima of tokens."""
    best = _wide(best)
    return (best if mask is None else best.where(mask, 0.0)).sum(-1)


def _hidden(similarity: Tensor, mask: Tensor | None) -> Tensor:
    """Similarities with those at -inf whose token does not count."""
    return similarity if mask is None else similarity.masked_fill(~mask, float("-inf"))


def seed_loops(
    text: Tensor, image: Tensor, text_mask: Tensor | None = None, image_mask: Tensor | None = None
) -> Scores:
    """As the original does it: one loop over texts, another over images.

    A round holds the similarities of one item with the whole other side; both loops compute every
    similarity, each for one direction.
    """
    rows, columns = [], []
    patches = None if image_mask is None else image_mask[:, :, None]
    bags = None if text_mask is None else text_mask[:, :, None]
    for a in range(text.shape[0]):
        similarity = torch.matmul(image, text[a].t())  # [Ni, P, N]
        best = _hidden(similarity, patches).amax(1)
        rows.append(_sum(best, None if text_mask is None else text_mask[a]))
    for b in range(image.shape[0]):
        similarity = torch.matmul(text, image[b].t())  # [Nt, N, P]
        best = _hidden(similarity, bags).amax(1)
        columns.append(_sum(best, None if image_mask is None else image_mask[b]))
    return torch.stack(rows), torch.stack(columns)


def einsum_scores(
    text: Tensor, image: Tensor, text_mask: Tensor | None = None, image_mask: Tensor | None = None
) -> Scores:
    """All similarities at once, ``[Nt, Ni, N, P]``, and two reductions of them."""
    similarity = torch.einsum("tnd,ipd->tinp", text, image)
    patches = None if image_mask is None else image_mask[:, None]
    to_image = _hidden(similarity, patches).amax(3)
    to_text = _hidden(similarity, None if text_mask is None else text_mask[:, None, :, None])
    masks = None if text_mask is None else text_mask[:, None], image_mask
    return _sum(to_image, masks[0]), _sum(to_text.amax(2), masks[1]).t()


def per_image_matmul(
    text: Tensor, image: Tensor, text_mask: Tensor | None = None, image_mask: Tensor | None = None
) -> Scores:
    """One matrix product for each image, with the bags of all texts; both directions from it."""
    texts, bags, width = text.shape
    flat = text.reshape(texts * bags, width)
    hidden = None if text_mask is None else text_mask[:, :, None]
    rows, columns = [], []
    for b in range(image.shape[0]):
        similarity = (flat @ image[b].t()).view(texts, bags, -1)
        patches = None if image_mask is None else image_mask[b]
        rows.append(_sum(_hidden(similarity, patches).amax(2), text_mask))
        columns.append(_sum(_hidden(similarity, hidden).amax(1), patches))
    return torch.stack(rows, 1), torch.stack(columns)


def one_matmul(
    text: Tensor, image: Tensor, text_mask: Tensor | None = None, image_mask: Tensor | None = None
) -> Scores:
    """All similarities from one matrix product of two flat matrices, ``[Nt, N, Ni, P]``, which
    copies neither side; einsum moves the images first where texts are few."""
    (texts, bags, width), (images, patches, _) = text.shape, image.shape
    flat = text.reshape(texts * bags, width) @ image.reshape(images * patches, width).t()
    similarity = flat.view(texts, bags, images, patches)
    to_image = _hidden(similarity, image_mask).amax(3)
    to_text = _hidden(similarity, None if text_mask is None else text_mask[:, :, None, None])
    masks = None if text_mask is None else text_mask[:, None], image_mask
    return _sum(to_image.transpose(1, 2), masks[0]), _sum(to_text.amax(1), masks[1]).t()


def candidates(function: Function, text: Tensor, image: Tensor) -> Scores:
    """A function of all pairs over ``image [Nt, K, P, D]``: both directions ``[Nt, K]``."""
    pairs = [function(text[a : a + 1], image[a]) for a in range(text.shape[0])]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1].t() for pair in pairs])


PLAIN: dict[str, Function] = {
    "seed_loops": seed_loops,
    "einsum": einsum_scores,
    "one_matmul": one_matmul,
    "per_image_matmul": per_image_matmul,
}
