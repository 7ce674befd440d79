"""Routed experts: which of them the tokens of a step reach, on the busiest GPU, and how long they take."""

from __future__ import annotations

from itertools import count
from math import erfc, sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from servesim.config.profiles import PEAK_OF_EXPERTS, ExpertEfficiency, ExpertFormat, GpuProfile
from servesim.config.scenario import EngineVersion
from servesim.config.weight_formats import PEAK_OF_PRODUCT, ProductType, Quantization, WeightFormat
from servesim.cost.ops import gemm_efficiency, joined

__all__ = ["ROW_TILE", "ExpertRows", "GroupedExperts", "Routing", "marlin_block", "popularities"]

Floats = npt.NDArray[np.float64]

ROW_TILE = 16
"""Rows that an expert computes even when fewer are routed to it; of 16, 32, 64 and 128 the best fit."""

# vLLM multiplies MXFP4 experts with Marlin, its kernel of w4a16, wherever it has no better one: always on
# GPUs older than Hopper and on workstation Blackwell, on Hopper as long as users had to install the Triton
# kernels themselves (vllm-project/vllm PR 27370, after 0.11).
_MARLIN_ALWAYS = ("ampere", "ada", "blackwell-rtx")
_MARLIN_ON_HOPPER: tuple[EngineVersion, ...] = ("0.6", "0.11")
# Marlin's tiles: vLLM pads MXFP4 experts to multiples of these, gpt-oss's 2,880 to 3,072 and 2,944, so that
# 0.92 of the rate is useful. Of the rate of int4 experts that fit the tiles it reaches 0.92 on RTX PRO 6000
# and 0.95 on L40S (8,192 tokens; aiconfigurator-core).
_MARLIN_HIDDEN, _MARLIN_WIDTH = 256, 128

_MARLIN_BLOCKS = (8, 16, 32, 48, 64)
_MARLIN_FULL = 0.9  # vLLM, fused_marlin_moe

# Whose coefficients stand in for a format that was not measured on the GPU, in this order.
_STAND_INS: dict[Quantization, tuple[ExpertFormat, ...]] = {
    "none": ("bf16",),
    "fp8": ("fp8", "fp8_block", "bf16"),
    "fp8_block": ("fp8_block", "bf16"),
    "int8": ("fp8_block", "bf16"),
    "w4a16": ("w4a16", "bf16"),
    "mxfp4": ("mxfp4", "w4a16", "bf16"),
    "nvfp4": ("nvfp4", "w4a16", "bf16"),
}


class ExpertRows(NamedTuple):
    """What one GPU's experts have to do in a step."""

    rows: float
    """Routed copies of tokens."""
    tile_rows: float
    """The same with every expert's share rounded up to the tile."""
    experts: float
    """Experts that get at least one row; their weights are read."""
    block_rows: float
    """The same as tile_rows with the blocks that Marlin chooses."""


