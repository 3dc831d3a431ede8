"""Would an int8 screen pay, with exact arithmetic only where a proved bound demands it?

    python benchmarks/screen.py [--icons FOLDER] [--rounds 9] [--out FILE]

With t = t8 + r and v = v8 + q (what int8 holds and what it lost), a similarity of the exact kernel
lies within |r||v8| + |t||q| of that of int8, plus what both round. Two questions, on features of
the shipped model and on random unit vectors:

- images: what share cannot enter the k best by that bound? ``tight`` bounds each similarity, in a
  kernel that does not exist; ``cheap`` bounds a whole picture from its int8 score and two numbers.
  ``maxsim_topk_screened`` uses the cheap one; it runs against ``maxsim_topk``, whose answer it must
  give.
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
from typing import Any

import torch
from provenance import provenance
from torch import Tensor
from torch.nn.functional import normalize, pad

from bagformer import (
    BagFormerForRetrieval,
    BagFormerProcessor,
    ScreenedImages,
    maxsim_quantized,
    maxsim_topk,
    maxsim_topk_screened,
    quantize_features,
    screen_images,
)
from bagformer.assets import sample_path, tiny_model_path
from bagformer.data.muge import MugeImages, read_queries
from bagformer.ops.maxsim_screen import bounds, store
from bagformer.retrieval.encode import encode_images, encode_texts

KS = (1, 10, 100)
ROWS, LANES = 13, 32  # of a tile of the AVX-512 kernels
TEXTS = 64  # studied of each set


def pair_bounds(text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(exact, int8, bound)`` similarities ``[Ni, N, P]`` of a text ``[1, N, D]``, checked."""
    (stored_text, t), (stored_image, v) = store(text, None), store(image, None)
    exact = text.double() @ image.double().transpose(-1, -2)
    sums = stored_text.values.double() @ stored_image.values.double().transpose(-1, -2)
    scales = stored_text.scales.double()[..., None] * stored_image.scales.double()[:, None]
    int8 = sums * scales
    bound = t.lost[..., None] * v.kept[:, None] + t.own[..., None] * v.lost[:, None]
    # of a float32 chain along D, and of three more roundings
    steps = (text.shape[-1] + 4) * 2.0**-23
    size = t.own[..., None] * v.own[:, None] + t.kept[..., None] * v.kept[:, None]
    bound = bound + steps * size
    if not ((exact - int8).abs() <= bound).all():
        raise AssertionError("a similarity lies outside its bound")
    return exact, int8, bound


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


def shares(texts: list[Tensor], screened: ScreenedImages) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for text in texts:
        exact, int8, bound = pair_bounds(text, screened.image)
        scores, guess = exact.amax(-1).sum(-1), int8.amax(-1).sum(-1)
        norms = store(text, None)[1]
        reach = {
            "tight": (int8 + bound).amax(-1).sum(-1),
            "cheap": guess + bounds(norms, screened.limits, text.shape[-1], None)[0],
        }
        for k in KS:
            kth = scores.topk(k).values[-1]
            for name, high in reach.items():
                share = (high < kth).double().mean().item()
                found.setdefault(f"images skipped, {name}, k={k}", []).append(share)
        rows, both = skipped_tiles(int8, bound)
        for name, value in {
            "tight bound over spread of scores": (reach["tight"] - guess).mean() / scores.std(),
            "true error over spread of scores": (guess - scores).std() / scores.std(),
            "tiles skipped, rows alone": rows,
            "tiles skipped, rows and columns": both,
        }.items():
            found.setdefault(name, []).append(float(value))
    return {name: float(f"{statistics.mean(values):.4g}") for name, values in found.items()}


def timings(texts: list[Tensor], screened: ScreenedImages, rounds: int) -> dict[str, Any]:
    """Milliseconds a text, in turn within each round; medians over texts and rounds."""
    image, narrow = screened.image, screened.image.bfloat16()
    calls: dict[str, Callable[[Tensor], Any]] = {
        "int8 scores alone": lambda text: maxsim_quantized(
            quantize_features(text), screened.int8, directions="text_to_image"
        )
    }
    for k in KS:
        calls[f"float32, k={k}"] = lambda text, k=k: maxsim_topk(text, image, k)
        calls[f"bfloat16, k={k}"] = lambda text, k=k: maxsim_topk(text.bfloat16(), narrow, k)
        calls[f"screened, k={k}"] = lambda text, k=k: maxsim_topk_screened(text, screened, k)
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
            median[f"{dtype}, k={k}"] / median[f"screened, k={k}"], 2
        )
        for dtype in ("float32", "bfloat16")
        for k in KS
    }
    return {"ms": {name: round(1e3 * value, 3) for name, value in median.items()}, **gains}


def study(texts: list[Tensor], images: Tensor, rounds: int) -> dict[str, Any]:
    """``texts``: the bags that count of each, ``[1, N, D]``."""
    screened = screen_images(images)
    for text in texts:
        for k in KS:
            ours, want = maxsim_topk_screened(text, screened, k), maxsim_topk(text, images, k)
            if not all(map(torch.equal, ours, want)):
                raise AssertionError("the screened answer is not that of maxsim_topk")
    bags = statistics.mean(text.shape[1] for text in texts)
    return {
        "shape": {"texts": len(texts), "bags": round(bags, 1), "pictures": list(images.shape)},
        "shares": shares(texts, screened),
        "times": timings(texts, screened, rounds),
    }


def encoded(queries: Path, *pictures: Path) -> tuple[list[Tensor], Tensor]:
    model = BagFormerForRetrieval.from_pretrained(tiny_model_path()).eval()
    processor = BagFormerProcessor.from_pretrained(tiny_model_path())
    asked, files = list(read_queries(queries)), [MugeImages(path) for path in pictures]
    step = max(1, len(asked) // TEXTS)
    texts = encode_texts(model, processor, [query.text for query in asked[::step][:TEXTS]])
    listed = (file[key] for file in files for key in file)
    images = encode_images(model, processor, listed).features
    return [row[keep][None] for row, keep in zip(texts.features, texts.mask, strict=True)], images


def main() -> None:
    parser = argparse.ArgumentParser(description="An int8 screen before exact scores")
    parser.add_argument(
        "--icons", type=Path, help="the whole IconPark set, 2,000 and 7,974 pictures"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sample = sample_path()
    sets = {"sample": encoded(sample / "queries.jsonl", sample / "imgs.tsv")}
    if args.icons:
        valid, train = (args.icons / f"MR_{split}_imgs.tsv" for split in ("valid", "train"))
        queries = args.icons / "MR_valid_queries.jsonl"
        sets["IconPark"] = encoded(queries, valid)
        sets["IconPark, train too"] = encoded(queries, valid, train)
    random = normalize(torch.randn(TEXTS // 4, 25, 256), dim=-1)
    sets["random"] = list(random[:, None]), normalize(torch.randn(500, 257, 256), dim=-1)
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
