"""The text encoder: BERT whose upper layers also attend to a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
)

MODES = ("text", "fusion", "multi_modal")
# Finite on purpose: a text of which every key is masked attends evenly instead of giving NaN.
MASKED_LOGIT = -10000.0


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``[B, L]`` (non-zero = attend) to ``[B, 1, 1, L]`` to be added to attention logits."""
    if mask is None:
        return None
    return (mask == 0).to(dtype)[:, None, None, :] * MASKED_LOGIT


class TextLayer(GradientCheckpointingLayer):
    """Self-attention, then cross-attention if ``encoder_width`` is given, then feed-forward."""

    def __init__(self, config: BertConfig, encoder_width: int | None = None) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        if encoder_width is not None:
            self.crossattention = BertAttention(config, is_cross_attention=True)
            inner = self.crossattention.self
            if encoder_width != config.hidden_size:
                inner.key = nn.Linear(encoder_width, config.hidden_size)
                inner.value = nn.Linear(encoder_width, config.hidden_size)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        hidden_states = self.attention(hidden_states, attention_mask)[0]
        if encoder_hidden_states is not None:
            hidden_states = self.crossattention(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )[0]
        return self.output(self.intermediate(hidden_states), hidden_states)


class _Layers(nn.Module):
    """Only there so that parameters are named as in every BERT checkpoint: ``encoder.layer.0``."""

    def __init__(self, layers: list[TextLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class TextEncoder(PreTrainedModel):
    """Layers below ``fusion_layer`` read the text, those above also read ``encoder_hidden_states``.

    ``encoder_width`` is the size of the picture's tokens; None leaves the upper layers out.
    """

    config_class = BertConfig
    base_model_prefix = "text_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TextLayer"]  # noqa: RUF012

    def __init__(self, config: BertConfig, fusion_layer: int, encoder_width: int | None) -> None:
        super().__init__(config)
        self.fusion_layer = fusion_layer
        self.embeddings = BertEmbeddings(config)
        upper = 0 if encoder_width is None else config.num_hidden_layers - fusion_layer
        self.encoder = _Layers(
            [TextLayer(config) for _ in range(fusion_layer)]
            + [TextLayer(config, encoder_width) for _ in range(upper)]
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.word_embeddings = value

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BertEmbeddings):
            buffers = dict(module.named_buffers(recurse=False))
            positions = torch.arange(buffers["position_ids"].shape[-1])
            init.copy_(buffers["position_ids"], positions.expand((1, -1)))
            init.zeros_(buffers["token_type_ids"])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        mode: str = "multi_modal",
        **_: object,
    ) -> BaseModelOutput:
        """``last_hidden_state [B, L, H]``.

        Give one of ``input_ids [B, L]``, ``inputs_embeds [B, L, H]`` (position and type are still
        added) or ``encoder_embeds [B, L, H]`` (fed to the first layer as they are). ``text`` runs
        the lower layers, ``fusion`` the upper ones, ``multi_modal`` all.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        given = [value for value in (input_ids, inputs_embeds, encoder_embeds) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds and encoder_embeds")
        if mode != "text" and encoder_hidden_states is None:
            raise ValueError(f"mode={mode!r} needs encoder_hidden_states")
        layers = self.encoder.layer
        if mode != "text" and len(layers) == self.fusion_layer:
            raise ValueError(f"mode={mode!r}: this model was made without fusion layers")
        hidden_states = encoder_embeds
        if hidden_states is None:
            hidden_states = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        own = additive_mask(attention_mask, hidden_states.dtype)
        other = additive_mask(encoder_attention_mask, hidden_states.dtype)
        first = self.fusion_layer if mode == "fusion" else 0
        last = self.fusion_layer if mode == "text" else len(layers)
        for index in range(first, last):
            image = encoder_hidden_states if index >= self.fusion_layer else None
            hidden_states = layers[index](hidden_states, own, image, other)
        return BaseModelOutput(last_hidden_state=hidden_states)
