"""The kit that carries the recorder to a GPU machine: tried with a library and an archive made here."""

from __future__ import annotations

import csv
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from record.gpu.slim import blank_other_images, images

HERE = Path(__file__).parent
KIT = HERE / "record" / "gpu"
CUBIN, PTX = 2, 1


def image(kind, architecture, payload):
    head = struct.pack(
        "<HHIQIIHHIIIQQQ", kind, 257, 64, len(payload), 0, 0, 0, 0, architecture, 0, 0, 0, 0, 0
    )
    return head + payload


def fatbin(*parts):
    body = b"".join(parts)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(device_code):
    """An ELF file with a section of device code, and host code that must not change."""
    names = b"\0.text\0.nv_fatbin\0.shstrtab\0"
    begin = 64
    blobs = [b"", b"host code" * 10, device_code, names]
    offsets = []
    for blob in blobs:
        offsets.append(begin)
        begin += len(blob) + (-len(blob) % 8)
    table = begin
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, len(blobs), 3)
    content = bytearray(head)
    for blob in blobs:
        content += blob + bytes(-len(blob) % 8)
    for name, offset, blob in zip((0, 1, 7, 18), offsets, blobs, strict=True):
        content += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, len(blob), 0, 0, 8, 0)
    return content


def test_only_images_of_the_card_keep_their_code():
    mine, other, text = b"\x11" * 64, b"\x22" * 128, b"\x33" * 24
    two = fatbin(image(CUBIN, 80, other), image(CUBIN, 90, mine), image(PTX, 90, text))
    content = library(two + bytes(8) + fatbin(image(CUBIN, 90, mine)))
    before = bytes(content)
    assert blank_other_images(content, 90) == len(other) + len(text)
    assert len(content) == len(before)
    assert b"host code" * 10 in content
    assert content.count(mine) == 2
    assert other not in content
    assert text not in content
    kept = [(each.kind, each.architecture) for each in images(content)]
    assert kept == [(CUBIN, 75), (CUBIN, 90), (PTX, 121), (CUBIN, 90)]


def test_what_is_no_library_is_refused():
    with pytest.raises(ValueError, match="not an ELF64 file"):
        blank_other_images(bytearray(b"PK\x03\x04" + bytes(60)), 90)
    strange = bytearray(library(fatbin(image(CUBIN, 90, b"\0" * 8))))
    at = next(images(strange)).at
    struct.pack_into("<H", strange, at, 9)
    with pytest.raises(ValueError, match="unknown kind of image 9"):
        list(images(strange))


def test_one_command_unpacks_records_and_packs_what_comes_back(tmp_path):
    """run.sh as on the GPU machine; only vLLM is the stand-in."""
    packed = tmp_path / "kit"
    packed.mkdir()
    with tarfile.open(packed / "site.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("only_in_the_archive.py"))
    whole = (packed / "site.tar.xz").read_bytes()
    (packed / "site.tar.xz").unlink()
    (packed / "site.tar.xz.00").write_bytes(whole[:50])
    (packed / "site.tar.xz.01").write_bytes(whole[50:])
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {"PYTHON": sys.executable, "STATE": str(tmp_path / "state"), "PYTHONPATH": paths}
    words = ["bash", KIT / "run.sh", packed / "site.tar.xz", tmp_path / "out", "gpu-shake", "h100-sxm", "120"]
    done = subprocess.run(
        [*words, "--fake", "--first-look"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "llama-1b  repeat 1: 0, " in done.stdout
    assert (tmp_path / "state" / "site" / "only_in_the_archive.py").is_file()
    with tarfile.open(tmp_path / "out" / "recording.tar.xz") as archive:
        found = archive.extractfile("runs/h100-sxm-stand-in-llama-1b/steps.csv.gz")
        rows = list(csv.DictReader(io.StringIO(gzip.decompress(found.read()).decode())))
    assert len(rows) > 100
