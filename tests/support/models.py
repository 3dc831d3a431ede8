"""Small models, vocabularies and inputs for the tests of models, losses, conversion and compat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VIT = {
    "backbone": "vit_base_patch16_224",
    "image_size": 64,
    "kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}
BERT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*"手机壳玫瑰金置物架女鞋红色绿abcdefg", "nike", "##s", "##a", "123", "t", "恤"]
ENTITIES = ["手机壳", "玫瑰金", "玫瑰", "置物架", "红色", "nike鞋"]


def tiny_config(**changes: Any) -> Any:
    from bagformer import BagFormerConfig

    options: dict[str, Any] = {"vision_config": VIT, "text_config": BERT, "embed_dim": 16}
    return BagFormerConfig(**{**options, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    from bagformer import BagFormerForRetrieval

    torch.manual_seed(seed)
    return BagFormerForRetrieval(tiny_config(**changes)).eval()


def write_tokenizer(folder: Path) -> Path:
    """A folder with ``vocab.txt`` and the tokenizer's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*SPECIAL, *WORDS]
    lines += [f"[unused{n}]" for n in range(BERT["vocab_size"] - len(lines))]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}', encoding="utf-8")
    return folder


def write_dictionary(path: Path) -> Path:
    path.write_text("\n".join(ENTITIES) + "\n", encoding="utf-8")
    return path


def make_inputs(
    batch: int = 3, tokens: int = 8, size: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Model inputs with padding, bags of several sizes and, in row 1, an empty bag."""
    maker = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, BERT["vocab_size"], (batch, tokens), generator=maker)
    ids[:, 0] = 2
    attention = torch.ones_like(ids)
    ids[0, tokens - 2 :] = 0
    attention[0, tokens - 2 :] = 0
    offsets = torch.tensor([[0, 1, 3, 4, 6, tokens]] * batch, dtype=torch.int32)
    mask = torch.tensor([[0, 1, 1, 1, 1]] * batch).bool()
    mask[0, 4] = False
    if batch > 1:
        offsets[1] = torch.tensor([0, 1, 3, 3, 7, tokens])
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "bag_offsets": offsets,
        "bag_mask": mask,
        "pixel_values": torch.randn(batch, 3, size, size, generator=maker),
    }
