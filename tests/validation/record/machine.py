"""How fast the machine is just now: the time of two things that always take the same work."""

from __future__ import annotations

import hashlib
import time
from typing import NamedTuple

__all__ = ["MachineSpeed", "machine_speed"]

_TRIES = 5
_COPIED = bytearray(32 * 2**20)  # more than a core keeps to itself
_HASHED = bytes(2**20)


class MachineSpeed(NamedTuple):
    """CPU time, the least of some tries: others slow memory and clocks even of a thread alone on its core."""

    copy_ms: float
    """Of copying 32 MiB."""
    hash_ms: float
    """Of SHA-256 over 1 MiB."""


_TARGET = bytearray(len(_COPIED))


def machine_speed() -> MachineSpeed:
    """Look at it now; takes 50 ms."""
    copies, hashes = [], []
    for _ in range(_TRIES):
        begin_s = time.thread_time()
        _TARGET[:] = _COPIED
        copied_s = time.thread_time()
        hashlib.sha256(_HASHED).digest()
        copies.append(copied_s - begin_s)
        hashes.append(time.thread_time() - copied_s)
    return MachineSpeed(1e3 * min(copies), 1e3 * min(hashes))