class GroupedExperts:
    """A layer's routed experts: sorting rows by expert, both products, activation and sum, as one operation.

    launch + a share per expert reached + (compute^knee + memory^knee)^(1/knee) + moving the rows.  Grouped
    products are far from the rate of plain ones: many small matrices, no tile shared between experts.  Where
    the GPU's file has no experts of any format, its plain products stand in, which is too fast.  Which kernel
    multiplies MXFP4 depends on the GPU and on vLLM's version; without ``version`` it is the newest one's.
    """

    __slots__ = (
        "_activation_bytes",
        "_bytes_per_s",
        "_flops_per_s",
        "_is_padded",
        "_knee",
        "_launch_s",
        "_per_expert_s",
        "_row_s",
        "_runs_marlin",
        "_weight_bytes",
    )

    def __init__(
        self,
        gpu: GpuProfile,
        name: Quantization,
        weights: WeightFormat,
        version: EngineVersion | None = None,
    ) -> None:
        product = weights.product_on({str(kind): peak for kind, peak in gpu.peak_flops_per_s.items()})
        self._is_padded = name == "mxfp4" and _runs_marlin(gpu, version)
        self._runs_marlin = self._is_padded or name == "w4a16"
        law = _efficiency(gpu, "w4a16" if self._is_padded else name, product)
        self._weight_bytes = weights.bytes_per_weight
        self._activation_bytes = weights.activation_bytes if product == weights.product else 2.0
        self._flops_per_s = gpu.peak_flops_per_s[PEAK_OF_PRODUCT[product]] * law.compute
        self._bytes_per_s = gpu.hbm_bandwidth_bytes_per_s * law.memory
        self._row_s = law.row_bytes / gpu.hbm_bandwidth_bytes_per_s
        self._launch_s, self._per_expert_s, self._knee = law.launch_s, law.per_expert_s, law.knee

    def seconds(self, load: ExpertRows, up: float, width: float, hidden: float) -> float:
        """Time of experts with matrices of hidden x up and width x hidden."""
        up, width, hidden = self._computed_sizes(up, width, hidden)
        weights = hidden * (up + width)
        moved_bytes = self._weight_bytes * load.experts * weights
        moved_bytes += load.rows * (self._activation_bytes * (hidden + width) + 2.0 * (up + hidden))
        tile_rows = load.block_rows if self._runs_marlin else load.tile_rows
        work_s = joined(
            2.0 * tile_rows * weights / self._flops_per_s, moved_bytes / self._bytes_per_s, self._knee
        )
        return self._launch_s + self._per_expert_s * load.experts + work_s + self._row_s * load.rows * hidden

    def reading_s(self, load: ExpertRows, up: float, width: float, hidden: float) -> float:
        """What of ``seconds`` goes to launching and to reading the weights; the rest, to the rows."""
        up, width, hidden = self._computed_sizes(up, width, hidden)
        read_bytes = self._weight_bytes * load.experts * hidden * (up + width)
        return self._launch_s + self._per_expert_s * load.experts + read_bytes / self._bytes_per_s

    def _computed_sizes(self, up: float, width: float, hidden: float) -> tuple[float, float, float]:
        if not self._is_padded:
            return up, width, hidden
        padded = -(-width // _MARLIN_WIDTH) * _MARLIN_WIDTH
        return up * (padded / width), padded, -(-hidden // _MARLIN_HIDDEN) * _MARLIN_HIDDEN


def _runs_marlin(gpu: GpuProfile, version: EngineVersion | None) -> bool:
    """Whether MXFP4 experts are multiplied by Marlin."""
    return gpu.architecture in _MARLIN_ALWAYS or (
        gpu.architecture == "hopper" and version in _MARLIN_ON_HOPPER
    )


def marlin_block(rows_per_expert: float) -> int:
    """Rows of Marlin's blocks in vLLM: the smallest that an expert's mean share fills to less than 0.9."""
    for block in _MARLIN_BLOCKS:
        if rows_per_expert / block < _MARLIN_FULL:
            return block
    return _MARLIN_BLOCKS[-1]


def _blocks(reached: float, mean_rows: float, block: int) -> float:
    """Expected number of blocks of an expert that tokens choose at random: the sum of P(rows > j blocks).

    ``reached`` is the first of these probabilities; the others are a normal variable's.
    """
    blocks, spread = reached, sqrt(2.0 * mean_rows)
    for j in count(1):
        more = 0.5 * erfc((j * block + 0.5 - mean_rows) / spread)
        if more < 1e-4:
            return blocks
        blocks += more
    raise AssertionError


def _efficiency(gpu: GpuProfile, name: Quantization, product: ProductType) -> ExpertEfficiency:
    known = gpu.efficiency.experts
    for stand_in in _STAND_INS[name]:
        if stand_in in known and (product != "bf16" or PEAK_OF_EXPERTS[stand_in] == "bf16"):
            return known[stand_in]
    plain = gemm_efficiency(gpu, product)
    return ExpertEfficiency(
        compute=plain.compute, memory=plain.memory, launch_s=plain.launch_s, per_expert_s=0.0, knee=plain.knee
    )


def popularities(num_experts: int, experts_per_token: int, skew: float) -> Floats:
    """Probability of each expert to be among those that a token is routed to, most popular first.

    Zipf: proportional to 1 / rank^skew, but none above 1; the sum is ``experts_per_token``.  0 is uniform.
    """
    weights = np.arange(1.0, num_experts + 1.0) ** -skew
    certain = 0  # experts that every token is routed to
    while True:
        scale = (experts_per_token - certain) / weights[certain:].sum() if certain < num_experts else 0.0
        above = int(np.count_nonzero(scale * weights[certain:] > 1.0))
        if not above:
            return np.concatenate([np.ones(certain), np.minimum(scale * weights[certain:], 1.0)])
        certain += above


class Routing:
    """Expected load of the busiest of ``num_ranks`` GPUs that share a layer's experts.

    An expert is reached by at least one of M tokens with 1 - (1 - popularity)^M.  Whole experts are dealt out
    by popularity, rank 0 first, so that the first GPU has the most popular of each round.  On top of its mean
    the busiest one gets what chance adds: the expected largest of num_ranks normal variables (Blom) whose
    variance is that of drawing without replacement; it is charged as more tokens.  Against drawing at random
    rows are within 3 % and experts within 9 % from 16 tokens on, and up to 11 and 17 % low for one token.
    """

    __slots__ = (
        "_counts",
        "_extra_per_root_token",
        "_most_tokens",
        "_popularity",
        "_rows_per_token",
    )

    def __init__(
        self,
        num_experts: int,
        experts_per_token: int,
        num_ranks: int = 1,
        skew: float = 0.0,
    ) -> None:
        own = popularities(num_experts, experts_per_token, skew)[::num_ranks]
        self._popularity, self._counts = np.unique(own, return_counts=True)
        share = float(own.sum())
        self._rows_per_token = share
        self._most_tokens = min(experts_per_token, len(own)) / share  # in units of the step's tokens
        spread = 0.0
        if num_ranks > 1:
            part = share / experts_per_token
            left = (num_experts - experts_per_token) / max(1, num_experts - 1)
            variance = experts_per_token * part * max(0.0, 1.0 - part) * left
            largest = NormalDist().inv_cdf((num_ranks - 0.375) / (num_ranks + 0.25))
            spread = largest * sqrt(variance) / share
        self._extra_per_root_token = spread

    def load(self, num_tokens: int) -> ExpertRows:
        """The busiest GPU's rows and experts in a step of ``num_tokens``."""
        tokens = num_tokens + self._extra_per_root_token * sqrt(num_tokens)
        tokens = min(tokens, num_tokens * self._most_tokens)
        reached = 1.0 - (1.0 - self._popularity) ** tokens
        rows_each = tokens * self._popularity / reached
        tile_rows = reached * np.ceil(rows_each / ROW_TILE) * ROW_TILE
        mean_rows = tokens * self._popularity
        block = marlin_block(float(self._counts @ mean_rows) / float(self._counts.sum()))
        pairs = zip(reached.tolist(), mean_rows.tolist(), strict=True)
        block_rows = block * np.array([_blocks(chance, rows, block) for chance, rows in pairs])
        return ExpertRows(
            rows=tokens * self._rows_per_token,
            tile_rows=float(self._counts @ tile_rows),
            experts=float(self._counts @ reached),
            block_rows=float(self._counts @ block_rows),
        )
