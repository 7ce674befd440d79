"""A result as one JSON object: the keys of `vllm bench serve --save-result`, then ours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from servesim.analysis.caveats import Warned
from servesim.analysis.comparison import compare_summaries
from servesim.analysis.distribution import PERCENTILES, Distribution
from servesim.analysis.expectations import Finding
from servesim.analysis.summary import Speculation, Summary
from servesim.report.expectations import expectations_json
from servesim.report.words import memory_parts

__all__ = ["comparison_json", "plain", "result", "to_json"]


def to_json(summary: Summary, findings: Sequence[Finding] | None = None, **more: Any) -> str:
    """The result object as text, keys always in the same order, with a line end.

    ``findings``: expectations that were checked, to be told with it; ``more`` keys come last.
    """
    told = {} if findings is None else {"expectations": expectations_json(findings)}
    return _text({**result(summary), **told, **more})


def comparison_json(a: Summary, b: Summary, **more: Any) -> str:
    """Both results and the table of differences (``ratio`` is b / a) as text; ``more`` keys come last."""
    differences = [
        {"group": row.group, "label": row.label, "a": row.a, "b": row.b, "ratio": row.ratio}
        for row in compare_summaries(a, b)
    ]
    return _text({"a": result(a), "b": result(b), "differences": differences, **more})


def warnings_json(warnings: Sequence[Warned]) -> list[dict[str, str]]:
    """Warnings as objects."""
    return [
        {"kind": warned.caveat.key, "text": warned.text, "next_step": warned.next_step} for warned in warnings
    ]


def result(summary: Summary) -> dict[str, Any]:
    """The result object; a figure that does not exist (no sample, no SLO) is None, an infinite rate "inf"."""
    latencies = {"ttft": summary.ttft, "tpot": summary.tpot, "itl": summary.itl, "e2el": summary.e2el}
    figures: dict[str, Any] = plain(
        {
            "backend": "servesim",
            "label": summary.name,
            "model_id": summary.model,
            "num_prompts": summary.num_prompts,
            "request_rate": summary.request_rate,
            "burstiness": summary.burstiness,
            "max_concurrency": summary.max_concurrency,
            "duration": summary.duration_s,
            "completed": summary.completed,
            "failed": summary.failed,
            "total_input_tokens": summary.total_input_tokens,
            "total_output_tokens": summary.total_output_tokens,
            "request_throughput": summary.request_throughput,
            "request_goodput": summary.request_goodput,
            "output_throughput": summary.output_throughput,
            "total_token_throughput": summary.total_token_throughput,
            "max_output_tokens_per_s": summary.max_output_tokens_per_s,
            "max_concurrent_requests": summary.max_concurrent_requests,
            **{key: value for name, of in latencies.items() for key, value in _latency(name, of).items()},
            **_speculation(summary.speculation),
            **_ours(summary),
        }
    )
    return figures


def _latency(name: str, of: Distribution) -> dict[str, float]:
    figures = {"mean": of.mean_s, "median": of.median_s, "std": of.std_s}
    figures |= {f"p{percentile}": getattr(of, f"p{percentile}_s") for percentile in PERCENTILES}
    return {f"{figure}_{name}_ms": value_s * 1e3 for figure, value_s in figures.items()}


def _speculation(of: Speculation | None) -> dict[str, Any]:
    """vLLM's keys; its acceptance rate is in percent, those by position are shares."""
    if of is None:
        return {}
    return {
        "spec_decode_acceptance_rate": of.acceptance_rate * 100,
        "spec_decode_acceptance_length": of.acceptance_length,
        "spec_decode_num_drafts": of.num_drafts,
        "spec_decode_draft_tokens": of.draft_tokens,
        "spec_decode_accepted_tokens": of.accepted_tokens,
        "spec_decode_per_position_acceptance_rates": list(of.position_rates),
    }


def _ours(summary: Summary) -> dict[str, Any]:
    load, kv = summary.load, summary.kv
    return {
        **_latency("queue", summary.queue),
        "unfinished": summary.unfinished,
        "offered_request_rate": summary.offered_rate,
        "preemptions": load.preemptions,
        "prefix_cache_hit_rate": load.prefix_cache_hit_rate,
        "engine": asdict(load),
        "kv_cache": {
            "num_gpu_blocks": summary.memory.num_gpu_blocks,
            "pool_tokens": kv.fitting_tokens,
            "max_concurrency": kv.fitting_requests,
            "mean_usage": kv.mean_usage,
            "peak_usage": kv.peak_usage,
            "sharing_factor": kv.sharing,
            "saved_by_sharing": kv.saved_by_sharing,
            "classes_add_up_to_pool": kv.adds_up,
            "mean_share": kv.mean,
            "mean_share_in_queue": kv.in_queue,
            "external": kv.external,
            "external_in_queue": kv.external_in_queue,
        },
        **({"fleet": asdict(summary.fleet)} if summary.fleet else {}),
        "gpu_memory_bytes": {part.key: part.size_bytes for part in memory_parts(summary.memory)},
        "slo": [asdict(check) | {"met": check.met} for check in summary.slo],
        "warnings": warnings_json(summary.warnings),
        "provenance": {
            "servesim": version("servesim"),
            "seed": summary.seed,
            "config_hash": summary.config_hash,
            "gpu": summary.gpu,
            "num_gpus": summary.num_gpus,
            "partial": summary.interrupted,
        },
    }


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: None and "inf" (as vLLM writes an infinite rate) stand for them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def _text(value: dict[str, Any]) -> str:
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
