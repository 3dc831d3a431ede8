"""The names of the original BagFormer code, with its results.

A script written for it runs with its import lines changed: ``models.loss``,
``models.model_helper``, ``models.model_retrieval_bagwise`` and ``MUGE_helper.dataset`` all become
``bagformer.compat``. Misspelt names are the original's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bagformer.bags import BagSegmenter
from bagformer.losses import BagwiseContrastiveLoss
from bagformer.models.configuration_bagformer import BagFormerConfig
from bagformer.models.conversion import BACKBONE, select
from bagformer.models.image_processing_bagformer import BagFormerImageProcessor
from bagformer.models.modeling_bagformer import BagFormerForRetrieval
from bagformer.ops.contrastive_loss import contrastive_loss
from bagformer.ops.maxsim import maxsim, maxsim_pairs
from bagformer.ops.maxsim_topk import maxsim_topk

_METRICS = ("cosine", "l2")


def tokenwise_similarity(query: Tensor, document: Tensor, similarity_metric: str = "cosine"):
    """Sum over the query's tokens of the best similarity with a document's token.

    ``query [Tq, D]`` (against every document) or ``[B, Tq, D]``, ``document [B, Td, D]``; gives
    ``[B]``. ``cosine`` is the plain inner product, ``l2`` minus the squared distance.
    """
    if similarity_metric not in _METRICS:
        raise ValueError(
            f"similarity_metric must be one of {', '.join(_METRICS)}, got {similarity_metric!r}"
        )
    if document.dim() != 3 or query.dim() not in (2, 3):
        raise ValueError(
            f"query must be [Tq, D] or [B, Tq, D] and document [B, Td, D], "
            f"got {list(query.shape)} and {list(document.shape)}"
        )
    if query.dim() == 2 and similarity_metric == "cosine":
        return tokenwise_similarity_martix(query[None], document)[1][0]
    query = query.expand(len(document), *query.shape[-2:])
    if similarity_metric == "cosine":
        return maxsim_pairs(query, document, directions="text_to_image").text_to_image
    rows = [
        -(one[:, None] - other[None]).square().sum(dim=-1).amin(dim=1).sum()
        for one, other in zip(query, document, strict=True)
    ]
    return torch.stack(rows)


def tokenwise_similarity_martix(text_feats: Tensor, image_feats: Tensor) -> tuple[Tensor, Tensor]:
    """``(sim_i2t [Ni, Nt], sim_t2i [Nt, Ni])`` of ``text_feats [Nt, T, D]``, ``image_feats
    [Ni, I, D]``: sums over the tokens of the first of the best similarity with one of the other."""
    scores: Any = maxsim(text_feats, image_feats, mask_mode="zero")
    return scores.image_to_text, scores.text_to_image


def tokenwise_similarity_loss(text_feats: Tensor, image_feats: Tensor) -> Tensor:
    """Mean of both cross-entropies over the raw sums; text b belongs to image b."""
    return BagwiseContrastiveLoss(mask_mode="zero")(text_feats, image_feats)


def ngramwise_similarity(query: Tensor, document: Tensor) -> Tensor:
    """``[N]`` similarities of one item with ``N`` of the other kind.

    ``query [I, D]`` is an image and ``document [N, G, T, D]`` texts of G n-grams: the sum over T of
    the maximum over n-grams and image tokens. ``query [G, T, D]`` is a text and ``document
    [N, I, D]`` images: the sum over I of the maximum over n-grams and T. (So each direction sums
    over the other side's tokens, as in the original.)
    """
    if query.dim() == 2 and document.dim() == 4:
        return torch.einsum("id,ngtd->ngti", query, document).amax(dim=(1, 3)).sum(dim=1)
    if query.dim() == 3 and document.dim() == 3:
        texts = query.flatten(0, 1)[None]
        return tokenwise_similarity_martix(texts, document)[0][:, 0]
    raise ValueError(
        f"give [I, D] with [N, G, T, D], or [G, T, D] with [N, I, D]; "
        f"got {list(query.shape)} and {list(document.shape)}"
    )


def ngramwise_similarity_loss(text_feats: Tensor, image_feats: Tensor) -> Tensor:
    """Mean of both cross-entropies of :func:`ngramwise_similarity`, ``text_feats [N, G, T, D]``,
    ``image_feats [N, I, D]``."""
    image_to_text = torch.stack([ngramwise_similarity(image, text_feats) for image in image_feats])
    text_to_image = torch.stack([ngramwise_similarity(text, image_feats) for text in text_feats])
    return contrastive_loss(text_to_image, image_to_text)


def _sparse(values: Tensor, indices: Tensor) -> list[dict[int, float]]:
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return [dict(zip(index, value, strict=True)) for index, value in pairs]


def sparse_tokenwise_similarity_martix(
    text_feats: Tensor, image_feats: Tensor, topk: int = 256
) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
    """``(sim_i2t, sim_t2i)``: for each image and each text its ``topk`` best, ``{index: score}``
    from the best down. No full matrix is made."""
    found = []
    for direction in ("image_to_text", "text_to_image"):
        best = maxsim_topk(text_feats, image_feats, topk, direction=direction, mask_mode="zero")
        found.append(_sparse(best.scores, best.indices))
    return found[0], found[1]


def sparse_cls_token_similarity(
    image_feat: Tensor, text_feat: Tensor, topk: int = 256
) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
    """As :func:`sparse_tokenwise_similarity_martix` for one vector each: ``image_feat [Ni, D]``,
    ``text_feat [Nt, D]``. Images come first."""
    return sparse_tokenwise_similarity_martix(text_feat[:, None], image_feat[:, None], topk)


class EmbeddingBagHelperAutomaton:
    """Flat offsets and masks of bags, as ``torch.nn.functional.embedding_bag`` takes them.

    ``dict_path``: a file with one entity a line. ``masked_token``: bags of exactly one of these
    tokens get mask 0.
    """

    _matcher = "original"

    def __init__(
        self,
        tokenizer: Any,
        dict_path: str | Path,
        masked_token: Sequence[str] = ("[CLS]", "[PAD]"),
    ) -> None:
        self.segmenter = BagSegmenter.from_dictionary(
            dict_path, tokenizer, matcher=self._matcher, masked_tokens=tuple(masked_token)
        )

    def get_offsets(self, input_ids: Sequence[int]) -> list[int]:
        """The starts of one row's bags, before any truncation to its batch."""
        bags = self.segmenter([list(input_ids)])
        return bags.offsets[0, : int(bags.counts[0])].tolist()

    def process(self, text: Any, return_mask: bool = False) -> Any:
        """``text["input_ids"]``: rows of ids, of one length. Gives the flat list of starts (every
        row cut to the bag count of the shortest), and with ``return_mask`` also the masks, one list
        of 0 and 1 for each row."""
        rows = text["input_ids"]
        rows = rows.tolist() if isinstance(rows, Tensor) else [list(row) for row in rows]
        if not rows:
            raise ValueError("text['input_ids'] has no rows")
        bags = [self.segmenter([row]) for row in rows]
        least = min(int(one.counts[0]) for one in bags)
        offsets = [
            start + index * len(rows[0])
            for index, one in enumerate(bags)
            for start in one.offsets[0, :least].tolist()
        ]
        if not return_mask:
            return offsets
        return offsets, [one.mask[0, :least].int().tolist() for one in bags]


class EmbeddingBagHelper(EmbeddingBagHelperAutomaton):
    """The same by backward maximum matching."""

    _matcher = "backward_max"


def get_test_transform(config: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """A picture to a normalised tensor ``[3, image_res, image_res]``."""
    return BagFormerImageProcessor(int(config["image_res"])).one


def _bert_config(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return json.loads(Path(value).read_text(encoding="utf-8"))


def _config(config: Mapping[str, Any], vocabulary: int) -> BagFormerConfig:
    """The original's settings as ours. The picture encoder's sizes, fixed in the original, may be
    given as ``vision_width``, ``vision_depth``, ``vision_heads`` and ``patch_size``."""
    bert = _bert_config(config["bert_config"])
    bert.setdefault("vocab_size", vocabulary)
    strategies = {"late_fusion": "late", "early_fusion": "early"}
    strategy = config.get("fusion_strategy", "late_fusion")
    if strategy not in strategies:
        raise ValueError(
            f"fusion_strategy must be one of {', '.join(strategies)}, got {strategy!r}"
        )
    fusion_layer = bert.pop("fusion_layer", None)
    bert.pop("model_type", None)
    bert.pop("encoder_width", None)
    width = config.get("vision_width", 768)
    return BagFormerConfig(
        protocol="original",
        fusion=strategies[strategy],
        fusion_layer=fusion_layer,
        embed_dim=config["embed_dim"],
        cls_temperature=float(config.get("temp", 0.07)),
        text_config=bert,
        vision_config={
            "backbone": BACKBONE,
            "image_size": config["image_res"],
            "backbone_kwargs": {
                "patch_size": config.get("patch_size", 16),
                "embed_dim": width,
                "depth": config.get("vision_depth", 12),
                "num_heads": config.get("vision_heads", width // 64),
            },
        },
    )


class BagFormer(nn.Module):
    """The original's model class: same arguments, same names of parameters.

    ``config``: the settings of ``config_muge.yaml``. ``text_encoder``: what
    ``BertModel.from_pretrained`` takes; a folder without weights, such as one with a vocabulary
    alone, leaves BERT freshly initialised. Momentum copies and queues are not kept.

    A new model is in evaluation mode: the original's README never leaves training mode, so that its
    numbers change with every run; the recorded ones are without dropout.

    ``visual_encoder(image)`` gives tokens ``[B, P, W]``, ``text_encoder(ids, attention_mask=,
    mode=)`` an output with ``last_hidden_state``. ``retrieval`` is the same model behind our own
    interface, sharing all weights.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        text_encoder: str | Path | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        vocabulary = 21128 if tokenizer is None else len(tokenizer)
        model = BagFormerForRetrieval(_config(config, vocabulary))
        # outside of nn.Module's registry, so that no parameter has two names
        object.__setattr__(self, "retrieval", model)
        self.retrieval: Any
        self.tokenizer = tokenizer
        self.visual_encoder = model.vision_model.backbone
        self.text_encoder = model.text_model
        self.vision_proj = model.vision_proj
        self.text_proj = model.text_proj
        self.itm_head = model.itm_head
        self.temp = model.temp
        if text_encoder is not None:
            self._load_bert(str(text_encoder))
        self.eval()

    def _load_bert(self, source: str) -> None:
        from transformers import BertModel

        weights = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
        if Path(source).is_dir() and not any((Path(source) / name).exists() for name in weights):
            return
        bert = BertModel.from_pretrained(source, add_pooling_layer=False)
        self.text_encoder.load_state_dict(bert.state_dict(), strict=False)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Momentum copies and queues, which are not kept here, are passed over."""
        kept, _ = select(dict(state_dict))
        return super().load_state_dict(kept, strict=strict, assign=assign)

    def forward(
        self,
        image: Tensor,
        text: Any,
        embed_bag_input: tuple[Tensor, Tensor],
        alpha: float = 0.0,
        idx: Tensor | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(loss_ita, loss_itm, loss_twc)``.

        ``text`` has ``input_ids`` and ``attention_mask [B, T]``; ``embed_bag_input`` is (flat
        offsets ``[B * N]``, mask ``[B, N]``), as ``process`` gives them. ``alpha``, ``idx`` and
        ``config`` have no effect here, nor had they in the original.
        """
        offsets, mask = embed_bag_input
        batch, length = text["input_ids"].shape
        starts = torch.arange(batch, device=offsets.device)[:, None] * length
        bounds = offsets.view(batch, -1) - starts
        bounds = torch.cat([bounds, bounds.new_full((batch, 1), length)], dim=1)
        output = self.retrieval(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            bag_offsets=bounds,
            bag_mask=mask.bool(),
            pixel_values=image,
            return_loss=True,
        )
        return output.loss_ita, output.loss_itm, output.loss_twc
