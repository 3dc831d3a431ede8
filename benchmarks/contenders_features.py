"""Who pools tokens into bags, who normalises features, and who makes a loss of scores.

Pooling takes ``hidden [B, T, D]`` and ``offsets [B, N + 1]`` and gives unit bag features
``[B, N, D]``; normalising takes ``x [Ni, P, D]`` and gives the same with unit vectors; the loss
takes the score matrices of as many texts as images, one for each direction.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from cases import Arguments, Call, Case, Contender, Op, Results, plain
from torch import Tensor

from bagformer import bag_pool, contrastive_loss, l2_normalize, reference

unit = torch.nn.functional.normalize


def _bags(case: Case) -> Arguments:
    """Two tokens a bag on average; some bags are empty."""
    maker = torch.Generator().manual_seed(0)
    tokens = 2 * case.bags
    hidden = torch.randn(case.texts, tokens, case.width, generator=maker)
    cuts = torch.randint(0, tokens + 1, (case.texts, case.bags - 1), generator=maker)
    ends = torch.tensor([0, tokens]).expand(case.texts, 2)
    offsets = torch.cat([cuts, ends], 1).sort(dim=1).values
    return hidden.to(getattr(torch, case.dtype)), offsets


def _ours(hidden: Tensor, offsets: Tensor) -> Results:
    return (bag_pool(hidden, offsets, normalize=True),)


def _truth(hidden: Tensor, offsets: Tensor) -> Results:
    # text by text: a slice's gradient is as large as what it was cut from
    pooled = [
        reference.bag_pool(*one) for one in zip(hidden.split(1), offsets.split(1), strict=True)
    ]
    return (reference.l2_normalize(torch.cat(pooled)),)


def _loops(hidden: Tensor, offsets: Tensor) -> Results:
    """One slice and one sum a bag, in Python."""
    rows = []
    for tokens, bounds in zip(hidden, offsets.tolist(), strict=True):
        bags = [tokens[start:end].sum(0) for start, end in pairwise(bounds)]
        rows.append(torch.stack(bags))
    return (unit(torch.stack(rows), dim=-1),)


def _index_add(hidden: Tensor, offsets: Tensor) -> Results:
    texts, tokens, width = hidden.shape
    bags = offsets.shape[1] - 1
    lengths = offsets.diff(dim=1).flatten()
    owner = torch.repeat_interleave(torch.arange(texts * bags), lengths)
    pooled = hidden.new_zeros(texts * bags, width)
    pooled = pooled.index_add(0, owner, hidden.reshape(texts * tokens, width))
    return (unit(pooled.view(texts, bags, width), dim=-1),)


def _segment_reduce(hidden: Tensor, offsets: Tensor) -> Results:
    texts, tokens, width = hidden.shape
    lengths = offsets.diff(dim=1).flatten()
    flat = hidden.reshape(texts * tokens, width)
    pooled = torch.segment_reduce(flat, "sum", lengths=lengths)
    return (unit(pooled.view(texts, -1, width), dim=-1),)


POOL = Op(
    _bags,
    _truth,
    (
        Contender("ours", plain(_ours)),
        Contender("seed_loops", plain(_loops)),
        Contender("index_add", plain(_index_add)),
        Contender("segment_reduce", plain(_segment_reduce)),
    ),
)


def _vectors(case: Case) -> Arguments:
    maker = torch.Generator().manual_seed(0)
    x = torch.randn(case.images, case.patches, case.width, generator=maker)
    return (x.to(getattr(torch, case.dtype)),)


def _compiled(case: Case) -> Call | str:
    call: Any = torch.compile(lambda x: unit(x, dim=-1), dynamic=False)
    return lambda x: (call(x),)


NORMALIZE = Op(
    _vectors,
    lambda x: (reference.l2_normalize(x),),
    (
        Contender("ours", plain(lambda x: (l2_normalize(x),))),
        Contender("functional_normalize", plain(lambda x: (unit(x, dim=-1),))),
        Contender("compiled_normalize", _compiled),
    ),
)


def _matrices(case: Case) -> Arguments:
    maker = torch.Generator().manual_seed(0)
    return tuple(5 * torch.randn(case.texts, case.texts, generator=maker) for _ in range(2))


def _cross_entropy(text_to_image: Tensor, image_to_text: Tensor) -> Results:
    target = torch.arange(len(text_to_image))
    each = [
        torch.nn.functional.cross_entropy(one, target) for one in (text_to_image, image_to_text)
    ]
    return (sum(each) / 2,)


def _compiled_loss(case: Case) -> Call | str:
    return torch.compile(_cross_entropy, dynamic=False)


LOSS = Op(
    _matrices,
    lambda *scores: (reference.contrastive_loss(scores, torch.eye(len(scores[0])).bool()),),
    (
        Contender("ours", plain(lambda *scores: (contrastive_loss(*scores),))),
        Contender("cross_entropy", plain(_cross_entropy)),
        Contender("compiled_loss", _compiled_loss),
    ),
    leaves=2,
)
