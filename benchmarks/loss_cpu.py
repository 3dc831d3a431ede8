"""One step of the contrastive loss on the CPU against autograd through einsum.

    python benchmarks/loss_cpu.py [--batch 256 --bags 25 --patches 257 --depth 256] [--threads 1]
        [--rounds 3] [--large 2048] [--out FILE]

A step is the loss of both directions and the gradients of texts and images. Parity comes first: if
the loss or a gradient is wrong, nothing is timed and the exit status is 1. The variants then run in
turn, each step in a process of its own, so that a busy machine slows all of them; compare the
ratios. Peak memory is what the step adds to the resident set above the inputs, read from /proc,
hence on Linux alone. ``--large`` runs our step once at that batch too, and says what the process
took in all, inputs and library included; ``--rounds 0`` runs nothing else. Prints one JSON object.
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
import torch.nn.functional as F
from provenance import provenance
from torch import Tensor

from bagformer import BagwiseContrastiveLoss, explain_backend

TEMPERATURE = 0.5
DTYPES = ("float32", "bfloat16")


def eager_loss(text: Tensor, image: Tensor) -> Tensor:
    similarity = torch.einsum("tnd,ipd->tinp", text, image)
    target = torch.arange(len(text))
    wide = torch.float64 if text.dtype == torch.float64 else torch.float32
    scores = similarity.amax(3).to(wide).sum(2), similarity.amax(2).to(wide).sum(2).t()
    return sum(F.cross_entropy(one / TEMPERATURE, target) for one in scores) / 2


def our_loss(text: Tensor, image: Tensor) -> Tensor:
    return BagwiseContrastiveLoss(temperature=TEMPERATURE)(text, image)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": our_loss, "eager": eager_loss}


def inputs(args: argparse.Namespace, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    made = []
    for tokens in (args.bags, args.patches):
        side = torch.randn(batch, tokens, args.depth)
        side /= side.norm(dim=-1, keepdim=True)
        made.append(side.to(dtype).requires_grad_())
    return made[0], made[1]


def step(loss: Callable, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(text, image)
    return (value.detach(), *torch.autograd.grad(value, (text, image)))


def parity(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Error of loss and gradients against float64, relative to the largest value."""
    sides = inputs(args, 12, dtype)
    truth = step(eager_loss, *(side.detach().double().requires_grad_() for side in sides))
    found = step(our_loss, *sides)
    return {
        name: ((mine.double() - true).abs().max() / true.abs().max()).item()
        for name, mine, true in zip(("loss", "grad_text", "grad_image"), found, truth, strict=True)
    }


def status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def one_step(args: argparse.Namespace, batch: int, dtype: torch.dtype, name: str) -> None:
    """In a child: prints seconds, the peak above the inputs and the peak in all."""
    text, image = inputs(args, batch, dtype)
    few = (side[:2].detach().requires_grad_() for side in (text, image))
    step(LOSSES[name], *few)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports and the inputs
    before = status_mb("VmHWM")
    start = time.perf_counter()
    step(LOSSES[name], text, image)
    seconds = time.perf_counter() - start
    peak = status_mb("VmHWM")
    print(json.dumps({"seconds": seconds, "extra_mb": peak - before, "total_mb": peak}))


def in_child(argv: list[str], batch: int, dtype: str, name: str) -> dict[str, float]:
    child = [sys.executable, __file__, *argv, "--child", name, "--batch", str(batch)]
    return json.loads(subprocess.check_output([*child, "--dtype", dtype]))


def measure(args: argparse.Namespace, argv: list[str], dtype: str) -> dict:
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    for _ in range(args.rounds):
        for name in LOSSES:
            runs[name].append(in_child(argv, args.batch, dtype, name))
    found: dict = {
        name: {
            "median_s": round(statistics.median(run["seconds"] for run in done), 3),
            "seconds": [round(run["seconds"], 3) for run in done],
            "peak_extra_mb": round(max(run["extra_mb"] for run in done), 1),
        }
        for name, done in runs.items()
    }
    ours, eager = found["ours"], found["eager"]
    ratios = [
        other["seconds"] / mine["seconds"]
        for mine, other in zip(runs["ours"], runs["eager"], strict=True)
    ]
    found["times_as_fast"] = round(statistics.median(ratios), 2)
    found["share_of_eager_peak"] = round(ours["peak_extra_mb"] / eager["peak_extra_mb"], 4)
    return found


def write(report: dict, out: str | None) -> None:
    if out:
        Path(out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="the contrastive loss on the CPU")
    for name, default in (
        ("batch", 256),
        ("bags", 25),
        ("patches", 257),
        ("depth", 256),
        ("threads", 1),
        ("rounds", 3),
        ("large", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = args.dtype or list(DTYPES)
    if args.child:
        one_step(args, args.batch, getattr(torch, dtypes[-1]), args.child)
        return 0
    if sys.platform != "linux":
        sys.exit("loss_cpu.py reads peaks from /proc: it runs on Linux alone")

    report = {
        **provenance(args.threads),
        "shape": {key: vars(args)[key] for key in ("batch", "bags", "patches", "depth")},
        "backend": explain_backend("maxsim", torch.ones(1)),
        "results": {},
    }
    for name in dtypes:
        errors = parity(args, getattr(torch, name))
        if max(errors.values()) > (2e-5 if name == "float32" else 2e-2):
            print(json.dumps({"wrong": name, "errors": errors}))
            return 1
        timed = measure(args, sys.argv[1:], name) if args.rounds else {}
        report["results"][name] = {"errors": errors, **timed}
    write(report, args.out)
    if args.large:
        run = in_child(sys.argv[1:], args.large, dtypes[0], "ours")
        rounded = {key: round(value, 1) for key, value in run.items()}
        report["large"] = {"batch": args.large, "dtype": dtypes[0], **rounded}
        write(report, args.out)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
