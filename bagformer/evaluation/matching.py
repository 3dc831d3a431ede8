"""The matching head over the candidates of a first stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bagformer.evaluation.images import TokenStore
from bagformer.evaluation.texts import TextSide


class PairLogits:
    """The head's logit for "match" of the pairs of a text and an image that were asked for.

    A pair that is a candidate in both directions is computed once. Pairs are taken image by image,
    so that a store that lies in a file is read from front to back.
    """

    def __init__(
        self,
        model: Any,
        texts: TextSide,
        store: TokenStore,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        batch_size: int,
        progress: Any = None,
    ) -> None:
        """``pairs``: text numbers and image numbers, int64 of one length each."""
        self._n_texts = len(texts.features)
        codes = torch.cat([self._code(text, image) for text, image in pairs])
        self._codes = torch.unique(codes)
        self._logits = torch.empty(len(self._codes))
        device = texts.embeds.device
        for start in range(0, len(self._codes), batch_size):
            some = self._codes[start : start + batch_size]
            images, place = torch.unique(some // self._n_texts, return_inverse=True)
            rows = (some % self._n_texts).to(device)
            tokens = store.get(images).to(device, texts.embeds.dtype)[place.to(device)]
            logits = model.match_pairs(texts.embeds[rows], texts.attention[rows], tokens)
            self._logits[start : start + batch_size] = logits[:, 1].float().cpu()
            if progress is not None:
                progress(len(some))

    def _code(self, text: Tensor, image: Tensor) -> Tensor:
        return (image * self._n_texts + text).flatten()

    def of(self, text: Tensor, image: Tensor) -> Tensor:
        """The logits of pairs that were asked for, in the shape of ``text`` and ``image``."""
        text, image = torch.broadcast_tensors(text, image)
        places = torch.searchsorted(self._codes, self._code(text, image))
        return self._logits[places].reshape(text.shape)
