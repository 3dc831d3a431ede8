"""BagFormer: two encoders, bags of text tokens, late interaction, and a matching head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from bagformer.losses import GATHERS, BagwiseContrastiveLoss
from bagformer.models.configuration_bagformer import BagFormerConfig, choose
from bagformer.models.inputs import check_texts
from bagformer.models.text import TextEncoder
from bagformer.models.total_loss import Labels, add_losses
from bagformer.models.vision import VisionEncoder
from bagformer.ops.bag_pool import bag_pool
from bagformer.ops.l2_normalize import l2_normalize
from bagformer.ops.maxsim import maxsim

# Range of the learned temperature of the loss on CLS tokens.
CLS_TEMPERATURE_RANGE = (0.05, 0.5)


@dataclass
class BagFormerTextOutput(ModelOutput):
    """``text_features [B, N, D]``: unit vectors, zero where ``text_mask [B, N]`` is False;
    ``text_cls [B, D]`` unit; ``text_embeds [B, L, H]`` and ``text_attention_mask [B, L]``: what the
    matching head reads (tokens, or bags under early fusion)."""

    text_features: Tensor | None = None
    text_mask: Tensor | None = None
    text_cls: Tensor | None = None
    text_embeds: Tensor | None = None
    text_attention_mask: Tensor | None = None


@dataclass
class BagFormerImageOutput(ModelOutput):
    """``image_features [B, P, D]`` unit, ``image_cls [B, D]`` unit, ``image_embeds [B, P, W]``,
    ``patch_grid`` (rows, columns). Patch 0 is the CLS token or the mean of the patches."""

    image_features: Tensor | None = None
    image_cls: Tensor | None = None
    image_embeds: Tensor | None = None
    patch_grid: tuple[int, int] | None = None


@dataclass
class BagFormerOutput(ModelOutput):
    """Scores ``text_to_image [Nt, Ni]`` and ``image_to_text [Ni, Nt]`` (raw, no temperature), all
    features, and, only where asked for, the losses: ``loss`` is the weighted sum of the others.
    ``itm_logits [B + n_t + n_i, 2]`` with ``itm_labels``: right pairs, each text with a wrong
    image, each image with a wrong text; column 1 = match."""

    loss: Tensor | None = None
    loss_twc: Tensor | None = None
    loss_ita: Tensor | None = None
    loss_itm: Tensor | None = None
    text_to_image: Tensor | None = None
    image_to_text: Tensor | None = None
    text_features: Tensor | None = None
    text_mask: Tensor | None = None
    text_cls: Tensor | None = None
    text_embeds: Tensor | None = None
    text_attention_mask: Tensor | None = None
    image_features: Tensor | None = None
    image_cls: Tensor | None = None
    image_embeds: Tensor | None = None
    patch_grid: tuple[int, int] | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None


class BagFormerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the models."""

    config_class = BagFormerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TextLayer", "Block"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, BagFormerModel):
            if module.temp is not None:
                init.constant_(module.temp, self.config.cls_temperature)
        elif isinstance(module, BagwiseContrastiveLoss):
            module.reset_parameters()
        elif module in (
            getattr(self, name, None) for name in ("vision_proj", "text_proj", "itm_head")
        ):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.bias, -bound, bound)
        # timm initialises its own modules when it makes them, and TextEncoder its own

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers. Whatever the files do not hold of the picture encoder gets timm's own
        initial values (and transformers' warning)."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        prefix = "vision_model.backbone."
        absent = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
        model.vision_model.restore(
            {key.removeprefix(prefix) for key in absent if key.startswith(prefix)}
        )
        return (model, info) if output_loading_info else model


class BagFormerModel(BagFormerPreTrainedModel):
    """Both encoders and the late interaction between them, without a matching head."""

    _keys_to_ignore_on_load_unexpected: Any = [  # noqa: RUF012
        r"itm_head\..*",
        r"text_model\.encoder\.layer\.\d+\..*",
        r"twc_loss\..*",
        r"temp",
    ]
    _has_matching_head = False

    def __init__(self, config: BagFormerConfig) -> None:
        super().__init__(config)
        self.vision_model = VisionEncoder(config.vision_config)
        width = self.vision_model.width
        fused = width if self._has_matching_head and config.use_itm_head else None
        self.text_model = TextEncoder(config.text_config, config.fusion_layer, fused)
        self.vision_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.embed_dim)
        self.temp: Any = None
        self._add_heads(config)
        self.post_init()

    def _add_heads(self, config: BagFormerConfig) -> None:
        """Where a subclass adds what comes on top of the features."""

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def _token_mask(self, attention_mask: Tensor) -> Tensor:
        """Which tokens count where every token is a bag of its own."""
        if self.config.protocol == "original":
            return torch.ones_like(attention_mask, dtype=torch.bool)
        keep = attention_mask.bool().clone()
        masked = self.config.masked_tokens
        if "[SEP]" in masked and self.config.sep_token:
            last = attention_mask.sum(dim=1, keepdim=True) - 1
            keep &= torch.arange(keep.shape[1], device=keep.device) != last
        if "[CLS]" in masked:
            keep[:, 0] = False
        return keep

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        bag_offsets: Any = None,
        bag_mask: Any = None,
    ) -> BagFormerTextOutput:
        """Encode texts.

        ``input_ids [B, T]``, ``attention_mask [B, T]`` (None: all), and for the bag-wise
        interaction ``bag_offsets [B, N + 1]`` with ``bag_mask [B, N]``. ``cls_token`` gives N = 1,
        ``tokenwise`` N = T. Under the protocol ``corrected`` an empty bag never counts.
        """
        bags: dict[str, Any] = {}
        if self.config.interaction == "bagwise":
            bags = {"bag_offsets": bag_offsets, "bag_mask": bag_mask}
        positions = self.config.text_config.max_position_embeddings
        check_texts(self.get_input_embeddings(), positions, input_ids, attention_mask, bags)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask: Any = None
        if bags:
            mask = bag_mask.bool()
            if self.config.protocol == "corrected":
                mask = mask & (bag_offsets[:, 1:] > bag_offsets[:, :-1])
        if self.config.fusion == "early":
            return self._early(input_ids, bag_offsets, mask)
        embeds = self.text_model(input_ids, attention_mask, mode="text").last_hidden_state
        text_cls = l2_normalize(self.text_proj(embeds[:, 0]))
        if self.config.interaction == "cls_token":
            features = text_cls[:, None]
            mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        else:
            pooled = embeds
            if self.config.interaction == "bagwise":
                pooled = bag_pool(embeds, bag_offsets)
            else:
                mask = self._token_mask(attention_mask)
            features = l2_normalize(self.text_proj(pooled))
            features = features.masked_fill(~mask[..., None], 0.0)
        return BagFormerTextOutput(features, mask, text_cls, embeds, attention_mask)

    def _early(self, input_ids: Tensor, offsets: Tensor, mask: Tensor) -> BagFormerTextOutput:
        """Pool the embeddings, then encode bags as if they were tokens."""
        bags = bag_pool(self.text_model.embeddings(input_ids), offsets)
        attended = mask
        if self.config.protocol == "corrected":
            # a text without content attends to its own [CLS], not evenly to its padding
            attended = mask.clone()
            attended[:, 0] |= ~mask.any(dim=1)
        embeds = self.text_model(
            inputs_embeds=bags, attention_mask=attended, mode="text"
        ).last_hidden_state
        features = l2_normalize(self.text_proj(embeds))
        text_cls = features[:, 0]
        features = features.masked_fill(~mask[..., None], 0.0)
        return BagFormerTextOutput(features, mask, text_cls, embeds, attended)

    def get_image_features(self, pixel_values: Tensor) -> BagFormerImageOutput:
        """Encode pictures ``[B, 3, H, W]``; ``cls_token`` keeps patch 0 of the features alone."""
        embeds, grid = self.vision_model(pixel_values)
        if self.config.interaction == "cls_token":
            features = l2_normalize(self.vision_proj(embeds[:, :1]))
        else:
            features = l2_normalize(self.vision_proj(embeds))
        return BagFormerImageOutput(features, features[:, 0], embeds, grid)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bag_offsets: Tensor | None = None,
        bag_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> BagFormerOutput:
        """Features of whatever is given, and the scores if both texts and pictures are."""
        if input_ids is None and pixel_values is None:
            raise ValueError("give input_ids, pixel_values or both")
        fields: dict[str, Any] = {}
        if input_ids is not None:
            fields |= self.get_text_features(input_ids, attention_mask, bag_offsets, bag_mask)
        if pixel_values is not None:
            fields |= self.get_image_features(pixel_values)
        if input_ids is not None and pixel_values is not None:
            scores = maxsim(
                fields["text_features"],
                fields["image_features"],
                text_mask=fields["text_mask"],
                **self.config.scoring,
            )
            fields["text_to_image"] = scores.text_to_image
            fields["image_to_text"] = scores.image_to_text
        return BagFormerOutput(**fields)


