"""Time of cutting texts into bags, against a walk by pyahocorasick over the same ids.

python benchmarks/segmentation.py --dictionary FILE --vocabulary vocab.txt [--out result.json]

Parity comes first: every text's bags must equal the choice from all occurrences that pyahocorasick
finds; the program stops with 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import ahocorasick
import torch
from provenance import provenance
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


def starts_by_pyahocorasick(automaton, row: tuple[int, ...]) -> list[int]:
    spans = [(end + 1 - length, end + 1) for end, length in automaton.iter(row)]
    inside, free_from = set(), 0
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= free_from:
            inside.update(range(start + 1, end))
            free_from = end
    return [token for token in range(len(row)) if token not in inside]


def seconds(work, clock=time.thread_time) -> float:
    """CPU time of this thread, which other processes of a shared machine disturb least."""
    begin = clock()
    work()
    return clock() - begin


def measure(segmenter, automaton, texts: torch.Tensor, repeats: int) -> dict:
    rows = [tuple(row) for row in texts.tolist()]
    bags = segmenter(texts, n_threads=1)
    for row, offsets, count in zip(rows, bags.offsets.tolist(), bags.counts.tolist(), strict=True):
        if offsets[:count] != starts_by_pyahocorasick(automaton, row):
            sys.exit(f"bags differ from pyahocorasick's for {row}")

    def walk() -> None:
        for row in rows:
            for _ in automaton.iter_long(row):
                pass

    works = {"bagformer": lambda: segmenter(texts, n_threads=1), "pyahocorasick": walk}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            work()  # what the other one pushed out of the caches comes back untimed
            times[name].append(seconds(work))
    return {
        name: {
            "us_per_text": round(median(values) / len(rows) * 1e6, 4),
            "fastest": round(min(values) / len(rows) * 1e6, 4),
            "slowest": round(max(values) / len(rows) * 1e6, 4),
        }
        for name, values in times.items()
    }


def build_automaton(entities):
    automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS, ahocorasick.KEY_SEQUENCE)
    for entity in entities:
        automaton.add_word(entity, len(entity))
    automaton.make_automaton()
    return automaton


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

    builds = {"bagformer": [], "pyahocorasick": []}
    for _ in range(3):
        builds["bagformer"].append(seconds(lambda: BagSegmenter(entities)))
        builds["pyahocorasick"].append(seconds(lambda: build_automaton(entities)))
    segmenter, automaton = BagSegmenter(entities), build_automaton(entities)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entities.bags"
        segmenter.save(path)
        file_bytes = path.stat().st_size
        reopen = median(
            seconds(lambda: BagSegmenter.load(path), time.perf_counter) for _ in range(9)
        )
        mapped = BagSegmenter.load(path)
        result = {
            **provenance(1, "pyahocorasick", "transformers"),
            "entities": len(entities),
            "texts": args.texts,
            "tokens": TOKENS,
            "repeats": args.repeats,
            "build_s": {name: round(median(values), 3) for name, values in builds.items()},
            "file_bytes": file_bytes,
            "reopen_ms": round(reopen * 1e3, 2),
            "full_texts": measure(
                mapped, automaton, make_texts(entities, args.texts, range(24, 25)), args.repeats
            ),
            "short_texts": measure(
                mapped, automaton, make_texts(entities, args.texts, range(4, 13)), args.repeats
            ),
        }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
