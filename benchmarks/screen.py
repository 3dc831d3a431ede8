"""Would an int8 screen pay, with exact arithmetic only where a proved bound demands it?

    python benchmarks/screen.py [--icons FOLDER] [--rounds 9] [--out FILE]

With t = t8 + r and v = v8 + q (what int8 holds and what it lost), a similarity of the exact kernel
lies within |r||v8| + |t||q| of that of int8, plus what both round. Two questions, on features of the
shipped model and on random unit vectors:

- images: what share cannot enter the k best by that bound? ``tight`` bounds each similarity, in a
  kernel that does not exist; ``cheap`` bounds a whole picture from its int8 score and two numbers.
  Then ``screened_topk`` runs for real with the cheap one, against ``maxsim_topk``, whose answer it
  must give.
- tiles: what share of 13 x 32 tiles can hold no maximum of a row (or of a row or column)?

``--icons`` is a folder that ``bagformer.data.iconpark.build`` wrote. Every bound is checked against
the exact similarities; one violated is an error. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from provenance import provenance
from torch import Tensor
from torch.nn.functional import normalize, pad

from bagformer import (
    BagFormerForRetrieval,
    BagFormerProcessor,
    QuantizedFeatures,
    maxsim,
    maxsim_quantized,
    maxsim_topk,
    quantize_features,
)
from bagformer.assets import sample_path, tiny_model_path
from bagformer.data.muge import MugeImages, read_queries
from bagformer.retrieval.encode import encode_images, encode_texts

KS = (1, 10, 100)
ROWS, LANES = 13, 32  # of a tile of the AVX-512 kernels
TEXTS = 64  # studied of each set
ULP = 2.0**-24


class Stored(NamedTuple):
    """Features, what int8 keeps of them, and norms: of both and of the difference, ``[..., L]``."""

    features: Tensor
    int8: QuantizedFeatures
    norm: Tensor
    kept: Tensor
    lost: Tensor


def store(features: Tensor) -> Stored:
    int8 = quantize_features(features)
    wide, kept = features.double(), int8.dequantize(torch.float64)
    norms = [x.norm(dim=-1) for x in (wide, kept, wide - kept)]
    return Stored(features, int8, *norms)


def rounding(width: int) -> float:
    """Of |t||v|: the exact kernel's chain along D, and three roundings of the int8 similarity."""
    return (width + 4) * ULP / (1 - (width + 4) * ULP)


def pair_bounds(text: Stored, image: Stored) -> tuple[Tensor, Tensor, Tensor]:
    """``(exact, int8, bound)`` similarities ``[Ni, N, P]`` of one text ``[1, N, D]``, checked."""
    exact = text.features.double() @ image.features.double().transpose(-1, -2)
    sums = text.int8.values.double() @ image.int8.values.double().transpose(-1, -2)
    int8 = sums * (text.int8.scales.double()[..., None] * image.int8.scales.double()[:, None])
    bound = text.lost[..., None] * image.kept[:, None] + text.norm[..., None] * image.lost[:, None]
    bound = bound + rounding(text.features.shape[-1]) * (
        text.norm[..., None] * image.norm[:, None] + text.kept[..., None] * image.kept[:, None]
    )
    if not ((exact - int8).abs() <= bound).all():
        raise AssertionError("a similarity lies outside its bound")
    return exact, int8, bound


def cheap_bound(text: Stored, image: Stored) -> Tensor:
    """Of a score ``[Ni]``: a text's sums of norms with each picture's largest."""
    kept, lost, norm = (x.amax(dim=-1) for x in (image.kept, image.lost, image.norm))
    # sums over bags round too, of values of at most |t||v|
    slack = 2 * (rounding(text.features.shape[-1]) + text.norm.numel() * ULP)
    return text.lost.sum() * kept + text.norm.sum() * (lost + slack * torch.maximum(norm, kept))


def screened_topk(text: Stored, image: Stored, k: int) -> tuple[Tensor, Tensor, int]:
    """The answer of ``maxsim_topk`` for one text and how many pictures were scored exactly."""
    guess = _guess(text, image)
    best = guess.topk(k).indices
    exact = _exact(text, image, best)
    reach = guess.double() + cheap_bound(text, image)
    left = (reach >= exact.min().double()).nonzero()[:, 0]
    scores = _exact(text, image, left)
    order = scores.sort(descending=True, stable=True).indices[:k]
    return scores[order], left[order], len(left) + k


def _guess(text: Stored, image: Stored) -> Tensor:
    found = maxsim_quantized(text.int8, image.int8, directions="text_to_image").text_to_image
    assert found is not None
    return found[0]


def _exact(text: Stored, image: Stored, chosen: Tensor) -> Tensor:
    pictures = image.features[chosen]
    found = maxsim(text.features, pictures, directions="text_to_image").text_to_image
    assert found is not None
    return found[0]


