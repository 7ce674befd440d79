"""Cells of the accuracy table: what was measured how well, and what nobody has measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from servesim.analysis.validate import Finding
from servesim.config.files import list_data

__all__ = ["Cell", "Gap", "cells_of", "gaps_of", "sorted_cells"]

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Cell:
    """Errors of one figure on one kind of GPU at one load, from one source."""

    source: str
    gpu: str
    num_gpus: int
    regime: str
    metric: str
    calibrated: bool
    judged_on: str
    errors: tuple[float, ...]
    """ln(simulated / real), in the order of the recorded runs."""
    low: float
    high: float
    """95 % interval: of the median size over runs, or of one run's signed error over its requests."""

    @property
    def bias(self) -> float:
        """Mean signed error."""
        return float(np.mean(self.errors))

    @property
    def median(self) -> float:
        """Median absolute error."""
        return float(np.median(np.abs(self.errors)))

    @property
    def p90(self) -> float:
        """90th percentile of the absolute error."""
        return float(np.percentile(np.abs(self.errors), 90))


@dataclass(frozen=True, slots=True)
class Gap:
    """A GPU or a feature that the simulator offers and no recorded run has."""

    kind: str
    name: str


def cells_of(findings: Iterable[Finding]) -> list[Cell]:
    """The findings by source, GPU, load, figure and calibration."""
    groups: defaultdict[tuple[str, str, int, str, str, bool, str], list[Finding]] = defaultdict(list)
    for one in findings:
        key = (one.source, one.gpu, one.num_gpus, one.regime, one.metric, one.calibrated, one.judged_on)
        groups[key].append(one)
    return [Cell(*key, tuple(one.error for one in group), *_interval(group)) for key, group in groups.items()]


def sorted_cells(cells: Iterable[Cell]) -> list[Cell]:
    """The worst first, by the median absolute error."""
    return sorted(cells, key=lambda cell: (-round(cell.median, 6), cell.source, cell.gpu, cell.metric))


def _interval(group: Sequence[Finding]) -> tuple[float, float]:
    if len(group) == 1:
        return group[0].low, group[0].high
    sizes = np.array([abs(one.error) for one in group])
    draws = np.random.default_rng(0).integers(0, len(sizes), (_RESAMPLES, len(sizes)))
    low, high = np.percentile(np.median(sizes[draws], axis=1), (2.5, 97.5))
    return float(low), float(high)


_FEATURES = (
    "tensor parallelism 2",
    "tensor parallelism 4",
    "tensor parallelism 8",
    "pipeline parallelism",
    "expert parallelism",
    "mixture of experts",
    "latent attention (MLA)",
    "sliding windows",
    "async scheduling",
    "prefix caching with hits",
    "fp8 KV cache",
    "int8 KV cache",
    "int4 KV cache",
    "fp8 weights",
    "fp8_block weights",
    "int8 weights",
    "w4a16 weights",
    "mxfp4 weights",
    "nvfp4 weights",
    "eager mode",
    "CUDA graphs piecewise",
    "CUDA graphs full",
    "CUDA graphs full_decode_only",
    "no chunked prefill",
    "speculative decoding",
    "priority scheduling",
    "swapping",
    "KV eviction",
    "static batching",
    "orca batching",
    "prefill-first batching",
    "contiguous allocator",
)
"""Everything that has kernels or rules of its own; names as in Finding.features."""


def gaps_of(findings: Sequence[Finding]) -> list[Gap]:
    """GPUs and features without a single timed run; memory read-outs do not count."""
    timed = [one for one in findings if one.regime != "memory"]
    gpus = {one.gpu for one in timed}
    features = {feature for one in timed for feature in one.features}
    return [Gap("GPU", name) for name in list_data("gpus") if name not in gpus] + [
        Gap("feature", name) for name in _FEATURES if name not in features
    ]
