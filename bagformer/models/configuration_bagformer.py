"""Configuration of the BagFormer models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from transformers import BertConfig, PreTrainedConfig

from bagformer.reference import MASK_MODES, MATCHERS, REDUCTIONS

PROTOCOLS = ("corrected", "original")
FUSIONS = ("late", "early")
INTERACTIONS = ("bagwise", "tokenwise", "cls_token")

# What each protocol means where the configuration does not say otherwise.
PROTOCOL_DEFAULTS: dict[str, dict[str, Any]] = {
    "corrected": {
        "matcher": "leftmost_longest",
        "mask_mode": "exclude",
        "masked_tokens": ["[CLS]", "[SEP]", "[PAD]"],
        "sep_token": True,
        "temperature": "learn",
    },
    "original": {
        "matcher": "original",
        "mask_mode": "zero",
        "masked_tokens": ["[CLS]", "[PAD]"],
        "sep_token": False,
        "temperature": None,
    },
}


def choose(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def refuse_misspelt(config: PreTrainedConfig, unknown: Iterable[str]) -> None:
    """transformers keeps any argument as an attribute; one that is nearly a field is a mistake."""
    known = [name for name in type(config).__dataclass_fields__ if name not in unknown]
    for name in unknown:
        if near := get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(f"unknown argument {name!r}, did you mean {near[0]!r}?")


class BagFormerVisionConfig(PreTrainedConfig):
    """The picture side: any timm backbone.

    - ``backbone``: a name that ``timm.create_model`` knows.
    - ``image_size``: height and width of the pictures, in pixels.
    - ``backbone_kwargs`` (or ``kwargs``): further arguments of ``timm.create_model``, for example
      ``embed_dim`` or ``depth``.
    """

    model_type = "bagformer_vision"
    base_config_key = "vision_config"

    backbone: str = "vit_base_patch16_224"
    image_size: int = 256
    backbone_kwargs: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        short = kwargs.pop("kwargs", None)
        refuse_misspelt(self, kwargs)
        if not isinstance(self.backbone, str) or not self.backbone:
            raise ValueError(f"vision_config.backbone must be a timm name, got {self.backbone!r}")
        if not isinstance(self.image_size, int) or self.image_size < 1:
            raise ValueError(
                f"vision_config.image_size must be a positive int, got {self.image_size!r}"
            )
        self.backbone_kwargs = dict(self.backbone_kwargs or short or {})
        super().__post_init__(**kwargs)


class BagFormerConfig(PreTrainedConfig):
    """All that decides what a BagFormer computes.

    - ``vision_config``: fields of :class:`BagFormerVisionConfig`; ``text_config``: fields of
      ``transformers.BertConfig``, whose layers ``0 .. fusion_layer - 1`` read the text and whose
      remaining layers, if ``use_itm_head``, cross-attend to the picture.
    - ``embed_dim``: size of the shared space.
    - ``fusion``: bags are pooled ``late``, from the encoder's output, or ``early``, from its
      embeddings. Early fusion encodes bags of embeddings, so there are bags to compare or nothing:
      it needs the ``bagwise`` interaction.
    - ``interaction``: ``bagwise``, ``tokenwise`` (every token a bag) or ``cls_token`` (one vector
      for a text, one for a picture).
    - ``protocol``: ``original`` reproduces the published code, ``corrected`` is right. It sets the
      default of ``matcher``, ``mask_mode``, ``masked_tokens``, ``sep_token`` (whether a text ends
      in [SEP]) and ``temperature``; see :meth:`with_protocol`.
    - ``reduction``: ``sum`` or ``mean`` over the maxima.
    - ``temperature`` of the bag-wise loss: None, a number, or ``learn``. ``cls_temperature`` is
      where the learned temperature of the contrastive loss on the CLS tokens starts.
    - ``hard_negatives``: draw the matching head's negatives by similarity, not uniformly.
    - ``max_text_length``: tokens of a text, special tokens included.
    """

    model_type = "bagformer"
    sub_configs = {"vision_config": BagFormerVisionConfig, "text_config": BertConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    embed_dim: int = 256
    fusion: str = "late"
    interaction: str = "bagwise"
    fusion_layer: Any = None
    protocol: str = "corrected"
    matcher: Any = None
    mask_mode: Any = None
    masked_tokens: Any = None
    sep_token: Any = None
    reduction: str = "sum"
    temperature: str | float | None = "auto"
    cls_temperature: float = 0.07
    use_itm_head: bool = True
    hard_negatives: bool = False
    max_text_length: int = 25

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_misspelt(self, kwargs)
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None or isinstance(value, dict):
                setattr(self, name, config_class(**(value or {})))
            elif not isinstance(value, config_class):
                raise TypeError(
                    f"{name} must be a dict or {config_class.__name__}, got {type(value).__name__}"
                )
        choose("protocol", self.protocol, PROTOCOLS)
        for name, default in PROTOCOL_DEFAULTS[self.protocol].items():
            unset = "auto" if name == "temperature" else None
            if getattr(self, name) == unset:
                setattr(self, name, deepcopy(default))
        tokens = self.masked_tokens
        if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
            raise ValueError(f"masked_tokens must be a list of tokens, got {tokens!r}")
        self.masked_tokens = list(tokens)
        if self.fusion_layer is None:
            self.fusion_layer = max(1, self.text_config.num_hidden_layers // 2)
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        choose("fusion", self.fusion, FUSIONS)
        choose("interaction", self.interaction, INTERACTIONS)
        choose("matcher", self.matcher, MATCHERS)
        choose("mask_mode", self.mask_mode, MASK_MODES)
        choose("reduction", self.reduction, REDUCTIONS)
        for name in ("embed_dim", "fusion_layer", "max_text_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        layers = self.text_config.num_hidden_layers
        if self.fusion_layer > layers or (self.use_itm_head and self.fusion_layer == layers):
            raise ValueError(
                f"fusion_layer={self.fusion_layer} leaves no layer for the matching head: "
                f"text_config.num_hidden_layers={layers}"
            )
        positions = self.text_config.max_position_embeddings
        if self.max_text_length > positions:
            raise ValueError(
                f"max_text_length={self.max_text_length} exceeds "
                f"text_config.max_position_embeddings={positions}"
            )
        if self.fusion == "early" and self.interaction != "bagwise":
            raise ValueError(
                "early fusion encodes bags of embeddings, so there are bags to compare or nothing: "
                f"fusion='early' needs interaction='bagwise', got {self.interaction!r}"
            )
        for name in ("use_itm_head", "hard_negatives", "sep_token"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        start = self.cls_temperature
        if not isinstance(start, (int, float)) or not 0 < start < math.inf:
            raise ValueError(f"cls_temperature must be above 0, got {self.cls_temperature!r}")

    @property
    def scoring(self) -> dict[str, str]:
        """How this model scores: keyword arguments of ``maxsim`` and its relatives.

        ``maxsim_topk(text_features, image_features, 10, text_mask=mask, **model.config.scoring)``
        """
        return {"mask_mode": self.mask_mode, "reduction": self.reduction}

    def with_protocol(self, protocol: str) -> BagFormerConfig:
        """A copy under another protocol, with that protocol's matcher, masks and [SEP] rule.

        The temperature is a weight of the model and stays as it is.
        """
        choose("protocol", protocol, PROTOCOLS)
        changed = deepcopy(self)
        changed.protocol = protocol
        for name, default in PROTOCOL_DEFAULTS[protocol].items():
            if name != "temperature":
                setattr(changed, name, deepcopy(default))
        return changed
