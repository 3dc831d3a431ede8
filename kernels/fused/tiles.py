"""Which tile each kernel uses on which GPU: a plain table, read once a launch, no autotuning."""

from typing import NamedTuple

import torch
import triton

SMALLEST_SLOT = 8
SMALLEST_BLOCK = 16  # the narrowest matrix product that every target has


class Tile(NamedTuple):
    """One configuration of the scoring kernel; see ``similarity`` in maxsim.py for the widths."""

    block_p: int
    block_n: int
    head: int
    tail: int
    step: int
    warps: int
    stages: int

    def covers(self, width: int) -> bool:
        """Whether loads need no column mask."""
        return width % self.step == 0 if self.step else self.head + self.tail == width


def split_width(width: int) -> tuple[int, int]:
    """``width`` as one or two powers of two of at least 16, the smallest sum that covers it."""
    head = max(16, 1 << (width.bit_length() - 1))
    rest = max(width - head, 0)
    tail = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (2 * head, 0) if tail == head else (head, tail)


def slot_of(n_bags: int) -> int:
    """Columns that a text of ``n_bags`` takes."""
    return max(SMALLEST_SLOT, triton.next_power_of_2(n_bags))


def images_per_program(device: torch.device, groups: int, n_images: int, limit: int) -> int:
    """Enough images to spread the cost of loading the texts, few enough to fill the GPU 16 times."""
    sms = 1
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    run = min(16, groups * n_images // (16 * sms))
    return max(run, 1, triton.cdiv(n_images, limit))


def family_of(device: torch.device) -> str:
    """Row of the tables for a device; the interpreter's CPU takes small tiles."""
    if device.type != "cuda":
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(device)
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared < 160 * 1024:
        return "small"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def forward_tile(
    device: torch.device, dtype: torch.dtype, width: int, slot: int, n_texts: int, argmax: bool
) -> Tile:
    """Tile for texts in slots of ``slot`` columns."""
    family = family_of(device)
    head, tail = split_width(width)
    most = max(SMALLEST_BLOCK, slot * triton.next_power_of_2(n_texts))
    if family == "interpreter":
        block_n = max(slot, min(64, most))
        if dtype == torch.float32:
            return Tile(16, block_n, 0, 0, 32, 4, 1)
        return Tile(32, block_n, head, tail, 0, 4, 1)
    return Tile(64, max(slot, 128), head, tail, 0, 4, 1)


class GradientTile(NamedTuple):
    """One configuration of a backward kernel: patches and bags of a tile, features of a program."""

    block_p: int
    block_n: int
    span: int
    warps: int
    stages: int


LONGEST_PIECE = 64  # bags of one text that lie side by side in a backward tile


def text_gradient_tile(
    device: torch.device, dtype: torch.dtype, width: int, slot: int, n_texts: int
) -> GradientTile:
    family = family_of(device)
    span = max(16, min(triton.next_power_of_2(width), 256))
    most = max(SMALLEST_BLOCK, slot * triton.next_power_of_2(n_texts))
    if family == "interpreter":
        return GradientTile(32, max(slot, min(64, most)), min(span, 64), 4, 1)
    return GradientTile(64, min(128, most), span, 8, 2)


def image_gradient_tile(
    device: torch.device, dtype: torch.dtype, width: int, slot: int, n_texts: int
) -> GradientTile:
    family = family_of(device)
    span = max(16, min(triton.next_power_of_2(width), 256))
    most = max(SMALLEST_BLOCK, slot * triton.next_power_of_2(n_texts))
    if family == "interpreter":
        return GradientTile(32, max(slot, min(64, most)), min(span, 64), 4, 1)
    return GradientTile(64, min(64, most), span, 8, 2)