class BagFormerForRetrieval(BagFormerModel):
    """:class:`BagFormerModel` with the losses and, if ``use_itm_head``, the matching head."""

    _keys_to_ignore_on_load_unexpected = None
    _has_matching_head = True

    def _add_heads(self, config: BagFormerConfig) -> None:
        self.itm_head: Any = None
        if config.use_itm_head:
            self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(float(config.cls_temperature)))
        self.loss_gather, self.loss_group = "none", None
        self.twc_loss: BagwiseContrastiveLoss | None = None
        if config.interaction != "cls_token":
            self.twc_loss = BagwiseContrastiveLoss(
                mask_mode=config.mask_mode,
                reduction=config.reduction,
                temperature=config.temperature,
            )

    def gather_losses(self, gather: str, process_group: Any = None) -> None:
        """Take the negatives of ``loss_twc`` and ``loss_ita`` from all processes.

        ``gather``: ``none``, ``local`` or ``ring``, as in ``BagwiseContrastiveLoss``; under it
        ``positives`` is ``[B, images of all processes]``. Matching negatives stay within a process.
        """
        choose("gather", gather, GATHERS)
        self.loss_gather, self.loss_group = gather, process_group

    def cls_temperature(self) -> Tensor:
        """The temperature of the loss on CLS tokens, kept inside ``CLS_TEMPERATURE_RANGE``.

        The parameter itself is moved, as a clamp in the graph would leave it without gradient. (The
        original's two baselines do not clamp.)
        """
        if self.config.protocol == "corrected" or self.config.interaction == "bagwise":
            with torch.no_grad():
                self.temp.clamp_(*CLS_TEMPERATURE_RANGE)
        # a copy, as the next call writes to what this one would have saved for its backward
        return self.temp.clone()

    def match_pairs(self, text_embeds: Tensor, text_attention_mask: Tensor, image_embeds: Tensor):
        """Matching logits ``[B, 2]`` of text b with image b, column 1 = match, for re-ranking.

        The inputs are the fields of the same names of both outputs, gathered into pairs.
        """
        if self.itm_head is None:
            raise ValueError("this model was made with use_itm_head=False")
        fused = self.text_model(
            encoder_embeds=text_embeds,
            attention_mask=text_attention_mask,
            encoder_hidden_states=image_embeds,
            mode="fusion",
        ).last_hidden_state
        return self.itm_head(fused[:, 0])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        bag_offsets: Tensor | None = None,
        bag_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        positives: Tensor | None = None,
        return_loss: bool = False,
        itm_negatives: tuple[Tensor, Tensor] | None = None,
        text_ids: Tensor | None = None,
        image_ids: Tensor | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> BagFormerOutput:
        """As :class:`BagFormerModel`, with losses if ``return_loss``.

        ``positives [B, B]`` bool: which images belong to which text (None: text b, image b), or
        ``text_ids``, ``image_ids`` as in :class:`~bagformer.losses.BagwiseContrastiveLoss`; no
        matching negative is drawn from them. ``itm_negatives``: a wrong image for each text and a
        wrong text for each image, ``[B]`` each; None draws them. A batch of one has none; its
        matching loss is that of the pair. ``loss_weights``: of ``ita`` (CLS tokens), ``itm``
        (matching) and ``twc`` (late interaction); None is the paper's, 1 each; a loss without a
        weight is not computed.
        """
        output = super().forward(input_ids, attention_mask, bag_offsets, bag_mask, pixel_values)
        if return_loss:
            if output.text_to_image is None:
                raise ValueError("return_loss=True needs input_ids and pixel_values")
            labels = Labels(positives, text_ids, image_ids)
            add_losses(self, output, labels, itm_negatives, loss_weights)
        return output
