"""Blanks what one generation of GPUs never loads in a compiled library, so that the library packs small.

    python slim.py LIBRARY.so 90

A CUDA library keeps its device code in the ELF section .nv_fatbin: a run of fat binaries, each with an image
per architecture (cubin or PTX). The driver takes the image of its card and reads no other. Sizes and offsets
stay; an image of another architecture becomes zeros and is given an architecture that no such card takes, so
that it cannot be chosen by mistake: a kernel that is missing says so.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["blank_other_images", "images"]

_FATBIN, _ELF64 = 0xBA55ED50, b"\x7fELF\x02"
_PTX, _CUBIN = 1, 2
_NEVER = {_PTX: 121, _CUBIN: 75}
"""PTX is only compiled for cards at least as new, a cubin only loaded by cards of its own generation."""
_SECTION = struct.Struct("<IIQQQQIIQQ")
_IMAGE = struct.Struct("<HHIQIIHHI")  # kind, version, header size, payload size, ..., architecture
_ARCHITECTURE_AT = 28


class Image(NamedTuple):
    """Device code of one architecture."""

    at: int
    kind: int
    header_bytes: int
    payload_bytes: int
    architecture: int


def images(library: bytes | bytearray) -> Iterator[Image]:
    """Every image of a library; raises ValueError for what is none."""
    at, end = _section(library, b".nv_fatbin")
    while at + 16 <= end:
        magic, _, header_bytes, size = struct.unpack_from("<IHHQ", library, at)
        if magic != _FATBIN:
            at += 8  # padding
            continue
        each, stop = at + header_bytes, at + header_bytes + size
        while each + 64 <= stop:
            kind, _, head, payload, _, _, _, _, architecture = _IMAGE.unpack_from(library, each)
            if kind not in _NEVER:
                raise ValueError(f"unknown kind of image {kind} at {each:#x}")
            yield Image(each, kind, head, payload, architecture)
            each += head + payload
        at = (stop + 7) & ~7


def _section(library: bytes | bytearray, name: bytes) -> tuple[int, int]:
    if library[:5] != _ELF64:
        raise ValueError("not an ELF64 file")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    heads = [_SECTION.unpack_from(library, table + i * size) for i in range(count)]
    for head in heads:
        begin = heads[names][4] + head[0]
        if library[begin : library.index(b"\0", begin)] == name:
            return head[4], head[4] + head[5]
    return 0, 0


def blank_other_images(library: bytearray, architecture: int) -> int:
    """Blank PTX and every cubin of another ``architecture``; returns how many bytes are zeros now."""
    blanked = 0
    for image in images(library):
        if image.kind == _CUBIN and image.architecture == architecture:
            continue
        begin = image.at + image.header_bytes
        library[begin : begin + image.payload_bytes] = bytes(image.payload_bytes)
        struct.pack_into("<I", library, image.at + _ARCHITECTURE_AT, _NEVER[image.kind])
        blanked += image.payload_bytes
    return blanked


if __name__ == "__main__":
    path = Path(sys.argv[1])
    content = bytearray(path.read_bytes())
    gone = blank_other_images(content, int(sys.argv[2]))
    path.write_bytes(content)
    print(f"{path.name}: {gone / 1e6:.0f} of {len(content) / 1e6:.0f} MB blanked")
