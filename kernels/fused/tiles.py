"""Which tile each kernel uses on which GPU: plain tables, read once a launch, no autotuning.

Rows were chosen from compiled code (``benchmarks/aot_report.py``): no spills in the configurations
that the tests compile with Triton 3.8, and, where the shared memory allows, two programs or more on
a multiprocessor, so that one's matrix products overlap the other's maxima. Not clean: the image
gradient on sm_100 with image masks, and some backward cases on sm_80 (docs/kernels.md lists them).
None has been timed.
"""

from typing import Any, NamedTuple

import torch
import triton

SMALLEST_SLOT = 8
SMALLEST_BLOCK = 16  # the narrowest matrix product that every target has
LONGEST_PIECE = 32  # bags of one text that lie side by side in a backward tile
FEWEST_SHARING = 4  # images whose leftover rows are worth gathering in one tile
FEW_COLUMNS = 32  # up to here a launch waits for memory, not for the matrix units


class Tile(NamedTuple):
    """One configuration of the scoring kernel; widths as in ``similarity`` of primitives.py."""

    block_p: int
    block_n: int
    head: int
    tail: int
    step: int
    warps: int
    stages: int
    registers: int | None = None
    shares: bool = False
    alone: bool = False

    @property
    def frame(self) -> tuple:
        """What slot classes that share a launch have in common."""
        return self._replace(block_n=0, shares=False)

    def covers(self, width: int) -> bool:
        """Whether loads need no column mask."""
        return width % self.step == 0 if self.step else self.head + self.tail == width


class Row(NamedTuple):
    """A row of a forward table: up to which padded width and slot it serves, and its tile.

    ``step`` 0 keeps the texts on chip. ``registers`` caps those of a thread. ``shares``: from
    which slot on, for plain launches and for ``odd`` ones, images may share a tile for their
    leftover rows (``leftovers``); 999 where that spills.
    """

    widest: int
    longest: int
    block_p: int
    block_n: int
    step: int
    warps: int
    stages: int
    registers: int | None = None
    shares: tuple[int, int] = (8, 8)


class GradientTile(NamedTuple):
    """One configuration of a backward kernel: patches and bags of a tile, features of a program."""

    block_p: int
    block_n: int
    span: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def frame(self) -> tuple:
        """What slot classes that share a launch have in common."""
        return self._replace(block_n=0)


# With Triton 3.6, images that share a tile cost 2 to 101 spilled instructions.
TILES_CAN_BE_SHARED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
ANY = 1 << 30
NEVER = (999, 999)
FORWARD = {
    "sm_80": (
        # 64 columns: with 128, four warps of mma.sync need more than 255 registers for indices;
        # the cap stops ptxas from aiming at 128 registers, with spills, for a third program
        Row(256, 32, 64, 64, 0, 4, 2, registers=255, shares=(8, 999)),
        # one stage: 80 KB, so that two programs fit; a second use of the texts is read to registers
        Row(384, 64, 64, 64, 0, 4, 1, registers=255, shares=NEVER),
        Row(ANY, ANY, 64, 128, 64, 8, 3),
    ),
    "sm_90": (
        # 64 KB: three programs at 166 registers, two where images share a tile
        Row(128, 128, 64, 128, 0, 4, 2),
        # 96 KB: two programs; a second stage would cost the second program
        Row(256, 128, 64, 128, 0, 4, 1, shares=(8, 16)),
        # one program of eight warps. Texts on chip halve what steps stream; two stages fit
        Row(384, 128, 64, 128, 0, 8, 2, shares=(8, 16)),
        # 192 KB: one stage
        Row(512, 128, 64, 128, 0, 8, 1),
        # steps read the texts again for each tile: square tiles read least from L2
        Row(ANY, ANY, 128, 128, 64, 8, 3),
    ),
    "sm_100": (
        # a second stage spills where the width is no power of two
        Row(256, 128, 64, 128, 0, 4, 1, shares=(16, 16)),
        # eight warps: four spill when they keep indices; at 384 two stages spill too
        Row(512, 128, 64, 128, 0, 8, 1),
        Row(ANY, ANY, 128, 128, 64, 8, 3, shares=NEVER),
    ),
    # 99 KB a program (sm_86, sm_89, sm_120), a quarter of a data centre GPU's matrix rate
    "small": (
        Row(128, 64, 64, 64, 0, 4, 2, registers=255),
        Row(256, 32, 64, 32, 0, 4, 1),
        Row(ANY, ANY, 64, 64, 64, 4, 2, registers=255),
    ),
    "interpreter": (
        Row(256, 64, 32, 64, 0, 4, 1),
        Row(ANY, ANY, 32, 64, 64, 4, 1),
    ),
}
# asked first where indices are wanted
FORWARD_INDICES = {
    # with the cap ptxas spills 4, without it none
    "sm_80": (Row(256, 32, 64, 64, 0, 4, 2),),
    # slots of 8: sums, winners and their places of 16 texts spill with 128 columns and masks
    "sm_90": (Row(256, 8, 64, 64, 0, 4, 1),),
    "sm_100": (
        Row(256, 8, 64, 64, 0, 4, 1),
        Row(256, 16, 64, 128, 0, 4, 1),
        # four warps spill up to 6; capped at 128 registers, two programs of eight fit
        Row(256, 32, 64, 128, 0, 8, 1, registers=128),
        Row(256, 128, 64, 128, 0, 4, 1),
        # as sm_90's slots of 8
        Row(512, 16, 64, 64, 0, 8, 1),
    ),
}
# Of sorted texts those in slots of 8 have a launch of their own where the kernel of all classes
# spills and theirs does not; by whether indices are wanted and whether the launch is ``odd``.
ALONE = {
    "sm_80": ((False, False), (False, True), (True, False), (True, True)),
    "sm_90": ((False, False), (False, True), (True, True)),
}
# float32 outside the matrix units: 16 fused multiply-adds a thread and step, 4 programs
FORWARD_IEEE = Row(ANY, ANY, 32, 64, 16, 4, 1, shares=NEVER)
# TF32 operands are twice as wide: steps, so that any width fits
FORWARD_TF32 = {
    "sm_80": Row(ANY, ANY, 64, 64, 32, 4, 3, shares=NEVER),
    "small": Row(ANY, ANY, 64, 64, 32, 4, 2, shares=NEVER),
}
FORWARD_TF32_ELSE = Row(ANY, ANY, 64, 128, 32, 4, 3, shares=NEVER)

