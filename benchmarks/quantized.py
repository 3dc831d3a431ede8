"""Features stored in eight bits: what the ranking loses, what a picture weighs, what scoring costs.

    python benchmarks/quantized.py [--rounds 9] [--threads 1] [--out FILE]

Accuracy against float32 on the shipped model and sample, and on random unit features, where scores
lie as close together as they ever do. Times are taken in turn within each round, so that a busy
machine slows all forms alike; compare the ratios. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor
from torch.nn.functional import normalize

from bagformer import (
    BagFormerForRetrieval,
    BagFormerProcessor,
    explain_backend,
    maxsim,
    maxsim_quantized,
    quantize_features,
)
from bagformer.assets import sample_path, tiny_model_path
from bagformer.data.muge import MugeImages, read_queries
from bagformer.retrieval.encode import encode_images, encode_texts
from bagformer.retrieval.metrics import first_relevant_ranks, recall_at

DIRECTIONS = ("text_to_image", "image_to_text")
# texts, bags, pictures, patches, features; K: candidates of each text
SHAPES = {
    "all pairs": ((64, 25, 64, 257, 256), False),
    "one text with many pictures": ((1, 25, 512, 257, 256), False),
    "candidates": ((8, 25, 64, 257, 256), True),
}


def forms(text: Tensor, image: Tensor) -> dict[str, tuple[int, Callable[..., Any]]]:
    """Bytes of the stored images and the call that scores them, by form."""
    narrow = text.bfloat16(), image.bfloat16()
    int8, fp8 = quantize_features(image), quantize_features(image, "fp8_e4m3")
    stored = quantize_features(text)
    return {
        "float32": (image.nbytes, lambda **o: maxsim(text, image, **o)),
        "bfloat16": (narrow[1].nbytes, lambda **o: maxsim(*narrow, **o)),
        "int8, float32 text": (int8.nbytes, lambda **o: maxsim_quantized(text, int8, **o)),
        "int8, bfloat16 text": (int8.nbytes, lambda **o: maxsim_quantized(narrow[0], int8, **o)),
        "int8, int8 text": (int8.nbytes, lambda **o: maxsim_quantized(stored, int8, **o)),
        "fp8, float32 text": (fp8.nbytes, lambda **o: maxsim_quantized(text, fp8, **o)),
        "fp8, bfloat16 text": (fp8.nbytes, lambda **o: maxsim_quantized(narrow[0], fp8, **o)),
    }


def _overlap(scores: Tensor, truth: Tensor, k: int = 10) -> float:
    """Mean share of a row's true ``k`` best that are among its own ``k`` best."""
    mine, true = scores.topk(k, dim=1).indices, truth.topk(k, dim=1).indices
    return (mine[:, :, None] == true[:, None, :]).any(-1).double().mean().item()


def accuracy(text: Tensor, image: Tensor, relevant: Any = None, **options: Any) -> dict[str, Any]:
    """Errors of each form against float32; ``spread``: the mean deviation of a row's scores."""
    truth = maxsim(text, image, **options)
    found: dict[str, Any] = {}
    for name, (size, score) in forms(text, image).items():
        scores = score(**options)
        found[name] = {"bytes_per_picture": size // len(image)}
        for way in DIRECTIONS:
            mine, true = getattr(scores, way), getattr(truth, way)
            found[name][way] = {
                "top10_overlap": round(_overlap(mine, true), 4),
                "error_over_spread": float(f"{((mine - true).std() / true.std(1).mean()):.3g}"),
                "largest_relative_error": float(
                    f"{(mine - true).abs().max() / true.abs().max():.3g}"
                ),
            }
        if relevant is not None:
            ranks = first_relevant_ranks(scores.text_to_image, relevant)
            found[name]["recall"] = {key: round(v, 2) for key, v in recall_at(ranks).items()}
    return found


def sample_accuracy() -> dict[str, Any]:
    model = BagFormerForRetrieval.from_pretrained(tiny_model_path()).eval()
    processor = BagFormerProcessor.from_pretrained(tiny_model_path())
    pictures = MugeImages(sample_path() / "imgs.tsv")
    queries = read_queries(sample_path() / "queries.jsonl")
    texts = encode_texts(model, processor, [query.text for query in queries])
    images = encode_images(model, processor, (pictures[key] for key in pictures))
    place = {key: index for index, key in enumerate(pictures)}
    relevant = [[place[key] for key in query.item_ids] for query in queries]
    options = {"text_mask": texts.mask, **model.config.scoring}
    found = accuracy(texts.features, images.features, relevant, **options)
    shape = {
        "texts": len(queries),
        "pictures": len(pictures),
        "features": images.features.shape[-1],
    }
    return {"shape": {**shape, "patches": images.features.shape[-2]}, "forms": found}


def random_accuracy() -> dict[str, Any]:
    torch.manual_seed(0)
    text = normalize(torch.randn(64, 25, 256), dim=-1)
    image = normalize(torch.randn(500, 257, 256), dim=-1)
    shape = {"texts": 64, "pictures": 500, "bags": 25, "patches": 257, "features": 256}
    return {"shape": shape, "forms": accuracy(text, image)}


def timings(shape: tuple[int, ...], candidates: bool, rounds: int) -> dict[str, Any]:
    n_texts, n_bags, n_images, n_patches, width = shape
    torch.manual_seed(0)
    text = normalize(torch.randn(n_texts, n_bags, width), dim=-1)
    lead = (n_texts, n_images) if candidates else (n_images,)
    image = normalize(torch.randn(*lead, n_patches, width), dim=-1)
    made = forms(text, image)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(rounds + 1):
        for name, (_, score) in made.items():
            start = time.perf_counter()
            score()
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "median_ms": round(1e3 * value, 2),
            "speed_over_float32": round(median["float32"] / value, 2),
            "speed_over_bfloat16": round(median["bfloat16"] / value, 2),
        }
        for name, value in median.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Images stored in eight bits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {
        **provenance(args.threads),
        "backend": explain_backend("maxsim_quantized", torch.ones(1)),
        "sample": sample_accuracy(),
        "random": random_accuracy(),
        "times": {
            name: {"shape": shape, "forms": timings(shape, candidates, args.rounds)}
            for name, (shape, candidates) in SHAPES.items()
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
