"""Time candidate tiles on the GPU at hand and print rows for kernels/fused/tiles.py.

    python benchmarks/tune_tiles.py [--shapes 1024x25x1024x257x256 ...] [--dtypes bfloat16 ...]
        [--kernels forward text image] [--argmax] [--dry-run]

A shape is texts x bags x images x patches x width. Each candidate is compiled, judged against
``bagformer.reference`` in float64, and timed only if it is right: the median of Triton's
``do_bench``, the fastest three once more in turn. What is printed has the form of the tables; a
person copies what is worth copying. Nothing is written, and nothing of this runs in the package.
``--dry-run`` walks tiny shapes without timing; with ``TRITON_INTERPRET=1`` it needs no GPU.
Exit status 1 if a candidate gave a wrong result.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from bagformer.kernels import gradients, scoring, tiles
from torch import Tensor

from bagformer import reference

DEFAULT_SHAPES = ("1024x25x1024x257x128", "1024x25x1024x257x256", "1024x8x1024x257x256")
TINY_SHAPES = ("3x5x2x9x24",)
DTYPES = ("bfloat16", "float16", "float32")
# of the largest true value: sums in float32; gradients round their factors to the features' dtype
TOLERANCES = {"forward": 1e-4, "text": 2e-2, "image": 2e-2}
FINALISTS, ROUNDS = 3, 5


@dataclass(frozen=True)
class Shape:
    texts: int
    bags: int
    images: int
    patches: int
    width: int

    @property
    def slot(self) -> int:
        return tiles.slot_of(self.bags)

    def cut(self) -> Shape:
        """Few enough for float64, more than one tile of texts."""
        return Shape(min(self.texts, 17), self.bags, min(self.images, 3), self.patches, self.width)


def parse_shape(text: str) -> Shape:
    parts = text.split("x")
    if len(parts) != 5 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"a shape is texts x bags x images x patches x width, such as 1024x25x1024x257x256; "
            f"got {text!r}"
        )
    shape = Shape(*map(int, parts))
    if shape.bags > tiles.LONGEST_PIECE:
        raise argparse.ArgumentTypeError(
            f"at most {tiles.LONGEST_PIECE} bags, the longest piece of a gradient; got {text!r}"
        )
    return shape


@dataclass(frozen=True)
class Operands:
    text: Tensor
    image: Tensor
    grads: tuple[Tensor, Tensor]
    winners: tuple[Tensor, Tensor]


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> Operands:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    text = normal(shape.texts, shape.bags, shape.width, dtype=dtype)
    image = normal(shape.images, shape.patches, shape.width, dtype=dtype)
    grads = normal(shape.texts, shape.images), normal(shape.images, shape.texts)
    _, _, text_argmax, image_argmax = scoring.maxsim_forward(text, image, want_argmax=True)
    return Operands(text, image, grads, (text_argmax, image_argmax))


def run_forward(given: Operands, argmax: bool) -> tuple[Tensor, ...]:
    return scoring.maxsim_forward(given.text, given.image, want_argmax=argmax)[:2]


def _run_backward(given: Operands, wants: tuple[bool, bool]) -> Tensor:
    found = gradients.maxsim_backward(
        *given.grads, given.text, given.image, None, None, *given.winners,
        wants_text=wants[0], wants_image=wants[1],
    )  # fmt: skip
    return found[0 if wants[0] else 1]


def run_kernel(kernel: str, given: Operands, argmax: bool) -> tuple[Tensor, ...]:
    if kernel == "forward":
        return run_forward(given, argmax)
    return (_run_backward(given, (kernel == "text", kernel == "image")),)


def truth_of(kernel: str, given: Operands) -> tuple[Tensor, ...]:
    leaves = [side.double().requires_grad_() for side in (given.text, given.image)]
    scores: Any = reference.maxsim(*leaves)
    if kernel == "forward":
        return scores[0].detach(), scores[1].detach()
    slopes = [grad.double() for grad in given.grads]
    found = torch.autograd.grad(scores[:2], leaves, slopes)
    return (found[0 if kernel == "text" else 1],)


def fault(kernel: str, given: Operands, truth: tuple[Tensor, ...], argmax: bool) -> str:
    """What is wrong with the kernel's result, or an empty string."""
    for ours, true in zip(run_kernel(kernel, given, argmax), truth, strict=True):
        error = ((ours.double() - true).abs().max() / true.abs().max()).item()
        if not error <= TOLERANCES[kernel]:
            return f"WRONG: error {error:.2g} of the largest value"
    return ""


def forward_candidates(shape: Shape, dtype: torch.dtype) -> Iterator[tiles.Tile]:
    head, tail = tiles.split_width(shape.width)
    steps = (16, 32) if dtype == torch.float32 else (0, 64)
    grid = itertools.product((32, 64, 128), (32, 64, 128), steps, (4, 8), (1, 2, 3))
    for block_p, block_n, step, warps, stages in grid:
        if block_n % shape.slot == 0:
            wide = (0, 0) if step else (head, tail)
            yield tiles.Tile(block_p, block_n, *wide, step, warps, stages)