# The accumulator, the owner's rows times the span, lives in registers, 128 a thread; blackwell's
# in tensor memory. The more rows a program owns, the less it reads from L2: 128, and as many
# features as leave two programs on a multiprocessor.
TEXT_GRADIENT = {
    # 32 patches a round would be a fifth faster, but spill with masks and in float16
    "sm_80": GradientTile(16, 128, 128, 4, 2),
    "sm_90": GradientTile(32, 128, 128, 4, 2),
    "sm_100": GradientTile(32, 128, 256, 4, 2),
    "small": GradientTile(16, 128, 128, 4, 2),
    "interpreter": GradientTile(32, 64, 64, 4, 1),
}
IMAGE_GRADIENT = {
    # with 32 columns, four texts in slots of 8 spill
    "sm_80": GradientTile(128, 16, 128, 4, 2),
    "sm_90": GradientTile(128, 32, 128, 4, 2),
    "sm_100": GradientTile(128, 32, 256, 4, 2),
    "small": GradientTile(128, 32, 128, 4, 2),
    "interpreter": GradientTile(32, 64, 64, 4, 1),
}
TEXT_GRADIENT_FP32 = GradientTile(16, 64, 64, 4, 1)
IMAGE_GRADIENT_FP32 = GradientTile(32, 32, 64, 4, 2)


def split_width(width: int) -> tuple[int, int]:
    """``width`` as one or two powers of two of at least 16, the smallest sum that covers it."""
    head = max(16, 1 << (width.bit_length() - 1))
    rest = max(width - head, 0)
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (2 * head, 0) if tail == head else (head, tail)


def slot_of(n_bags: int) -> int:
    """Columns that a text of ``n_bags`` takes."""
    return max(SMALLEST_SLOT, triton.next_power_of_2(n_bags))


def common_unit(*strides: int) -> int:
    """8 if it divides every stride, else 1.

    Kernels are given strides in these units, so that the compiler knows rows to be 16-byte aligned
    also where a width is a multiple of 8 but not of 16, and loads them eight values at a time. They
    multiply in the stride's own integers, which are 64-bit only from 2**31 on.
    """
    return 8 if all(stride % 8 == 0 and stride < 1 << 31 for stride in strides) else 1


