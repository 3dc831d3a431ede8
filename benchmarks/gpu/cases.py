"""What is measured: shapes, tiles and goals, for a GPU and, tiny, for a dry run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

BAGS, PATCHES = 25, 257
# in the order of importance; parts.py says what each is
PART_NAMES = (
    "machine",
    "ceilings",
    "parity",
    "headline",
    "tests",
    "rerank",
    "muge",
    "short_texts",
    "training",
    "tiles",
    "sizes",
    "package_parity",
    "other_depth",
    "gradient_tiles",
    "muge_slice",
    "compiled",
)


@dataclass(frozen=True)
class Case:
    """One shape. ``form``: ``all`` pairs, or ``candidates``: ``images`` of its own for each text.

    ``real_bags``: bags of a text that count; the rest of ``bags`` is padding behind a mask.
    """

    texts: int
    images: int
    bags: int = BAGS
    patches: int = PATCHES
    depth: int = 256
    dtype: str = "bfloat16"
    form: str = "all"
    real_bags: int | None = None

    @property
    def pairs(self) -> int:
        return self.texts * self.images

    @property
    def useful_flops(self) -> float:
        """Multiplications and additions of one pass over all similarities, padding not counted.

        One pass serves both directions: a function that takes two is not credited twice.
        """
        return 2.0 * self.pairs * (self.real_bags or self.bags) * self.patches * self.depth

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def image_bytes(self) -> int:
        held = self.pairs if self.form == "candidates" else self.images
        return held * self.patches * self.depth * self.itemsize

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "useful_flops": self.useful_flops}


@dataclass(frozen=True)
class TileChange:
    """Fields of a tile to put in the place of the table's, for the kernels of one ``chooser``."""

    chooser: str  # a function of bagformer.kernels.tiles
    fields: tuple[tuple[str, Any], ...]
    note: str = ""


def _forward(p: int, n: int, warps: int, stages: int, note: str = "") -> TileChange:
    fields = (("block_p", p), ("block_n", n), ("warps", warps), ("stages", stages))
    return TileChange("forward_tile", fields, note)


def _gradient(chooser: str, p: int, n: int, warps: int, cap: int | None = None) -> TileChange:
    fields = (("block_p", p), ("block_n", n), ("warps", warps), ("registers", cap))
    return TileChange(chooser, fields)


FORWARD_TILES = (
    _forward(64, 128, 4, 1, "two programs on a multiprocessor"),
    _forward(64, 128, 4, 2, "one program, loads pipelined"),
    _forward(64, 256, 8, 1, "half the L2 reads of 64x128"),
    _forward(64, 256, 8, 2, "half the L2 reads of 64x128"),
    _forward(128, 128, 8, 1),
    _forward(128, 128, 8, 2),
    _forward(64, 64, 4, 1, "twice the L2 reads of 64x128"),
)
GRADIENT_TILES = (
    _gradient("text_gradient_tile", 32, 32, 4),
    _gradient("text_gradient_tile", 64, 64, 8, 128),
    _gradient("text_gradient_tile", 32, 128, 8),
    _gradient("image_gradient_tile", 32, 32, 4),
    _gradient("image_gradient_tile", 64, 64, 8),
    _gradient("image_gradient_tile", 128, 32, 8),
)


@dataclass(frozen=True)
class Plan:
    """Everything that a run measures."""

    headline: Case
    sizes: tuple[int, ...]
    rerank: tuple[Case, ...]
    short_bags: int
    muge: Case
    muge_slice: int  # images of the slice on which rivals are timed
    compiled: tuple[int, ...]
    other_depth: int
    tiles: tuple[TileChange, ...]
    gradient_tiles: tuple[TileChange, ...]
    parity: tuple[Case, ...]
    matmul: int
    copy_bytes: int
    seconds_of_a_variant: float
    top_k: int = 10

    def in_batch(self, size: int, depth: int | None = None) -> Case:
        depth = self.headline.depth if depth is None else depth
        return replace(self.headline, texts=size, images=size, depth=depth)

    @property
    def short(self) -> Case:
        return replace(self.headline, real_bags=self.short_bags)


def _parity(texts: int, images: int, like: Case, other_depth: int) -> tuple[Case, ...]:
    base = replace(like, texts=texts, images=images)
    short = replace(base, real_bags=max(1, like.bags // 3))
    return (
        base,
        short,
        *(replace(base, dtype=dtype) for dtype in ("float16", "float32")),
        replace(base, images=3, form="candidates"),
        *(replace(case, depth=other_depth) for case in (base, short)),
    )


def real() -> Plan:
    return Plan(
        headline=Case(1024, 1024),
        sizes=(32, 128, 512, 2048, 4096),
        rerank=(Case(1, 1000, form="candidates"), Case(32, 100, form="candidates")),
        short_bags=8,
        muge=Case(5000, 30000),
        muge_slice=3000,
        compiled=(128, 1024),
        other_depth=128,
        tiles=FORWARD_TILES,
        gradient_tiles=GRADIENT_TILES,
        parity=_parity(48, 40, Case(1024, 1024), 128),
        matmul=8192,
        copy_bytes=2 << 30,
        seconds_of_a_variant=1.0,
    )


def dry() -> Plan:
    """The same parts on shapes that the interpreter finishes in a few milliseconds each."""
    return Plan(
        headline=Case(3, 2, 5, 9, 16),
        sizes=(2,),
        rerank=(Case(1, 3, 5, 9, 16, form="candidates"),),
        short_bags=2,
        muge=Case(3, 4, 5, 9, 16),
        muge_slice=2,
        compiled=(2,),
        other_depth=32,
        tiles=(_forward(16, 32, 4, 1, "dry"),),
        gradient_tiles=(_gradient("text_gradient_tile", 16, 32, 4),),
        parity=_parity(3, 3, Case(4, 3, 5, 9, 16), 24),
        matmul=32,
        copy_bytes=1 << 16,
        seconds_of_a_variant=0.0,
        top_k=2,
    )


# name, what is compared, target, whether more is better; report.py looks the measured value up
GOALS = (
    ("forward_ms", "in-batch 1024, both directions, forward, ms", 8.0, False),
    ("forward_fraction", "the same, fraction of the measured bf16 matmul rate", 0.45, True),
    ("step_ms", "in-batch 1024, forward and backward, ms", 26.0, False),
    ("step_extra_gb", "the same, peak extra memory without the results, GB", 0.4, False),
    ("forward_over_rival", "in-batch 1024, forward, times faster than the best rival", 5.0, True),
    ("step_over_rival", "in-batch 1024, step, times faster than the best rival", 5.0, True),
    ("muge_s", "5,000 texts x 30,000 images, both directions, s", 1.1, False),
    ("rerank_fraction", "rerank, fraction of the measured copy bandwidth", 0.85, True),
    ("short_speedup", "8 real bags against padded 25, times faster", 2.5, True),
)
