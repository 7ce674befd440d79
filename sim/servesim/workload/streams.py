"""Random numbers by name: value i of a stream is a function of (seed, stream, i) and of nothing else.

A stream is the counter-based generator Philox 4x64 (Salmon et al., SC 2011) with a key hashed from the
seed and the stream's name; counter c yields the words 4c to 4c + 3, so any range can be had on its own.
How many values are drawn, in which order, and what other streams do changes no value: two systems under
one seed see the same requests, and more requests extend a workload without changing its begin.

Logarithms and the like may differ in the last bit from one CPU to another.  Times are therefore rounded to
2 ** -24 of their mean; sums of such numbers are exact too, hence the same however they are grouped.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "Column", "FloatArray", "IntArray", "Stream"]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

BLOCK = 8192
"""Values generated at a time."""
_CACHED_BLOCKS = 64
_WORDS_PER_COUNTER = 4
_GRID = 2.0**24

_Number = TypeVar("_Number", int, float)


class Stream:
    """The random numbers of one name; every method gives the values start to start + count - 1."""

    def __init__(self, seed: int, name: str) -> None:
        self._seed = seed
        self._name = name
        self._key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest())

    def child(self, name: str) -> Stream:
        """An independent stream for a part of what each index needs."""
        return Stream(self._seed, f"{self._name}/{name}")

    def uniforms(self, start: int, count: int) -> FloatArray:
        """Uniform on [0, 1), with 53 random bits."""
        counter, skipped = divmod(start, _WORDS_PER_COUNTER)
        words = np.random.Philox(key=self._key, counter=counter).random_raw(skipped + count)[skipped:]
        uniforms: FloatArray = np.multiply(words >> np.uint64(11), 2.0**-53)
        return uniforms

    def normals(self, start: int, count: int) -> FloatArray:
        """Standard normal (Box and Muller 1958), from two words each."""
        pairs = self.uniforms(2 * start, 2 * count).reshape(count, 2)
        radii: FloatArray = np.sqrt(-2.0 * np.log1p(-pairs[:, 0]))
        angles: FloatArray = np.cos(2.0 * np.pi * pairs[:, 1])
        return radii * angles

    def exponentials(self, start: int, count: int) -> FloatArray:
        """Exponential with mean 1."""
        return _on_grid(-np.log1p(-self.uniforms(start, count)))

    def gammas(self, shape: float, start: int, count: int) -> FloatArray:
        """Gamma with mean 1 and variance 1 / shape (Marsaglia and Tsang 2000).

        Rejection takes an unknown number of tries; every try has its own child streams, so that a value
        depends on its own index alone.
        """
        boosted = shape if shape >= 1 else shape + 1
        d = boosted - 1 / 3
        c = 1 / np.sqrt(9 * d)
        values = np.empty(count)
        open_ = np.arange(count)
        tries = 0
        while open_.size:
            attempt = self.child(str(tries))
            normal = attempt.child("normal").normals(start, count)[open_]
            accept = np.log1p(-attempt.child("accept").uniforms(start, count)[open_])
            cube = (1 + c * normal) ** 3
            logs = np.log(np.where(cube > 0, cube, 1.0))
            accepted = (cube > 0) & (accept < 0.5 * normal**2 + d * (1 - cube + logs))
            values[open_[accepted]] = d * cube[accepted]
            open_ = open_[~accepted]
            tries += 1
        if shape < 1:  # gamma(shape) = gamma(shape + 1) * uniform ** (1 / shape)
            values *= (1 - self.child("boost").uniforms(start, count)) ** (1 / shape)
        return _on_grid(values / shape)


class Column(Generic[_Number]):
    """A long column of numbers by index, computed in blocks on demand; a few blocks are kept."""

    def __init__(self, block: Callable[[int, int], NDArray[np.generic]]) -> None:
        """``block(start, count)`` gives the values of a range as float64 or int64."""
        self._compute = block
        self._blocks: dict[int, array[_Number]] = {}

    def __getitem__(self, index: int) -> _Number:
        block = self._blocks.get(index // BLOCK)
        if block is None:
            block = self._load(index // BLOCK)
        return block[index % BLOCK]

    def _load(self, number: int) -> array[_Number]:
        if len(self._blocks) >= _CACHED_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        values = self._compute(number * BLOCK, BLOCK)
        self._blocks[number] = array("d" if values.dtype.kind == "f" else "q", values.tobytes())
        return self._blocks[number]


def _on_grid(values: FloatArray) -> FloatArray:
    rounded: FloatArray = np.rint(values * _GRID) / _GRID
    return rounded