def skipped_tiles(int8: Tensor, bound: Tensor) -> tuple[float, float]:
    """Shares of tiles that hold no row maximum, and neither a row's nor a column's."""
    high, low = int8 + bound, int8 - bound
    row = high >= low.amax(dim=-1, keepdim=True)
    both = row | (high >= low.amax(dim=-2, keepdim=True))
    shares = []
    for may_win in (row, both):
        whole = pad(may_win, (0, -may_win.shape[-1] % LANES, 0, -may_win.shape[-2] % ROWS))
        tiles = whole.unflatten(-1, (-1, LANES)).unflatten(-3, (-1, ROWS))
        shares.append(1 - tiles.any(dim=-1).any(dim=-2).double().mean().item())
    return shares[0], shares[1]


def shares(texts: list[Stored], image: Stored) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for text in texts:
        exact, int8, bound = pair_bounds(text, image)
        scores = exact.amax(-1).sum(-1)
        reach = {
            "tight": (int8 + bound).amax(-1).sum(-1),
            "cheap": int8.amax(-1).sum(-1) + cheap_bound(text, image),
        }
        for k in KS:
            kth = scores.topk(k).values[-1]
            for name, high in reach.items():
                share = (high < kth).double().mean().item()
                found.setdefault(f"images skipped, {name}, k={k}", []).append(share)
        spread = scores.std()
        found.setdefault("bound over spread of scores", []).append(
            ((reach["tight"] - int8.amax(-1).sum(-1)).mean() / spread).item()
        )
        error = (int8.amax(-1).sum(-1) - scores).std() / spread
        found.setdefault("true error over spread of scores", []).append(error.item())
        rows, both = skipped_tiles(int8, bound)
        found.setdefault("tiles skipped, rows alone", []).append(rows)
        found.setdefault("tiles skipped, rows and columns", []).append(both)
    return {name: float(f"{statistics.mean(values):.4g}") for name, values in found.items()}


def timings(texts: list[Stored], image: Stored, rounds: int) -> dict[str, Any]:
    """Milliseconds a text, in turn within each round; medians over texts and rounds."""
    narrow = image.features.bfloat16()
    calls: dict[str, Callable[[Stored], Any]] = {
        "int8 scores alone": lambda text: _guess(text, image),
    }
    for k in KS:
        calls[f"float32, k={k}"] = lambda t, k=k: maxsim_topk(t.features, image.features, k)
        calls[f"bfloat16, k={k}"] = lambda t, k=k: maxsim_topk(t.features.bfloat16(), narrow, k)
        calls[f"screened float32, k={k}"] = lambda t, k=k: screened_topk(t, image, k)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for text in texts[:8]:
            for name, call in calls.items():
                start = time.perf_counter()
                call(text)
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    gains = {
        f"screened over {dtype}, k={k}": round(
            median[f"{dtype}, k={k}"] / median[f"screened float32, k={k}"], 2
        )
        for dtype in ("float32", "bfloat16")
        for k in KS
    }
    return {"ms": {name: round(1e3 * value, 3) for name, value in median.items()}, **gains}


def study(texts: list[Tensor], images: Tensor, rounds: int) -> dict[str, Any]:
    """``texts``: the bags that count of each, ``[N, D]``."""
    stored, image = [store(text[None]) for text in texts], store(images)
    scored = []
    for text in stored:
        for k in KS:
            values, order, count = screened_topk(text, image, k)
            want = maxsim_topk(text.features, images, k)
            if not (torch.equal(values, want.scores[0]) and torch.equal(order, want.indices[0])):
                raise AssertionError("the screened answer is not that of maxsim_topk")
            if k == 10:
                scored.append(count / len(images))
    bags = statistics.mean(len(text) for text in texts)
    return {
        "shape": {"texts": len(texts), "bags": round(bags, 1), "pictures": list(images.shape)},
        "shares": shares(stored, image),
        "scored exactly, k=10": round(statistics.mean(scored), 4),
        "times": timings(stored, image, rounds),
    }


def encoded(pictures: Path, queries: Path) -> tuple[list[Tensor], Tensor]:
    model = BagFormerForRetrieval.from_pretrained(tiny_model_path()).eval()
    processor = BagFormerProcessor.from_pretrained(tiny_model_path())
    listed, asked = MugeImages(pictures), list(read_queries(queries))
    step = max(1, len(asked) // TEXTS)
    texts = encode_texts(model, processor, [query.text for query in asked[::step][:TEXTS]])
    images = encode_images(model, processor, (listed[key] for key in listed)).features
    return [row[keep] for row, keep in zip(texts.features, texts.mask, strict=True)], images


def main() -> None:
    parser = argparse.ArgumentParser(description="An int8 screen before exact scores")
    parser.add_argument("--icons", type=Path, help="the whole IconPark set, 2,000 pictures")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sample = sample_path()
    sets = {"sample": encoded(sample / "imgs.tsv", sample / "queries.jsonl")}
    if args.icons:
        files = args.icons / "MR_valid_imgs.tsv", args.icons / "MR_valid_queries.jsonl"
        sets["IconPark"] = encoded(*files)
    random = normalize(torch.randn(TEXTS // 4, 25, 256), dim=-1)
    sets["random"] = list(random), normalize(torch.randn(500, 257, 256), dim=-1)
    report = {
        **provenance(1),
        "sets": {name: study(*made, args.rounds) for name, made in sets.items()},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