def gradient_candidates(shape: Shape, dtype: torch.dtype) -> Iterator[tiles.GradientTile]:
    spans = (64, 128) if dtype == torch.float32 else (128, 256)
    rows = (16, 32, 64) if dtype == torch.float32 else (32, 64)
    capped = ((4, None), (8, None), (8, 128))
    for block_p, block_n, span, (warps, registers), stages in itertools.product(
        rows, (32, 64), spans, capped, (1, 2, 3)
    ):
        if block_n % shape.slot == 0:
            yield tiles.GradientTile(block_p, block_n, span, warps, stages, registers)


CHOOSERS = {
    "forward": "forward_tile", "text": "text_gradient_tile", "image": "image_gradient_tile"
}  # fmt: skip


@contextmanager
def using(kernel: str, tile: Any, width: int) -> Iterator[None]:
    """The launcher takes ``tile``, cut where a batch or the features are too few to fill it."""

    def choose(device: Any, dtype: Any, given_width: int, slot: int, n_texts: int, *_: Any) -> Any:
        most = max(tiles.SMALLEST_BLOCK, slot * triton.next_power_of_2(n_texts))
        cut = tile._replace(block_n=max(slot, min(tile.block_n, most)))
        if kernel != "forward":
            least = max(tiles.SMALLEST_BLOCK, triton.next_power_of_2(width))
            cut = cut._replace(span=min(tile.span, least))
        return cut

    with mock.patch.object(tiles, CHOOSERS[kernel], choose):
        yield


def row_of(kernel: str, tile: Any, shape: Shape) -> str:
    """As it stands in tiles.py."""
    if kernel != "forward":
        return f"GradientTile{tuple(tile)}"
    widest = sum(tiles.split_width(shape.width))
    row = (tile.block_p, tile.block_n, tile.step, tile.warps, tile.stages)
    return f"({widest}, {shape.slot}, {row}),"


def milliseconds(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, return_mode="median")


def _finals(
    kernel: str, shape: Shape, given: Operands, argmax: bool, found: list[tuple[float, Any]]
) -> list[tuple[float, Any]]:
    """The fastest few, timed in turn: a clock that drifts slows all of them."""
    best = [tile for _, tile in sorted(found, key=lambda pair: pair[0])[:FINALISTS]]
    times: dict[int, list[float]] = {place: [] for place in range(len(best))}
    for _ in range(ROUNDS):
        for place, tile in enumerate(best):
            with using(kernel, tile, shape.width):
                times[place].append(milliseconds(lambda: run_kernel(kernel, given, argmax)))
    ranked = [(statistics.median(times[place]), tile) for place, tile in enumerate(best)]
    return sorted(ranked, key=lambda pair: pair[0])


def tune(
    kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device, argmax: bool, dry: int
) -> bool:
    """Print one kernel's rows for a shape; False if a candidate was wrong. ``dry``: how many."""
    chooser = getattr(tiles, CHOOSERS[kernel])
    options = ("ieee",) if kernel == "forward" else ()
    today = chooser(device, dtype, shape.width, shape.slot, shape.texts, *options)
    listed = (forward_candidates if kernel == "forward" else gradient_candidates)(shape, dtype)
    candidates = [today, *(tile for tile in listed if tile != today)]
    if dry:
        candidates = [today, *candidates[1 :: max(1, len(candidates) // dry)]][:dry]
    small = operands(shape.cut(), dtype, device)
    truth = truth_of(kernel, small)
    given = small if dry else operands(shape, dtype, device)
    print(f"# {kernel}, {shape}, {dtype}, {len(candidates)} candidates", flush=True)
    sound, found, unfit = True, [], 0
    for tile in candidates:
        with using(kernel, tile, shape.width):
            try:
                wrong = fault(kernel, small, truth, argmax)
            except Exception as error:  # a tile that does not compile or fit is an answer too
                if dry:
                    raise
                print(f"#   {row_of(kernel, tile, shape)}  {type(error).__name__}", flush=True)
                unfit += 1
                continue
            if wrong:
                sound = False
                print(f"#   {row_of(kernel, tile, shape)}  {wrong}", flush=True)
                continue
            took = 0.0 if dry else milliseconds(lambda: run_kernel(kernel, given, argmax))
        found.append((took, tile))
    ranked = found if dry else _finals(kernel, shape, given, argmax, found)
    for took, tile in ranked:
        note = "right, not timed" if dry else f"{took:.3f} ms"
        note += ", as today" if tile == today else ""
        print(f"    {row_of(kernel, tile, shape)}  # {note}", flush=True)
    if unfit:
        print(f"#   {unfit} candidates do not compile or do not fit", flush=True)
    return sound


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="TxNxIxPxD")
    parser.add_argument("--kernels", nargs="+", choices=CHOOSERS, default=list(CHOOSERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--argmax", action="store_true", help="forward with indices")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, nothing timed")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    interpreted = triton.knobs.runtime.interpret
    if not gpu and not (options.dry_run and interpreted):
        print(
            "tune_tiles needs a GPU; without one, TRITON_INTERPRET=1 and --dry-run walk it",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda" if gpu and not interpreted else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    print(f"# {tiles.family_of(device)}, {name}, triton {triton.__version__}")
    defaults = TINY_SHAPES if options.dry_run else DEFAULT_SHAPES
    sound = True
    for shape in options.shapes or map(parse_shape, defaults):
        for dtype in (getattr(torch, each) for each in options.dtypes):
            for kernel in options.kernels:
                dry = 3 if options.dry_run else 0
                sound &= tune(kernel, shape, dtype, device, options.argmax, dry)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