def images_per_program(device: torch.device, groups: int, n_images: int, limit: int) -> int:
    """Enough images to spread the cost of loading the texts, few enough to fill it 16 times."""
    sms = 1
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    run = min(16, groups * n_images // (16 * sms))
    return max(run, 1, triton.cdiv(n_images, limit))


def leftovers(tile: Tile, n_patches: int, run: int) -> tuple[int, int]:
    """Rows of an image that share a tile with those of others, 0 for none; images of a program.

    The rows that whole tiles leave over would take a tile of their own. Where they are few, a
    program gathers those of all its images in one tile, two rows of it for each.
    """
    left = n_patches % tile.block_p
    room = tile.block_p // (2 * left) if left else 0
    if not tile.shares or room < FEWEST_SHARING or run == 1:
        return 0, run
    return left, min(run, room)


def family_of(device: torch.device) -> str:
    """Row of the tables for a device; the interpreter's CPU takes small tiles."""
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < 160 * 1024:
        return "small"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def forward_tile(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    slot: int,
    n_texts: int,
    precision: str,
    indices: bool = False,
    odd: bool = False,
) -> Tile:
    """Tile for ``n_texts`` texts in slots of ``slot`` columns.

    ``odd``: with a mask of images, with floors (a mask of texts in mode "zero"), or one direction
    alone.
    """
    family = family_of(device)
    head, tail = split_width(width)
    if dtype == torch.float32:
        tf32 = FORWARD_TF32.get(family, FORWARD_TF32_ELSE)
        row = FORWARD_IEEE if precision == "ieee" else tf32
    else:
        first = FORWARD_INDICES.get(family, ()) if indices else ()
        row = next(
            row
            for row in (*first, *FORWARD[family])
            if head + tail <= row.widest and slot <= row.longest
        )
    step, warps, stages, registers = row.step, row.warps, row.stages, row.registers
    shares = TILES_CAN_BE_SHARED and not indices and slot >= row.shares[odd]
    block_n = min(row.block_n, max(SMALLEST_BLOCK, slot * triton.next_power_of_2(n_texts)))
    block_n = max(slot, block_n)
    if block_n <= FEW_COLUMNS and not step and head + tail <= 256 and family != "interpreter":
        # a shared tile would spare nothing: the rows that repeat come from a cache
        warps, registers, shares = 4, None, False
        stages = 3 if family != "small" else 1
    if step:
        head, tail = 0, 0
    alone = slot == SMALLEST_SLOT and (indices, odd) in ALONE.get(family, ())
    return Tile(row.block_p, block_n, head, tail, step, warps, stages, registers, shares, alone)


def converts_fp8(device: torch.device) -> bool:
    """Whether the GPU turns e4m3 into wider floats by itself; else it is done by arithmetic."""
    return family_of(device) in ("sm_90", "sm_100")


def quantized_tile(
    device: torch.device, dtype: torch.dtype, width: int, slot: int, n_texts: int
) -> Tile:
    """Tile for images of eight-bit numbers; ``dtype`` is the text's."""
    tile = forward_tile(device, dtype, width, slot, n_texts, "ieee")
    if dtype != torch.float32 and family_of(device) == "sm_80" and tile.head >= 128:
        # every warp widens the rows that it multiplies; with four of them, wide rows spill, and
        # with two stages so does fp8 under a mask
        return tile._replace(warps=8, stages=3)
    return tile


def _narrowed(tile: GradientTile, width: int, slot: int, n_texts: int) -> GradientTile:
    most = max(SMALLEST_BLOCK, slot * triton.next_power_of_2(n_texts))
    span = max(SMALLEST_BLOCK, min(tile.span, triton.next_power_of_2(width)))
    return tile._replace(block_n=max(slot, min(tile.block_n, most)), span=span)


def text_gradient_tile(
    device: torch.device, dtype: torch.dtype, width: int, slot: int, n_texts: int
) -> GradientTile:
    """Tile of the kernel that owns texts."""
    wide = dtype == torch.float32
    tile = TEXT_GRADIENT_FP32 if wide else TEXT_GRADIENT[family_of(device)]
    return _narrowed(tile, width, slot, n_texts)


def image_gradient_tile(
    device: torch.device, dtype: torch.dtype, width: int, slot: int, n_texts: int
) -> GradientTile:
    """Tile of the kernel that owns patches."""
    wide = dtype == torch.float32
    tile = IMAGE_GRADIENT_FP32 if wide else IMAGE_GRADIENT[family_of(device)]
    return _narrowed(tile, width, slot, n_texts)
