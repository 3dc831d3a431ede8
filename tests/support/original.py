"""Reads the original code's recorded models and cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def arch(folder: Path, letter: str) -> dict[str, Any]:
    return json.loads((folder / f"model_{letter}.json").read_text(encoding="utf-8"))


def letters(folder: Path) -> list[str]:
    return sorted(path.stem.removeprefix("model_") for path in folder.glob("model_?.json"))


def model_of(folder: Path, letter: str, **changes: Any) -> Any:
    """Our model with the recorded weights, through the converter's own functions."""
    from bagformer import BagFormerForRetrieval
    from bagformer.models.conversion import check_tensors, from_original, infer_config, select

    info = arch(folder, letter)
    tensors, _ = select(load_file(folder / f"model_{letter}.safetensors"))
    config = infer_config(
        tensors,
        bert_config=info["bert_config"],
        vision_heads=info["arch"]["vit_heads"],
        **changes,
    )
    assert check_tensors(config, tensors) == []
    model = BagFormerForRetrieval(config).eval()
    model.load_state_dict({from_original(name): value for name, value in tensors.items()})
    return model


class Case:
    """One recorded case: ``case["text_feats"]`` is an array of it as a tensor."""

    def __init__(self, arrays: Any, name: str) -> None:
        self.name = name
        self._arrays = arrays
        self._keys = {key.split("|", 1)[1] for key in arrays.files if key.startswith(name + "|")}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self._arrays[f"{self.name}|{key}"]))

    def starting(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self._keys if key.startswith(prefix)}

    def inputs(self) -> dict[str, Tensor]:
        ids = self["input_ids"].long()
        batch, length = ids.shape
        starts = self["embed_bag_offset"].long().view(batch, -1)
        starts = starts - torch.arange(batch)[:, None] * length
        return {
            "input_ids": ids,
            "attention_mask": self["attention_mask"].long(),
            "bag_offsets": torch.cat([starts, starts.new_full((batch, 1), length)], dim=1).int(),
            "bag_mask": self["embed_bag_attn_mask"].bool(),
            "pixel_values": self["image"],
        }


def cases(folder: Path, *kinds: str) -> list[tuple[Case, dict[str, Any]]]:
    arrays = np.load(folder / "model.npz")
    described = json.loads((folder / "model_cases.json").read_text(encoding="utf-8"))
    return [
        (Case(arrays, name), info)
        for name, info in described.items()
        if name.split("_")[0] in kinds or (name.startswith("cls_token") and "cls_token" in kinds)
    ]
