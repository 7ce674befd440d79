"""The table of measured kernel times: reading it, and the rules by which rows are set aside."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from servesim.config.load import shipped
from servesim.config.profiles import GpuProfile
from servesim.config.weight_formats import PEAK_OF_PRODUCT, WEIGHT_FORMATS
from servesim.cost.attention import CACHE_BYTES
from servesim.cost.experts import ROW_TILE, Routing, marlin_block
from servesim.errors import ConfigError, Problem

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RULES", "KernelTable", "read_kernel_table"]

RULES = {
    "above_peak": "faster than its bytes at the peak of HBM or link, or its operations at theirs",
    "slower_than_more": "takes more than 1.3 times as long as the same call with more rows, sequences or "
    "elements: a fall-back kernel, or a disturbed measurement",
    "launch_bound": "block-scaled fp8 was launched eagerly: within twice the shortest time of its kernel the "
    "host is what was measured",
}
"""Why a measured row may be set aside; the first that applies."""

_SHIPPED = "vllm_kernels.csv.gz"
_SLOWER = 1.3
_LAUNCH_BOUND = 2.0
_TYPE_OF = {
    "bfloat16": "bf16",
    "float16": "bf16",
    "half": "bf16",
    "int4_wo": "w4a16",
    "w4a16_mxfp4": "mxfp4",
}
_GROUPS: dict[str, tuple[tuple[str, ...], str]] = {  # what stays equal, and the size that grows
    "gemm": (("kind", "n", "k"), "m"),
    "generation_attention": (("kind", "heads", "kv_heads", "head_dim", "seq"), "batch"),
    "context_attention": (("kind", "heads", "kv_heads", "head_dim", "seq"), "batch"),
    "moe": (("kind", "n", "k", "num_experts", "experts_per_token"), "m"),
    "allreduce_custom": (("kind", "num_gpus"), "elements"),
}
_UNRULED = ("gemm_first", "elementwise")  # measured on a CPU: caches, not other kernels, make jumps
_EXPERT_COLUMNS = ("num_experts", "experts_per_token", "routing")
_LOAD_COLUMNS = ("tile_rows", "experts", "block_rows")
_NO_LOAD = (math.nan, math.nan, math.nan)
_NUMBERS = (
    "m",
    "n",
    "k",
    "batch",
    "seq",
    "heads",
    "kv_heads",
    "head_dim",
    "num_gpus",
    "elements",
    "latency_us",
)


class KernelTable:
    """The rows of one GPU, with ``kind`` (type of the product or the cache) and ``dropped`` (rule, or "").

    Rows of experts also have ``tile_rows`` and ``experts``, as cost.experts.ExpertRows.
    """

    def __init__(self, rows: pd.DataFrame, source: str) -> None:
        self._rows = rows
        self.source = source
        self.is_shipped = source == _SHIPPED

    def rows(self, op: str, kind: str | None = None, *, num_gpus: int | None = None) -> pd.DataFrame:
        """Rows of one operation, those set aside included."""
        chosen = self._rows[self._rows["op"] == op]
        if kind is not None:
            chosen = chosen[chosen["kind"] == kind]
        return chosen if num_gpus is None else chosen[chosen["num_gpus"] == num_gpus]

    def kinds(self, op: str) -> list[str]:
        """Types that an operation was measured with."""
        return sorted(self.rows(op)["kind"].unique())

    @property
    def degrees(self) -> list[int]:
        """Numbers of GPUs that all-reduce was measured with."""
        return sorted(int(n) for n in self.rows("allreduce_custom")["num_gpus"].unique())

    @property
    def dropped(self) -> pd.DataFrame:
        """Rows that a rule sets aside."""
        return self._rows[self._rows["dropped"] != ""]


def read_kernel_table(gpu: GpuProfile, file: Path | None = None) -> KernelTable:
    """The measured rows of ``gpu``, from the shipped table or another one of the same columns.

    Raises ConfigError when the file cannot be read, lacks a column, or has no row of this GPU.
    """
    import pandas as pd

    path = file or shipped("hardware") / "measurements" / _SHIPPED
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem("cannot be read as a table of kernel times", str(path), got=str(error))
        ) from None
    needed = {"gpu", "op", "dtype", "kv_dtype", "kernel", "backend_version", *_NUMBERS}
    if missing := sorted(needed - set(table.columns)):
        raise ConfigError(Problem(f"lacks the columns {', '.join(missing)}", str(path)))
    rows = table[table["gpu"] == gpu.name]
    if rows.empty:
        raise ConfigError(
            Problem(
                "has no kernel times of this GPU",
                str(path),
                got=gpu.name,
                hint=f"it has: {', '.join(sorted(table['gpu'].unique()))}",
                next_step="choose one of these, or give a table of your own with --measurements",
            )
        )
    if not (rows["latency_us"] > 0).all():
        raise ConfigError(Problem("has a latency_us that is not positive", str(path)))
    return KernelTable(_with_rules(gpu, _with_loads(_known(rows))), path.name)


def _known(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that a law is fitted to: no eager all-reduce; of NCCL only what vLLM itself chose to run."""
    types = rows["dtype"].where(~rows["op"].str.contains("attention"), rows["kv_dtype"])
    rows = rows.assign(kind=types.replace(_TYPE_OF))
    return rows[rows["op"].isin([*_GROUPS, *_UNRULED]) & ~rows["kernel"].str.contains("eager")]


