"""MaxSim on the CPU against einsum and against the bare matrix product.

    python benchmarks/maxsim_cpu.py [--texts 64 --images 64 --bags 25 --patches 257 --depth 256]
        [--threads 1] [--rounds 7] [--out FILE]

Parity comes first: if a result is wrong, nothing is timed and the exit status is 1. The variants
then run in turn within each round, so that a busy machine slows all of them; compare the ratios.
The product alone computes no maxima: it is the ceiling that a library sets, not a rival.
Prints one JSON object. Peak memory is what one call adds to the resident set of a fresh process; it
is read from /proc, hence on Linux alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance
from torch import Tensor

from bagformer import explain_backend, maxsim, reference


def einsum_scores(text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    similarity = torch.einsum("tnd,ipd->tinp", text, image)
    return similarity.amax(3).sum(2), similarity.amax(2).sum(2).t()


def our_scores(text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    scores = maxsim(text, image)
    return scores.text_to_image, scores.image_to_text


def product(text: Tensor, image: Tensor) -> Tensor:
    return text.flatten(0, 1) @ image.flatten(0, 1).t()


def with_backward(function: Callable) -> Callable:
    def step(text: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        leaves = text.detach().requires_grad_(), image.detach().requires_grad_()
        scores = function(*leaves)
        return torch.autograd.grad(scores[0].sum() + scores[1].sum(), leaves)

    return step


def calls(dtype: torch.dtype) -> dict[str, Callable]:
    made: dict[str, Callable] = {"ours": our_scores, "einsum": einsum_scores, "product": product}
    made["ours_backward"] = with_backward(our_scores)
    made["einsum_backward"] = with_backward(einsum_scores)
    return made


def inputs(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    text = torch.randn(args.texts, args.bags, args.depth)
    image = torch.randn(args.images, args.patches, args.depth)
    unit = torch.nn.functional.normalize
    return unit(text, dim=-1).to(dtype), unit(image, dim=-1).to(dtype)


def parity(text: Tensor, image: Tensor) -> dict[str, float]:
    """Largest error of scores and gradients against float64, relative to the largest value."""
    few = text[:8], image[:8]
    wide = few[0].double(), few[1].double()
    truth = [*reference.maxsim(*wide)[:2], *with_backward(einsum_scores)(*wide)]
    found = [*our_scores(*few), *with_backward(our_scores)(*few)]
    names = ("text_to_image", "image_to_text", "grad_text", "grad_image")
    return {
        name: ((mine.double() - true).abs().max() / true.abs().max()).item()
        for name, mine, true in zip(names, found, truth, strict=True)
    }


def timings(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    text, image = inputs(args, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in calls(dtype)}
    for round_ in range(args.rounds + 1):
        for name, call in calls(dtype).items():
            start = time.perf_counter()
            call(text, image)
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    flops = 2.0 * args.texts * args.images * args.bags * args.patches * args.depth
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(times), 2),
            "best_ms": round(1e3 * min(times), 2),
            "forward_gflops": round(flops / statistics.median(times) / 1e9, 1),
            "over_ours": round(
                statistics.median(times)
                / statistics.median(seconds["ours_backward" if "back" in name else "ours"]),
                2,
            ),
        }
        for name, times in seconds.items()
    }


def high_water_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def peak_of_one_call(args: argparse.Namespace, dtype: torch.dtype, name: str) -> None:
    text, image = inputs(args, dtype)
    call = calls(dtype)[name]
    call(text[:1], image[:1])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = high_water_kb()
    call(text, image)
    print((high_water_kb() - before) / 1024)


def peaks(argv: list[str], dtype: str) -> dict[str, float]:
    found = {}
    for name in calls(torch.float32):
        command = [sys.executable, __file__, *argv, "--dtype", dtype, "--peak-of", name]
        found[name] = round(float(subprocess.check_output(command)), 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="MaxSim on the CPU")
    for name, default in (
        ("texts", 64),
        ("images", 64),
        ("bags", 25),
        ("patches", 257),
        ("depth", 256),
        ("threads", 1),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = args.dtype or ["float32", "bfloat16"]
    if args.peak_of:
        peak_of_one_call(args, getattr(torch, dtypes[-1]), args.peak_of)
        return 0

    report = {
        **provenance(args.threads),
        "shape": {key: vars(args)[key] for key in ("texts", "images", "bags", "patches", "depth")},
        "backend": explain_backend("maxsim", torch.ones(1)),
        "results": {},
    }
    for name in dtypes:
        dtype = getattr(torch, name)
        errors = parity(*inputs(args, dtype))
        limit = 2e-5 if dtype == torch.float32 else 2e-2
        if max(errors.values()) > limit:
            print(json.dumps({"wrong": name, "errors": errors}))
            return 1
        report["results"][name] = {
            "errors": errors,
            "times": timings(args, dtype),
            "peak_extra_mb": peaks(sys.argv[1:], name) if sys.platform == "linux" else None,
        }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
