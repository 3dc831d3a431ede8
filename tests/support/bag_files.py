"""Reads and damages bag files, independently of the code under test (format: docs/bags.md)."""

from __future__ import annotations

import random
import struct
import zlib

WORDS = (
    *("version", "byte_order", "matcher", "header_bytes", "file_bytes", "n_entities", "alphabet"),
    *("n_dense", "n_rare", "n_blocks", "n_states", "n_links", "n_items", "n_masked"),
)
_HEADER = struct.Struct("<8s4I2Q8I56x")
SECTIONS = {
    "dense": "<I",
    "rare": "<2I",
    "blocks": "<2I",
    "states": "<2I",
    "links": "<3I",
    "items": "<3I",
    "masked": "<I",
}


def header_of(image: bytes) -> dict[str, int]:
    return dict(zip(WORDS, _HEADER.unpack_from(image)[1:], strict=True))


def section_starts(image: bytes) -> dict[str, int]:
    header, at, starts = header_of(image), _HEADER.size, {}
    for name, layout in SECTIONS.items():
        starts[name] = at = -(-at // 64) * 64
        at += header[f"n_{name}"] * struct.calcsize(layout)
    return starts


def entry(image: bytes, section: str, index: int) -> tuple[int, ...]:
    layout = struct.Struct(SECTIONS[section])
    return layout.unpack_from(image, section_starts(image)[section] + index * layout.size)


def with_entry(image: bytes, section: str, index: int, **words: int) -> bytes:
    """``words`` are w0, w1, w2: the words of the entry that change."""
    layout = struct.Struct(SECTIONS[section])
    at = section_starts(image)[section] + index * layout.size
    values = list(layout.unpack_from(image, at))
    for name, value in words.items():
        values[int(name[1:])] = value
    damaged = bytearray(image)
    layout.pack_into(damaged, at, *values)
    return reseal(damaged)


def with_header(image: bytes, **words: int) -> bytes:
    damaged = bytearray(image)
    _HEADER.pack_into(damaged, 0, image[:8], *(header_of(image) | words).values())
    return reseal(damaged)


def reseal(image: bytes) -> bytes:
    """The same bytes with a right checksum."""
    return bytes(image[:-4]) + struct.pack("<I", zlib.crc32(image[:-4]))


def mutated(image: bytes, make: random.Random) -> bytes:
    """One to four random changes: bits, bytes, words, lengths, moved blocks."""
    data = bytearray(image)
    for _ in range(make.randint(1, 4)):
        kind, at = make.randrange(6), make.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << make.randrange(8)
        elif kind == 1:
            data[at] = make.randrange(256)
        elif kind == 2:
            value = make.choice((0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, make.randrange(2**32)))
            data[at & ~3 : (at & ~3) + 4] = struct.pack("<I", value)
        elif kind == 3:
            del data[at : at + make.choice((1, 4, 8, 64, len(data)))]
        elif kind == 4:
            data[at:at] = make.randbytes(make.choice((1, 4, 8, 64)))
        else:
            other, size = make.randrange(len(data)) & ~3, 4 * make.randint(1, 8)
            data[at & ~3 : (at & ~3) + size] = data[other : other + size]
        if not data:
            return b""
    return bytes(data)
