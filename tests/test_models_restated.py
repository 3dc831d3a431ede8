"""The model against the original's forward restated with plain functions, on several sizes."""

from __future__ import annotations

import pytest
import torch
from support.models import BERT, make_inputs, tiny_model
from support.restated import Restated

from bagformer.models.conversion import to_original

# width, depth, heads, patch, image | hidden, layers, first fusion layer, heads | shared
SIZES = [
    ((48, 3, 6, 8, 40), (36, 5, 2, 3), 20),
    ((20, 2, 5, 32, 64), (16, 2, 1, 4), 3),
    ((64, 1, 1, 14, 70), (24, 7, 6, 2), 33),
]


@pytest.mark.parametrize("fusion", ["late", "early"])
@pytest.mark.parametrize("vision, text, shared", SIZES)
def test_all_outputs_equal_the_restatement(vision, text, shared, fusion):
    width, depth, heads, patch, size = vision
    hidden, layers, first, text_heads = text
    kwargs = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    bert = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": text_heads}
    model = tiny_model(
        vision_config={"backbone": "vit_base_patch16_224", "image_size": size, "kwargs": kwargs},
        text_config={**BERT, **bert},
        embed_dim=shared,
        fusion_layer=first,
        fusion=fusion,
        protocol="original",
    ).double()
    maker = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            # biases and norms start at 0 and 1, which would hide a missing one
            value += 0.1 * torch.randn(value.shape, generator=maker, dtype=torch.float64)
    state = {to_original(name): value for name, value in model.state_dict().items()}
    inputs = make_inputs(size=size)
    negatives = (torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    restated = Restated(state, (heads, text_heads, first, layers))
    expected = restated(inputs, fusion == "early", negatives)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    found = model(**inputs, return_loss=True, itm_negatives=negatives)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=name)
