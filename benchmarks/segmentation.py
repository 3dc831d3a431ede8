"""Time of cutting texts into bags, against the walks of others over the same ids.

python benchmarks/segmentation.py --dictionary FILE --vocabulary vocab.txt [--out result.json]

Parity comes first: every text's bags must equal those of each rival's own matches; where one
differs the program stops with 1. A rival whose package is missing is reported as skipped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from provenance import provenance
from segmentation_rivals import available
from transformers import BertTokenizer

from bagformer.bags import BagSegmenter
from bagformer.dictionary import encode_dictionary

TOKENS = 25
CLS = 101


def read_entities(path: Path, tokenizer) -> list[tuple[int, ...]]:
    entities = []
    for ids, lengths in encode_dictionary(
        path, tokenizer, drop_unknown=True, on_error="raise", counts={}
    ):
        flat = iter(ids.tolist())
        entities += [tuple(next(flat) for _ in range(length)) for length in lengths]
    return list(dict.fromkeys(entities))


def make_texts(entities: list[tuple[int, ...]], n_texts: int, n_content: range) -> torch.Tensor:
    """[CLS], entities and loose tokens, [PAD]. Every entity is equally likely: hard on caches."""
    make = random.Random(0)
    rows = []
    for _ in range(n_texts):
        content, length = [], make.choice(n_content)
        while len(content) < length:
            entity = make.choice(entities)
            content += entity if make.random() < 0.5 else entity[:1]
        rows.append([CLS, *content[:length], *[0] * (TOKENS - 1 - length)])
    return torch.tensor(rows, dtype=torch.int64)


def seconds(work, clock=time.thread_time) -> float:
    """CPU time of this thread, which other processes of a shared machine disturb least."""
    begin = clock()
    work()
    return clock() - begin


def summary(values: list[float], n_texts: int) -> dict[str, float]:
    return {
        "us_per_text": round(median(values) / n_texts * 1e6, 4),
        "fastest": round(min(values) / n_texts * 1e6, 4),
        "slowest": round(max(values) / n_texts * 1e6, 4),
    }


def interleaved(works: dict, repeats: int, clock=time.thread_time) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            work()  # what the other one pushed out of the caches comes back untimed
            times[name].append(seconds(work, clock))
    return times


def measure(segmenter, rivals: dict, texts: torch.Tensor, repeats: int) -> dict:
    rows = texts.tolist()
    bags = segmenter(texts, n_threads=1)
    ours = [
        offsets[:count]
        for offsets, count in zip(bags.offsets.tolist(), bags.counts.tolist(), strict=True)
    ]
    works = {"bagformer": lambda: segmenter(texts, n_threads=1)}
    for name, rival in rivals.items():
        given = [rival.prepare(row) for row in rows]
        for row, form, starts in zip(rows, given, ours, strict=True):
            if starts != rival.starts(form):
                sys.exit(f"bags differ from those of {name} for {row}")
        works[name] = partial(rival.walk, given)
    times = interleaved(works, repeats)
    return {name: summary(values, len(rows)) for name, values in times.items()}


def measure_threads(segmenter, texts: torch.Tensor, repeats: int) -> dict:
    """Wall time of one thread against two, of ten times as many rows as elsewhere: a thread that
    loses its core for a moment then matters less."""
    texts = texts.repeat(10, 1)
    works = {str(n): partial(segmenter, texts, n_threads=n) for n in (1, 2)}
    times = interleaved(works, repeats, time.perf_counter)
    rounds = zip(times["1"], times["2"], strict=True)
    return {
        "texts": len(texts),
        **{name: summary(values, len(texts)) for name, values in times.items()},
        "speedup": round(median(one / two for one, two in rounds), 3),
    }


def measure_builds(entities, rivals: list) -> dict[str, float]:
    works = {"bagformer": partial(BagSegmenter, entities)}
    works |= {rival.package: partial(rival, entities) for rival in rivals}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: round(median(values), 3) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dictionary", type=Path, required=True)
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = BertTokenizer(str(args.vocabulary), do_lower_case=False)
    entities = read_entities(args.dictionary, tokenizer)

    usable, skipped = available(entities)
    builds = measure_builds(entities, usable)
    segmenter = BagSegmenter(entities)
    rivals = {rival.package: rival(entities) for rival in usable}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entities.bags"
        segmenter.save(path)
        file_bytes = path.stat().st_size
        reopen = median(
            seconds(lambda: BagSegmenter.load(path), time.perf_counter) for _ in range(9)
        )
        mapped = BagSegmenter.load(path)
        full = make_texts(entities, args.texts, range(24, 25))
        short = make_texts(entities, args.texts, range(4, 13))
        result = {
            **provenance(1, "transformers", *rivals),
            "entities": len(entities),
            "texts": args.texts,
            "tokens": TOKENS,
            "repeats": args.repeats,
            "skipped": skipped,
            "build_s": builds,
            "file_bytes": file_bytes,
            "reopen_ms": round(reopen * 1e3, 2),
            "full_texts": measure(mapped, rivals, full, args.repeats),
            "short_texts": measure(mapped, rivals, short, args.repeats),
            "threads": measure_threads(mapped, full, args.repeats),
        }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
