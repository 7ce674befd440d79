"""Coefficients of a GPU's operator laws from measured kernel times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from servesim.analysis.kernel_table import KernelTable
from servesim.config.gpu_file import FirstCallCoefficients, MeasuredEfficiency
from servesim.config.profiles import GpuProfile, KernelError
from servesim.config.weight_formats import WEIGHT_FORMATS, Quantization
from servesim.cost.attention import AttentionShape, DecodeAttention, PrefillAttention
from servesim.cost.collectives import AllReduce
from servesim.cost.experts import ExpertRows, GroupedExperts
from servesim.cost.first_calls import first_call_s
from servesim.cost.ops import Gemm
from servesim.errors import ConfigError, Problem
from servesim.units import GB

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["KernelFit", "fit_gpu", "law_seconds"]

Floats = npt.NDArray[np.float64]
Coefficients = dict[str, float]
Range = tuple[float, float, float]

_DIGITS = 3  # significant, of a coefficient
_RESTARTS = 4
_ELEMENTWISE_LAUNCH_US = 2.5  # not in the shipped table; estimate
_ORIGIN = ", measured tables of ai-dynamo/aiconfigurator, Apache-2.0"
_BLOCK_SCALED = ("compute", "wave", "convert_bytes")  # what launch-bound tables can tell of block-scaled fp8

# Coefficient: start, least, most, in the units of the GPU's file. Memory shares stop short of 1: no kernel
# streams faster, and what narrow matrices lack belongs to narrow_columns.
_RANGES: dict[str, dict[str, Range]] = {
    "gemm": {
        "compute": (0.7, 0.05, 1.0),
        "memory": (0.85, 0.1, 0.95),
        "launch_us": (4.0, 1.0, 500.0),
        "knee": (4.0, 1.0, 20.0),
        "wave": (0.2, 0.0, 1.0),
        "narrow_columns": (500.0, 0.0, 20_000.0),
        "convert_bytes": (5.0, 0.0, 100.0),
        "turned": (0.2, 0.0, 3.0),
    },
    "experts": {
        "compute": (0.5, 0.02, 1.0),
        "memory": (0.8, 0.1, 0.97),
        "launch_us": (30.0, 1.0, 500.0),
        "per_expert_us": (0.2, 0.0, 1000.0),
        "row_bytes": (4.0, 0.0, 100.0),
        "knee": (1.5, 1.0, 20.0),
    },
    "decode_attention": {
        "launch_us": (12.0, 1.0, 500.0),
        "per_seq_kv_head_ns": (15.0, 0.0, 20_000.0),
        "memory": (0.85, 0.1, 0.97),
    },
    "prefill_attention": {
        "launch_us": (12.0, 2.0, 500.0),
        "per_key_ns": (3.0, 0.0, 1000.0),
        "compute": (0.6, 0.05, 1.0),
        "short_tokens": (900.0, 0.0, 20_000.0),
    },
    "elementwise": {
        "launch_us": (50.0, 1.0, 500.0),
        "gb_per_s": (5.0, 0.1, 1e4),
    },
    "first_call": {
        "launch_us": (500.0, 0.0, 1e5),
        "per_row_us": (5.0, 0.0, 1000.0),
        "per_row_k_ns": (5.0, 0.0, 1000.0),
        "turned": (1.0, 0.0, 10.0),
    },
    "all_reduce": {
        "small_launch_us": (5.0, 1.0, 100.0),
        "small_gb_per_s": (100.0, 10.0, 1e4),
        "middle_launch_us": (8.0, 1.0, 200.0),
        "middle_bus_gb_per_s": (200.0, 10.0, 1e4),
        "large_launch_us": (80.0, 1.0, 500.0),
        "large_bus_gb_per_s": (200.0, 10.0, 1e4),
    },
}
_OPS = {
    "gemm": "gemm",
    "experts": "moe",
    "decode_attention": "generation_attention",
    "prefill_attention": "context_attention",
    "all_reduce": "allreduce_custom",
}
_FORMATS: dict[str, Quantization] = {
    "bf16": "none",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "w4a16": "w4a16",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}


@dataclass(frozen=True)
class KernelFit:
    """A fitted block, and the rows that it was not fitted to."""

    gpu: str
    efficiency: MeasuredEfficiency
    dropped: pd.DataFrame


def fit_gpu(gpu: GpuProfile, table: KernelTable) -> KernelFit:
    """Fit every law of ``gpu`` to its measured times; the loss is the mean of |ln(law / measured)|.

    What the table does not hold (the elementwise launch) stays an estimate.  Block-scaled fp8 was launched
    eagerly: only ``compute``, ``wave`` and ``convert_bytes`` are fitted, the rest is that of per-tensor fp8.
    Raises ConfigError when scipy is missing or an operation has no rows.
    """
    block: dict[str, dict[Any, Coefficients]] = {}
    errors: dict[str, KernelError] = {}
    for law, op in _OPS.items():
        block[law] = {}
        for key in table.degrees if law == "all_reduce" else table.kinds(op):
            rows = table.rows(op, num_gpus=int(key)) if law == "all_reduce" else table.rows(op, str(key))
            fixed: Coefficients = {}
            if law == "gemm" and key == "bf16":
                fixed = {"convert_bytes": 0.0}  # its input comes in its type
            if law == "prefill_attention" and gpu.sm_count == 1:
                fixed = {"per_key_ns": 0.0}  # no core waits for the last tile of another
            if law == "gemm" and key == "fp8_block":
                base = block["gemm"].get("fp8") or block["gemm"]["bf16"]
                fixed = {name: value for name, value in base.items() if name not in _BLOCK_SCALED}
            block[law][key], errors[f"{law}.{key}"] = _fit(gpu, law, key, rows, fixed)
    moving = table.rows("elementwise")
    versions = ", ".join(sorted(table.rows("gemm")["backend_version"].unique()))
    data = {
        "provenance": f"ours: `servesim fit {gpu.name}` on {table.source} (vLLM {versions} kernel times"
        f"{_ORIGIN if table.is_shipped else ''}); the loss is the mean of |ln(law / measured)|",
        **block,
        "elementwise_launch_us": _ELEMENTWISE_LAUNCH_US if moving.empty else 0.0,
        "elementwise": {kind: _elementwise(rows) for kind, rows in moving.groupby("kernel", sort=False)},
        **_first_call(table),
        "errors": errors,
    }
    return KernelFit(gpu.name, MeasuredEfficiency.model_validate(data), table.dropped)


def _elementwise(rows: pd.DataFrame) -> Coefficients:
    """Launch and rate of one kind of kernels that only move data."""
    moved_gb, measured_us = 2.0 * rows["elements"].to_numpy(float) / GB, rows["latency_us"].to_numpy(float)

    def loss(values: Mapping[str, float]) -> float:
        law_us = values["launch_us"] + 1e6 * moved_gb / values["gb_per_s"]
        return float(np.abs(np.log(law_us / measured_us)).mean())

    return _minimised(loss, _RANGES["elementwise"])


def _first_call(table: KernelTable) -> dict[str, Coefficients]:
    """What first calls take on top; nothing where none was measured."""
    rows = table.rows("gemm_first")
    if rows.empty:
        return {}
    sizes = [tuple(int(size) for size in row) for row in rows[["m", "n", "k"]].to_numpy()]
    measured_us: Any = rows["latency_us"].to_numpy(float)

    def loss(values: Mapping[str, float]) -> float:
        efficiency = FirstCallCoefficients.model_validate(values).to_si()
        law_us = 1e6 * np.array([first_call_s(efficiency, *size) for size in sizes])
        return float(np.abs(np.log(law_us / measured_us)).mean())

    return {"first_call": _minimised(loss, _RANGES["first_call"])}


def law_seconds(gpu: GpuProfile, law: str, key: Any, rows: pd.DataFrame) -> Floats:
    """What a law of ``gpu`` says for measured rows; ``law`` and ``key`` as in its file: gemm, bf16."""
    return _seconds(gpu, law, key, _columns(rows))


def _columns(rows: pd.DataFrame) -> dict[str, Any]:
    return {name: rows[name].to_numpy(float) for name in rows.columns if rows[name].dtype.kind in "if"}


def _seconds(gpu: GpuProfile, law: str, key: Any, columns: dict[str, Any]) -> Floats:
    """The laws take arrays where they take numbers, which their signatures do not say."""
    seconds: Any
    if law == "gemm":
        seconds = Gemm(gpu, WEIGHT_FORMATS[_FORMATS[key]]).seconds(*(columns[name] for name in "mnk"))
    elif law == "experts":
        name = _FORMATS[key]
        rows_each = columns["m"] * columns["experts_per_token"]
        load: Any = ExpertRows(rows_each, *(columns[each] for each in ("tile_rows", "experts", "block_rows")))
        grouped = GroupedExperts(gpu, name, WEIGHT_FORMATS[name])
        seconds = grouped.seconds(load, 2.0 * columns["n"], columns["n"], columns["k"])
    elif law == "all_reduce":
        seconds = AllReduce(gpu, int(key)).seconds(2.0 * columns["elements"])
    else:
        heads, kv_heads, batch, seq = (columns[name] for name in ("heads", "kv_heads", "batch", "seq"))
        flops = 4.0 * columns["head_dim"] * heads
        shape = AttentionShape(heads, kv_heads, 2.0 * columns["head_dim"] * kv_heads, flops, flops)
        if law == "decode_attention":
            decode = DecodeAttention(gpu, key, shape)
            seconds = decode.base_s(batch) + batch * seq * decode.per_context_token_s
        else:
            prefill = PrefillAttention(gpu, key, shape)
            seconds = prefill.base_s(seq) + batch * prefill.chunk_s(seq, 0, None)
    return np.asarray(seconds, dtype=np.float64)


def _fit(
    gpu: GpuProfile, law: str, key: Any, rows: pd.DataFrame, fixed: Coefficients
) -> tuple[Coefficients, KernelError]:
    kept = rows[rows["dropped"] == ""]
    if kept.empty:
        raise ConfigError(Problem(f"no measured row of {law}.{key} is left to fit", got=gpu.name))

    def log_errors(values: Mapping[str, float], over: dict[str, Any]) -> Floats:
        candidate = _with_coefficients(gpu, law, key, {**fixed, **values})
        measured: Floats = over["latency_us"] / 1e6
        return np.abs(np.log(_seconds(candidate, law, key, over) / measured))

    fitted = _columns(kept)

    def loss(values: Mapping[str, float]) -> float:
        return float(log_errors(values, fitted).mean()) + _disorder(values)

    found = {**fixed, **_minimised(loss, _ranges(gpu, law, key, fixed))}
    found = {name: found[name] for name in _RANGES[law] if name in found}
    within, everywhere = log_errors(found, fitted), log_errors(found, _columns(rows))
    return found, KernelError(
        mean_percent=round(100 * float(within.mean()), 2),
        p90_percent=round(100 * float(np.quantile(within, 0.9)), 2),
        rows=len(kept),
        dropped=len(rows) - len(kept),
        mean_with_dropped_percent=round(100 * float(everywhere.mean()), 2) if len(rows) > len(kept) else None,
    )


def _ranges(gpu: GpuProfile, law: str, key: Any, fixed: Coefficients) -> dict[str, Range]:
    ranges = {name: span for name, span in _RANGES[law].items() if name not in fixed}
    if gpu.sm_count > 1:  # only a core turns products
        ranges.pop("turned", None)
    if law == "all_reduce":  # bus bandwidth is bytes sent: no more than the link takes
        most = gpu.peer_bandwidth_bytes_per_s(int(key)) / GB
        ranges["large_bus_gb_per_s"] = (0.7 * most, 0.01 * most, most)
    return ranges


def _disorder(values: Mapping[str, float]) -> float:
    """A penalty where all-reduce algorithms would swap places: each launch is longer than the one before."""
    launches = [values[name] for name in values if name.endswith("_launch_us")]
    return sum(max(0.0, a / b - 1.0) for a, b in pairwise(launches))


def _with_coefficients(gpu: GpuProfile, law: str, key: Any, values: Coefficients) -> GpuProfile:
    """``gpu`` with one law's coefficients, given in the units of its file, and any others beside them."""
    start = {name: {each: span[0] for each, span in ranges.items()} for name, ranges in _RANGES.items()}
    data: dict[str, dict[Any, Coefficients]] = {
        "gemm": {"bf16": start["gemm"]},
        "experts": {},
        "decode_attention": {"bf16": start["decode_attention"], "fp8": start["decode_attention"]},
        "prefill_attention": {"bf16": start["prefill_attention"], "fp8": start["prefill_attention"]},
        "all_reduce": {2: start["all_reduce"]},
    }
    data[law][key] = values
    candidate = MeasuredEfficiency.model_validate(
        {"provenance": "candidate", "elementwise_launch_us": 0.0, **data}
    )
    return gpu.model_copy(update={"efficiency": candidate.to_si()})


def _minimised(loss: Callable[[Mapping[str, float]], float], ranges: Mapping[str, Range]) -> Coefficients:
    """Coefficients with the least loss: Nelder-Mead from a fixed start, restarted where it stopped.

    Deterministic; rounded to 3 significant digits.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise ConfigError(
            Problem("fitting needs scipy, which is not installed", next_step="pip install 'servesim[fit]'")
        ) from None
    scale = np.array([max(start, 1e-3) for start, _, _ in ranges.values()])
    bounds = [(least / s, most / s) for (_, least, most), s in zip(ranges.values(), scale, strict=True)]

    def named(point: Floats) -> Coefficients:
        return dict(zip(ranges, (float(value) for value in point * scale), strict=True))

    point = np.ones(len(scale))
    options = {"xatol": 1e-4, "fatol": 1e-7, "maxiter": 4000, "adaptive": len(point) > 4}
    for _ in range(_RESTARTS):
        found = minimize(
            lambda at: loss(named(at)), point, method="Nelder-Mead", bounds=bounds, options=options
        )
        point = found.x
    rounded = {name: float(f"{value:.{_DIGITS}g}") for name, value in named(point).items()}
    return {name: value if value > 1e-4 else 0.0 for name, value in rounded.items()}
