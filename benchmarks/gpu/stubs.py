"""Stand-ins for the rivals' packages in a dry run: their signatures over plain PyTorch.

The adapters in rivals.py call these as they call the packages. Where a package is there too, its
functions' signatures are compared with these, which were read off the versions in WANTED.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

WANTED = {"late_interaction_kernels": "0.4.5", "flash_maxsim": "0.3.0"}
WHEELS = {
    "late_interaction_kernels": "late-interaction-kernels",
    "flash_maxsim": "flash-maxsim",
}


def _score(rows: Tensor, columns: Tensor, mask: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Sum over the rows' tokens of the maximum over the columns', ``[R, L, D], [C, M, D]``."""
    similarity = torch.einsum("rld,cmd->rclm", rows, columns).float()
    if hidden is not None:
        similarity = similarity.masked_fill(~hidden[None, :, None], float("-inf"))
    best = similarity.amax(3)
    return (best if mask is None else best.where(mask[:, None], 0.0)).sum(2)


def _prefix(lengths: Tensor | None, longest: int) -> Tensor | None:
    if lengths is None:
        return None
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def maxsim(
    Q: Tensor,  # noqa: N803 - the packages' own names
    D: Tensor,  # noqa: N803
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    backward: str | None = None,
) -> Tensor:
    if D.dim() == 4:
        return torch.cat([_score(Q[a : a + 1], D[a], None, None) for a in range(len(Q))])
    return _score(Q, D, q_mask, d_mask)


def maxsim_pairs(
    Q: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    normalize: bool = False,
    backward: str | None = None,
) -> Tensor:
    return torch.einsum("bld,bmd->blm", Q, D).float().amax(2).sum(1)


def flash_maxsim(
    Q: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    doc_lengths=None,
    query_chunk_size: int = 128,
    splitk: bool = False,
) -> Tensor:
    return _score(Q[None], D, None, _prefix(doc_lengths, D.shape[1]))[0]


def flash_maxsim_batched(
    Q: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    doc_lengths=None,
    shared_docs: bool = True,
    query_lengths=None,
    pad_lq: bool = True,
    query_chunk_size: int = 128,
) -> Tensor:
    return _score(Q, D, _prefix(query_lengths, Q.shape[1]), _prefix(doc_lengths, D.shape[1]))


def flash_maxsim_batched_train(
    Q: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    shared_docs: bool = True,
    doc_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
) -> Tensor:
    return flash_maxsim_batched(Q, D, doc_lengths, shared_docs, query_lengths)


def flash_maxsim_rerank_padded(
    queries: Tensor,
    documents: Tensor,
    query_lengths: Tensor | None = None,
    doc_lengths: Tensor | None = None,
) -> Tensor:
    return maxsim(queries, documents)


def flash_maxsim_pairs_dense(
    Q: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    q_lengths: Tensor | None = None,
    doc_lengths: Tensor | None = None,
) -> Tensor:
    return maxsim_pairs(Q, D)


MODULES = {
    "late_interaction_kernels": SimpleNamespace(maxsim=maxsim, maxsim_pairs=maxsim_pairs),
    "flash_maxsim": SimpleNamespace(
        flash_maxsim=flash_maxsim,
        flash_maxsim_batched=flash_maxsim_batched,
        flash_maxsim_batched_train=flash_maxsim_batched_train,
        flash_maxsim_rerank_padded=flash_maxsim_rerank_padded,
        flash_maxsim_pairs_dense=flash_maxsim_pairs_dense,
    ),
}