def _with_loads(rows: pd.DataFrame) -> pd.DataFrame:
    """What the experts of every row had to do; tables without experts may lack their columns."""
    rows = rows.assign(**{name: float("nan") for name in _EXPERT_COLUMNS if name not in rows})
    loads = [
        _load(int(m), int(experts), int(each), str(routing)) if op == "moe" else _NO_LOAD
        for op, m, experts, each, routing in zip(
            rows["op"], rows["m"], *(rows[name] for name in _EXPERT_COLUMNS), strict=True
        )
    ]
    return rows.assign(**dict(zip(_LOAD_COLUMNS, zip(*loads, strict=True), strict=True)))


@cache
def _load(
    num_tokens: int, num_experts: int, experts_per_token: int, routing: str
) -> tuple[float, float, float]:
    """Rows with every expert's share rounded up to the tile, experts that get any, rows in Marlin's blocks.

    ``uniform``: drawn at random, each expert as likely as any other.  ``balanced``: as even as it goes.
    ``power_law_A``: shares are drawn between 1 and 0.8 tokens with density x^-A; here the quantiles in the
    middle of equal parts stand for the draw.
    """
    copies = num_tokens * experts_per_token
    if routing == "uniform":
        expected = Routing(num_experts, experts_per_token).load(num_tokens)
        return expected.tile_rows, expected.experts, expected.block_rows
    if routing == "balanced" or num_tokens == 1:
        rows = np.full(min(num_experts, copies), copies / min(num_experts, copies))
    else:
        power = 1.0 - float(routing.removeprefix("power_law_"))
        middles = (np.arange(num_experts) + 0.5) / num_experts
        share = (middles * (max(0.8 * num_tokens, 1.0001) ** power - 1.0) + 1.0) ** (1.0 / power)
        rows = np.minimum(copies * share / share.sum(), num_tokens)
    reached = np.minimum(rows, 1.0)  # a share of less than one row: the chance of getting one
    block = marlin_block(copies / num_experts)
    tile_rows, block_rows = (float(reached @ np.ceil(rows / tile)) * tile for tile in (ROW_TILE, block))
    return tile_rows, float(reached.sum()), block_rows


def _with_rules(gpu: GpuProfile, rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.assign(dropped="")
    marks: dict[str, Callable[[], pd.Series[bool]]] = {
        "launch_bound": lambda: _launch_bound(rows),
        "slower_than_more": lambda: _slower_than_more(rows),
        "above_peak": lambda: rows["latency_us"] / 1e6 < _least_s(gpu, rows),
    }
    for rule, mark in marks.items():  # the rule named first in RULES wins
        rows.loc[mark(), "dropped"] = rule
    return rows


def _least_s(gpu: GpuProfile, rows: pd.DataFrame) -> pd.Series[float]:
    """Seconds at the nominal peaks."""
    weight = (
        rows["kind"].map({kind: form.bytes_per_weight for kind, form in WEIGHT_FORMATS.items()}).fillna(2.0)
    )
    cache = rows["kind"].map(CACHE_BYTES).fillna(2.0)
    products = rows["kind"].map(PEAK_OF_PRODUCT).fillna("bf16")  # w4a16 and mxfp4 too: expanded
    peak = products.map({str(kind): peak for kind, peak in gpu.peak_flops_per_s.items()})
    attention_peak, bandwidth = gpu.peak_flops_per_s["bf16"], gpu.hbm_bandwidth_bytes_per_s
    gemm = (2.0 * rows["m"] * rows["n"] * rows["k"] / peak).combine(
        weight * rows["n"] * rows["k"] / bandwidth, max
    )
    kv = rows["batch"] * rows["seq"] * rows["kv_heads"] * rows["head_dim"] * 2.0 * cache / bandwidth
    matrices = 3.0 * rows["n"] * rows["k"]
    even = (rows["routing"] == "balanced") | (rows["m"] == 1)
    surely = rows["experts"].where(even, rows["experts_per_token"])
    experts = (2.0 * rows["m"] * rows["experts_per_token"] * matrices / peak).combine(
        weight * surely * matrices / bandwidth, max
    )
    pairs = rows["batch"] * 0.5 * rows["seq"] ** 2
    prompt = 4.0 * rows["heads"] * rows["head_dim"] * pairs / attention_peak
    link = rows["num_gpus"].map(
        {n: gpu.peer_bandwidth_bytes_per_s(int(n)) for n in rows["num_gpus"].dropna().unique()}
    )
    least = {
        "gemm": gemm,
        "generation_attention": kv,
        "context_attention": prompt,
        "moe": experts,
        "allreduce_custom": 2.0 * rows["elements"] / link,
    }
    seconds = rows["latency_us"] * 0.0
    for op, bound in least.items():
        seconds = seconds.where(rows["op"] != op, bound.astype(float))
    return seconds


def _slower_than_more(rows: pd.DataFrame) -> pd.Series[bool]:
    mark = rows["latency_us"] < 0.0
    for op, (equal, size) in _GROUPS.items():
        for _, group in rows[rows["op"] == op].groupby(list(equal)):
            ordered = group.sort_values(size, ascending=False)["latency_us"]
            least_of_more = ordered.cummin().shift(1)
            mark.loc[ordered.index] = ordered > _SLOWER * least_of_more
    return mark


def _launch_bound(rows: pd.DataFrame) -> pd.Series[bool]:
    blocks = (rows["op"] == "gemm") & (rows["kind"] == "fp8_block")
    shortest = rows.groupby("kernel")["latency_us"].transform("min")
    return blocks & (rows["latency_us"] < _LAUNCH_BOUND * shortest)
