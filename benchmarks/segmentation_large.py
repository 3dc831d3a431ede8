"""A dictionary of ten million entities: time and memory of building it, time of opening its file.

    python benchmarks/segmentation_large.py --out benchmarks/results/segmentation_large.json

Entities are two to six tokens long, drawn from 20,000 tokens whose frequency falls with their rank,
as in words, or is even, the worst case for a trie's rows. Each dictionary is built in a process of
its own, from a stream of token ids, so that the peak is that of one build, Python and torch
included. Opening is timed with the file in the system's cache, and after it was dropped from there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from bagformer import BagSegmenter

TOKENS, CHUNK = 20_000, 250_000


def entities(kind: str, count: int) -> Iterator[list[int]]:
    """The same stream each time."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, TOKENS + 1) ** (-0.8 if kind == "words" else 0.0)
    bounds = np.cumsum(weights / weights.sum())
    for first in range(0, count, CHUNK):
        lengths = rng.integers(2, 7, size=min(CHUNK, count - first))
        ids = (np.searchsorted(bounds, rng.random(int(lengths.sum()))) + 1).tolist()
        at = 0
        for length in lengths.tolist():
            yield ids[at : at + length]
            at += length


def opening(path: str) -> float:
    started = time.perf_counter()
    BagSegmenter.load(path)
    return time.perf_counter() - started


def forget(path: str) -> None:
    """Drop the file, which nothing maps, from the system's cache; the disk's own cache stays."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(kind: str, count: int) -> dict[str, Any]:
    """In this process. The time of making up the entities is taken off."""
    started = time.perf_counter()
    for _ in entities(kind, count):
        pass
    stream = time.perf_counter() - started
    started = time.perf_counter()
    segmenter = BagSegmenter(entities(kind, count))
    build = time.perf_counter() - started - stream
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "large.bags")
        segmenter.save(path)
        warm, cold = [], []
        for _ in range(3):
            warm.append(opening(path))
            forget(path)
            cold.append(opening(path))
        again = BagSegmenter.load(path)
        if again.sha256 != segmenter.sha256:
            sys.exit("the file that was opened is not the one that was saved")
        size = os.path.getsize(path)
    return {
        "entities": len(segmenter),
        "build_s": round(build, 1),
        "peak_bytes": peak,
        "file_bytes": size,
        "reopen_s": round(sorted(warm)[1], 2),
        "reopen_cold_s": round(sorted(cold)[1], 2) if hasattr(os, "posix_fadvise") else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=("words", "even"), help="measure one, in this process")
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind, arguments.count)))
        return
    result: dict[str, Any] = {**provenance(1), "drawn": arguments.count}
    for kind in ("words", "even"):
        command = [sys.executable, __file__, "--kind", kind, "--count", str(arguments.count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result[kind] = json.loads(done.stdout)
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
