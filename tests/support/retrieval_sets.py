"""A small retrieval set in MUGE's format, and an original evaluation restated in float64."""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from support.models import ENTITIES, VIT, WORDS, tiny_model, write_dictionary, write_tokenizer
from support.restated import Restated, pool
from torch import Tensor

from bagformer import BagFormerProcessor
from bagformer.data.muge import MugeDataset, MugeImages, read_queries, write_jsonl, write_tsv
from bagformer.models.conversion import to_original

SIZE = VIT["image_size"]
FIRST_ID = 700


def _noise(seed: int, mode: str) -> Image.Image:
    bands = {"RGB": 3, "RGBA": 4}[mode]
    maker = torch.Generator().manual_seed(seed)
    # coarse squares of colour: noise of single pixels makes all pictures alike
    coarse = torch.randint(0, 256, (bands, 4, 4), generator=maker).float()
    pixels = F.interpolate(coarse[None], size=(SIZE, SIZE), mode="nearest")[0].byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def write_set(folder: Path, pictures: int = 14, queries: int = 11, labels: bool = True) -> Any:
    """Files of a set: every fifth picture is transparent, the last three have no query."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(pictures)
    rows = []
    for n in range(pictures):
        file = io.BytesIO()
        _noise(n, "RGBA" if n % 5 == 4 else "RGB").save(file, "PNG")
        rows.append((FIRST_ID + n, file.getvalue()))
    write_tsv(folder / "imgs.tsv", rows)
    words = [*ENTITIES, *WORDS[:20]]
    lines = []
    for n in range(queries):
        text = "".join(rng.choice(words) for _ in range(rng.randint(1, 7)))
        line: dict[str, Any] = {"query_id": 40 + n, "query_text": text}
        if labels:
            items = rng.sample(range(pictures - 3), rng.randint(1, 3))
            line["item_ids"] = [FIRST_ID + item for item in items]
        lines.append(line)
    write_jsonl(folder / "queries.jsonl", lines)
    return SimpleNamespace(queries=folder / "queries.jsonl", images=folder / "imgs.tsv")


def read(files: Any) -> MugeDataset:
    return MugeDataset(read_queries(files.queries), MugeImages(files.images))


def model_and_processor(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A random model whose biases and norms matter, and its processor."""
    model = tiny_model(**changes)
    maker = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=maker)
    processor = BagFormerProcessor.from_config(
        model.config, write_tokenizer(folder), write_dictionary(folder / "entities.txt")
    )
    return model, processor


def _restated_texts(restated: Any, model: Any, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features, states and attention of one batch as the original's evaluation has them."""
    ids, attention, offsets = inputs["input_ids"], inputs["attention_mask"], inputs["bag_offsets"]
    counts = inputs["bag_mask"]
    if model.config.fusion == "early":
        bags = restated.embed(pool(restated.embed(ids), offsets))
        room = ids.shape[1] - bags.shape[1]
        states = F.pad(restated.text(bags, counts), (0, 0, 0, room))
        attention = F.pad(counts, (0, room))
    else:
        states = restated.text(restated.embed(ids), attention)
    if model.config.interaction == "bagwise":
        features = restated.project("text_proj", pool(states, offsets)) * counts[..., None]
        features = F.pad(features, (0, 0, 0, ids.shape[1] - features.shape[1]))
    else:
        raw = restated.linear("text_proj", states)
        features = raw / raw.square().sum(1, keepdim=True).sqrt()
    return features, states, attention.double()


def restated_tables(model: Any, processor: Any, dataset: Any, batch: int, k: int) -> dict:
    """The original's six score tables: ``tables[kind][direction]`` in float64."""
    state = {to_original(name): value for name, value in model.state_dict().items()}
    sizes = (2, 2, model.config.fusion_layer, model.config.text_config.num_hidden_layers)
    restated = Restated(state, sizes)
    texts = [query.text for query in dataset.queries]
    parts = [
        _restated_texts(restated, model, processor(text=texts[start : start + batch]))
        for start in range(0, len(texts), batch)
    ]
    features, states, attention = (torch.cat(part) for part in zip(*parts, strict=True))
    raw = [Image.open(io.BytesIO(dataset.images.encoded(key))) for key in dataset.images]
    pixels = torch.stack([processor.image_processor.one(one.convert("RGB")) for one in raw])
    tokens = restated.image(pixels.double())
    patches = restated.project("vision_proj", tokens)
    if model.config.interaction == "cls_token":
        forward = features[:, 0] @ patches[:, 0].t()
        backward = forward.t()
    else:
        similarity = torch.einsum("atd,bid->abti", features, patches)
        forward, backward = similarity.amax(3).sum(2), similarity.amax(2).sum(2).t()
    kept = tokens.half().double()
    logits = torch.stack(
        [
            restated.linear(
                "itm_head",
                restated.text(
                    states[t].expand(len(kept), -1, -1), attention[t].expand(len(kept), -1), kept
                )[:, 0],
            )[:, 1]
            for t in range(len(states))
        ]
    )
    tables: dict[str, dict[str, Tensor]] = {"recall": {}, "rank": {}, "merge": {}}
    for direction, scores, heads in (
        ("text_to_image", forward, logits),
        ("image_to_text", backward, logits.t()),
    ):
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
        tables["recall"][direction] = scores
        tables["rank"][direction] = heads.masked_fill(~seen, -100.0)
        tables["merge"][direction] = (heads + scores).masked_fill(~seen, -100.0)
    return tables
