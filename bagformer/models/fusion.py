"""Image-text matching: which pairs are shown to the matching head, and its loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagformer.models.text import TextEncoder
from bagformer.reference import accumulation_dtype


class Negatives(NamedTuple):
    """Mismatched pairs: ``image[i]`` for the text ``text_rows[i]``, and the other way round."""

    text_rows: Tensor
    image_of_text: Tensor
    image_rows: Tensor
    text_of_image: Tensor


class MatchingOutput(NamedTuple):
    """``logits [B + n_t + n_i, 2]``, ``labels`` of the same length, ``loss`` scalar."""

    loss: Tensor
    logits: Tensor
    labels: Tensor


def _draw(weights: Tensor) -> Tensor:
    # one draw per row: the random stream of the original, so that its seeds still mean something
    if len(weights) == 0:
        return torch.empty(0, dtype=torch.long, device=weights.device)
    return torch.cat([torch.multinomial(row, 1) for row in weights])


def draw_negatives(positives: Tensor, similarity: Tensor | None = None) -> Negatives:
    """Draw one wrong image for each text and one wrong text for each image.

    ``positives [B, B]`` bool is never drawn. Uniform, or with probability ``softmax(similarity)``
    for ``similarity [B, B]`` (texts in rows). Rows without any negative are left out, so a batch
    of one has none.
    """

    def weights(allowed: Tensor, scores: Tensor | None) -> Tensor:
        if scores is None:
            return allowed.float()
        # NaN is for the loss to show: a draw by it would only fail
        shares = scores.detach().float().softmax(dim=1).nan_to_num()
        # the small constant keeps a row whose mass lies on positives drawable
        return (shares + 1e-4) * allowed

    allowed = ~positives
    text_rows = allowed.any(dim=1).nonzero().flatten()
    image_rows = allowed.any(dim=0).nonzero().flatten()
    flipped = None if similarity is None else similarity.t()
    image_of_text = _draw(weights(allowed, similarity)[text_rows])
    text_of_image = _draw(weights(allowed.t(), flipped)[image_rows])
    return Negatives(text_rows, image_of_text, image_rows, text_of_image)


def given_negatives(pairs: tuple[Tensor, Tensor], batch: int, device: torch.device) -> Negatives:
    """Check ``image_idx [B]``, a wrong image for each text, and ``text_idx [B]``, the reverse."""
    every = torch.arange(batch, device=device)
    checked = []
    for name, index in zip(("image_idx", "text_idx"), pairs, strict=True):
        index = torch.as_tensor(index, device=device).long()
        wrong = index.shape != (batch,)
        if not torch.compiler.is_compiling():
            wrong = wrong or bool(((index < 0) | (index >= batch)).any())
        if wrong:
            raise ValueError(
                f"itm_negatives {name} must hold {batch} rows below {batch}, got {index.tolist()}"
            )
        checked.append(index)
    return Negatives(every, checked[0], every, checked[1])


def match(
    text_encoder: TextEncoder,
    head: nn.Module,
    text_states: Tensor,
    text_mask: Tensor,
    image_embeds: Tensor,
    negatives: Negatives,
) -> MatchingOutput:
    """Fuse the right pairs and the negatives, and classify token 0 of each: 1 = match.

    ``text_states [B, L, H]``, ``text_mask [B, L]``, ``image_embeds [B, P, W]``. Order: the B right
    pairs, then each text with its wrong image, then each image with its wrong text. Without any
    negative (a batch of one) the loss is that of the right pairs alone.
    """
    batch = len(text_states)
    every = torch.arange(batch, device=text_states.device)
    texts = torch.cat([every, negatives.text_rows, negatives.text_of_image])
    images = torch.cat([every, negatives.image_of_text, negatives.image_rows])
    fused = text_encoder(
        encoder_embeds=text_states[texts],
        attention_mask=text_mask[texts],
        encoder_hidden_states=image_embeds[images],
        mode="fusion",
    ).last_hidden_state
    logits = head(fused[:, 0])
    labels = torch.zeros(len(texts), dtype=torch.long, device=logits.device)
    labels[:batch] = 1
    return MatchingOutput(
        F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), labels), logits, labels
    )
