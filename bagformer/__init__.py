"""Bag-wise late interaction between texts and pictures.

Names are resolved on first use, so that ``import bagformer`` stays quick and needs neither a GPU
nor triton.
"""

from __future__ import annotations

import importlib
from typing import Any

from bagformer.models import auto as _auto

__version__ = "0.1.0"

_HOME = {
    "bag_pool": "bagformer.ops.bag_pool",
    "contrastive_loss": "bagformer.ops.contrastive_loss",
    "l2_normalize": "bagformer.ops.l2_normalize",
    "maxsim": "bagformer.ops.maxsim",
    "maxsim_pairs": "bagformer.ops.maxsim",
    "maxsim_quantized": "bagformer.ops.maxsim_quantized",
    "maxsim_topk": "bagformer.ops.maxsim_topk",
    "maxsim_topk_screened": "bagformer.ops.maxsim_screen",
    "screen_images": "bagformer.ops.maxsim_screen",
    "ScreenedImages": "bagformer.ops.maxsim_screen",
    "quantize_features": "bagformer.ops.quantize",
    "QuantizedFeatures": "bagformer.ops.quantize",
    "MaxSimScores": "bagformer.reference",
    "TopK": "bagformer.reference",
    "explain_backend": "bagformer.ops.backend",
    "warmup": "bagformer.ops.warmup",
    "Bags": "bagformer.bags",
    "BagSegmenter": "bagformer.bags",
    "BagwiseContrastiveLoss": "bagformer.losses",
    "BagFormerConfig": "bagformer.models.configuration_bagformer",
    "BagFormerModel": "bagformer.models.modeling_bagformer",
    "BagFormerForRetrieval": "bagformer.models.modeling_bagformer",
    "BagFormerProcessor": "bagformer.models.processing_bagformer",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bagformer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


_auto.register()
