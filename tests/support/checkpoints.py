"""Checkpoints as the original code saves them, and what must hold where one is refused."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model

from bagformer.models.conversion import convert_checkpoint, to_original

HEADS = {"vision_heads": 2, "text_heads": 2}


def original_state(**changes) -> dict[str, torch.Tensor]:
    """A state dict as the original saves it: its names, momentum copies, queues, position ids."""
    model = tiny_model(protocol="original", **changes)
    state = {to_original(name): value for name, value in model.state_dict().items()}
    for name in list(state):
        part, _, rest = name.partition(".")
        if part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            state[f"{part}_m.{rest}"] = state[name] + 1
    state["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["text_encoder_m.embeddings.position_ids"] = torch.arange(40)[None]
    state["image_queue"] = state["text_queue"] = torch.zeros(16, 8)
    state["idx_queue"], state["queue_ptr"] = torch.zeros(1, 8).long(), torch.zeros(1).long()
    return state


def save(path, state, **more):
    torch.save({"model": state, "optimizer": {}, "epoch": 3, **more}, path)
    return path


def refused(tmp_path, path, match, error=ValueError, **options):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        convert_checkpoint(path, tmp_path / "out", **{**HEADS, **options})
    assert sorted(tmp_path.iterdir()) == before, "nothing may be left behind"
