"""The original's forward restated with plain functions over its state dict, for float64."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


class Restated:
    """``sizes``: heads of both encoders, the first fusion layer and the number of layers."""

    def __init__(self, state: dict[str, Tensor], sizes: tuple[int, int, int, int]) -> None:
        self.state = {k: v.double() for k, v in state.items() if v.is_floating_point()}
        self.vision_heads, self.text_heads, self.first, self.layers = sizes

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[name + ".weight"], self.state[name + ".bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        scale, shift = self.state[name + ".weight"], self.state[name + ".bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * scale + shift

    def image(self, pixels: Tensor) -> Tensor:
        root = "visual_encoder."
        kernel = self.state[root + "patch_embed.proj.weight"]
        bias = self.state[root + "patch_embed.proj.bias"]
        patches = F.conv2d(pixels, kernel, bias, stride=kernel.shape[-1]).flatten(2).mT
        cls = self.state[root + "cls_token"].expand(len(patches), -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.state[root + "pos_embed"]
        depth = 0
        while (block := f"{root}blocks.{depth}.") + "norm1.weight" in self.state:
            mixed = self.linear(block + "attn.qkv", self.norm(block + "norm1", x, 1e-6))
            mixed = attend(*mixed.chunk(3, dim=-1), self.vision_heads)
            x = x + self.linear(block + "attn.proj", mixed)
            inner = F.gelu(self.linear(block + "mlp.fc1", self.norm(block + "norm2", x, 1e-6)))
            x = x + self.linear(block + "mlp.fc2", inner)
            depth += 1
        return self.norm(root + "norm", x, 1e-6)

    def embed(self, x: Tensor) -> Tensor:
        root = "text_encoder.embeddings."
        if not x.is_floating_point():
            x = self.state[root + "word_embeddings.weight"][x]
        x = x + self.state[root + "position_embeddings.weight"][: x.shape[1]]
        x = x + self.state[root + "token_type_embeddings.weight"][0]
        return self.norm(root + "LayerNorm", x, 1e-12)

    def text(self, x: Tensor, mask: Tensor, image: Tensor | None = None) -> Tensor:
        hidden = (1 - mask.double())[:, None, None, :] * -10000.0
        span = range(self.first) if image is None else range(self.first, self.layers)
        for layer in span:
            root = f"text_encoder.encoder.layer.{layer}."
            x = self.attention(root + "attention.", x, x, hidden)
            if image is not None:
                x = self.attention(root + "crossattention.", x, image, None)
            inner = self.linear(
                root + "output.dense", F.gelu(self.linear(root + "intermediate.dense", x))
            )
            x = self.norm(root + "output.LayerNorm", inner + x, 1e-12)
        return x

    def attention(self, root: str, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        query = self.linear(root + "self.query", x)
        key, value = (self.linear(root + "self." + part, other) for part in ("key", "value"))
        mixed = self.linear(root + "output.dense", attend(query, key, value, self.text_heads, mask))
        return self.norm(root + "output.LayerNorm", mixed + x, 1e-12)

    def project(self, name: str, x: Tensor) -> Tensor:
        return F.normalize(self.linear(name, x), dim=-1)

    def __call__(self, inputs: dict[str, Tensor], early: bool, negatives) -> dict[str, Tensor]:
        ids, offsets, counts = inputs["input_ids"], inputs["bag_offsets"], inputs["bag_mask"]
        image = self.image(inputs["pixel_values"].double())
        patches = self.project("vision_proj", image)
        tokens, mask = self.embed(ids), inputs["attention_mask"]
        if early:
            mask = counts
            tokens = self.text(self.embed(pool(tokens, offsets)), mask)
            bags = self.project("text_proj", tokens)
        else:
            tokens = self.text(tokens, mask)
            bags = self.project("text_proj", pool(tokens, offsets))
        cls = bags[:, 0] if early else self.project("text_proj", tokens[:, 0])
        bags = bags * counts[..., None]
        similarity = torch.einsum("atd,bid->abti", bags, patches)
        forward, backward = similarity.amax(3).sum(2), similarity.amax(2).sum(2).t()
        global_scores = cls @ patches[:, 0].t() / self.state["temp"].clamp(0.05, 0.5)
        wrong_image, wrong_text = negatives
        fused = self.text(
            torch.cat([tokens, tokens, tokens[wrong_text]]),
            torch.cat([mask, mask, mask[wrong_text]]),
            torch.cat([image, image[wrong_image], image]),
        )
        logits = self.linear("itm_head", fused[:, 0])
        labels = torch.tensor([1] * len(ids) + [0] * 2 * len(ids))
        return {
            "text_to_image": forward,
            "image_to_text": backward,
            "text_features": bags,
            "image_features": patches,
            "itm_logits": logits,
            "loss_twc": both_ways(forward, backward),
            "loss_ita": both_ways(global_scores, global_scores.t()),
            "loss_itm": F.cross_entropy(logits, labels),
        }


def attend(query, key, value, heads: int, mask: Tensor | None = None) -> Tensor:
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    logits = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)


def pool(x: Tensor, offsets: Tensor) -> Tensor:
    rows = [
        [row[start:end].sum(0) for start, end in pairwise(bounds)]
        for row, bounds in zip(x, offsets.tolist(), strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def both_ways(first: Tensor, second: Tensor) -> Tensor:
    own = torch.arange(len(first))
    return 0.5 * (F.cross_entropy(first, own) + F.cross_entropy(second, own))
