"""What can be said of the kernels without running or compiling them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from bagformer.kernels import tiles

FAMILIES = ("sm_80", "sm_90", "sm_100", "small")
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "small": 99 << 10}


@pytest.mark.parametrize("width", [1, 8, 16, 72, 96, 100, 128, 200, 384, 640, 768, 1000])
def test_a_width_is_covered_by_powers_of_two(width):
    head, tail = tiles.split_width(width)
    assert head + tail >= width and head >= 16
    assert all(part & (part - 1) == 0 for part in (head, tail))
    assert tail == 0 or 16 <= tail < head
    assert head + tail < max(2 * width, 33)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slot", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("width", [64, 96, 128, 192, 200, 256, 384, 512, 768, 1024])
def test_operands_fit_in_shared_memory(monkeypatch, family, slot, width):
    monkeypatch.setattr(tiles, "family_of", lambda device: family)
    for dtype, n_texts in ((torch.bfloat16, 1000), (torch.bfloat16, 1), (torch.float32, 1000)):
        tile = tiles.forward_tile(torch.device("cpu"), dtype, width, slot, n_texts, "ieee")
        assert tile.block_n % slot == 0 and tile.block_n >= slot
        size = dtype.itemsize
        if tile.step:
            held = (tile.block_p + tile.block_n) * tile.step * size * tile.stages
        else:
            held = (tile.block_n + tile.block_p * tile.stages) * (tile.head + tile.tail) * size
        assert held <= SHARED[family], tile


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_tiles_hold_whole_slots(monkeypatch, family):
    monkeypatch.setattr(tiles, "family_of", lambda device: family)
    for choose in (tiles.text_gradient_tile, tiles.image_gradient_tile):
        for slot in (8, 16, 32):
            for n_texts in (1, 2, 1000):
                tile = choose(torch.device("cpu"), torch.bfloat16, 256, slot, n_texts)
                assert tile.block_n % slot == 0
                assert min(tile.block_n, tile.block_p, tile.span) >= tiles.SMALLEST_BLOCK


def test_slots_and_units():
    assert [tiles.slot_of(n) for n in (1, 8, 9, 16, 17, 25, 33, 128)] == [
        8,
        8,
        16,
        16,
        32,
        32,
        64,
        128,
    ]
    assert tiles.common_unit(200, 200 * 25) == 8 and tiles.common_unit(256, 12) == 1
    assert tiles.common_unit(256, (1 << 31) - 8) == 8 and tiles.common_unit(256, 1 << 31) == 1
