"""The same weights under another protocol."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from bagformer.data.images import transparency_of
from bagformer.models.configuration_bagformer import PROTOCOLS, choose
from bagformer.models.processing_bagformer import BagFormerProcessor

CHOICES = ("auto", *PROTOCOLS)


def with_protocol(
    model: Any, processor: Any, protocol: str, dictionary: str | Path | None = None
) -> tuple[Any, Any]:
    """``model`` and ``processor`` under ``protocol``: ``original``, ``corrected`` or ``auto``.

    ``auto``, or the protocol that the model already has, gives back what came in. Else the model
    shares its weights with the one given, and the processor cuts bags by the matcher of that
    protocol, for which a bag-wise model needs the ``dictionary`` of one entity a line: a segmenter
    does not hold the entities that another matcher would need. Raises ValueError without it.
    """
    choose("protocol", protocol, CHOICES)
    if protocol in ("auto", model.config.protocol):
        return model, processor
    config = model.config.with_protocol(protocol)
    bagged = config.interaction == "bagwise" and len(processor.segmenter) > 0
    if bagged and dictionary is None:
        raise ValueError(
            f"protocol={protocol!r}: the model's own is {model.config.protocol!r}, and its bags "
            f"were made for that by the matcher {processor.segmenter.matcher!r}; give the "
            "dictionary too (--dictionary FILE, one entity a line)"
        )
    changed = copy.copy(model)
    changed.config = config
    fresh = BagFormerProcessor.from_config(
        config, processor.tokenizer, dictionary if bagged else None
    )
    pictures = copy.copy(processor.image_processor)
    pictures.transparency = transparency_of(config.protocol)
    fresh.image_processor = pictures
    return changed, fresh
