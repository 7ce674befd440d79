"""Random workloads over all settings, drawn to be difficult: full pools, shared prefixes, odd sizes."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

__all__ = ["Workload", "workloads"]

Workload = tuple[dict[str, Any], list[dict[str, Any]]]
"""Settings and requests, as ``servesim trace`` reads them."""

STEP_TIME = {"a": 0.008, "b": 2e-5, "c": 2e-8}
_rates = st.sampled_from([0.0, 0.3, 0.6, 0.8, 1.0])


@st.composite
def workloads(draw: st.DrawFn, *, speculation: bool | None = False) -> Workload:
    """Settings and requests that vLLM would start with.

    ``speculation``: True and False pin it, None draws it.
    """
    settings = draw(_settings(speculation))
    return settings, draw(_requests(settings))


@st.composite
def _settings(draw: st.DrawFn, speculation: bool | None) -> dict[str, Any]:
    block_size = draw(st.sampled_from([16, 8, 4, 3, 2, 1]))
    max_model_len = draw(st.one_of(st.integers(4, 60), st.integers(40, 300)))
    chunked = draw(st.sampled_from([True, True, True, False]))
    budget = draw(st.one_of(st.integers(2, 40), st.integers(20, 400)))
    if not chunked:
        budget = max(budget, max_model_len)
    settings: dict[str, Any] = {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": budget,
        "max_num_seqs": draw(st.integers(1, min(24, budget))),
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": draw(st.sampled_from([True, True, False])),
        "long_prefill_token_threshold": draw(
            st.one_of(st.just(0), st.just(0), st.integers(1, min(40, max_model_len)))
        ),
        "policy": draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
        "scheduler_reserve_full_isl": draw(st.sampled_from([True, True, False])),
        "watermark": draw(st.sampled_from([0.0, 0.0, 0.02, 0.1, 0.3])),
        "async_scheduling": draw(st.booleans()),
        "step_time": STEP_TIME,
    }
    window = st.integers(2, 80)
    groups = draw(
        st.one_of(
            st.none(),
            st.none(),
            st.none(),
            st.tuples(window),
            st.tuples(st.none(), window),
            window.map(lambda w: (w, None, w)),
        )
    )
    if groups is not None:
        settings["kv_groups"] = [
            {"type": "full"} if w is None else {"type": "sliding", "window": w} for w in groups
        ]
    if draw(st.booleans()) if speculation is None else speculation:
        settings["spec"] = draw(_speculation())
    settings["num_gpu_blocks"] = draw(_pools(settings))
    if draw(st.integers(0, 3)) == 3:
        settings["sched_overhead"] = draw(st.sampled_from([0.0002, 0.01]))
    return settings


@st.composite
def _speculation(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 5))
    return {
        "num_tokens": count,
        "acceptance": draw(st.one_of(_rates, st.lists(_rates, min_size=count, max_size=count))),
        "mode": draw(st.sampled_from(["ngram", "draft", "eagle"])),
        "seed": draw(st.integers(0, 99)),
    }


@st.composite
def _pools(draw: st.DrawFn, settings: dict[str, Any]) -> int:
    """Blocks, with the null block: what one longest request needs, as vLLM demands, or somewhat more."""
    size, longest = settings["block_size"], settings["max_model_len"]
    in_flight = settings["max_num_batched_tokens"] * (2 if settings["async_scheduling"] else 1)
    least = 0
    for group in settings.get("kv_groups") or [{"type": "full"}]:
        kept = min(group.get("window", longest) - 1 + in_flight, longest) if "window" in group else longest
        least += math.ceil(kept / size) + ("window" in group)
    return 1 + least + draw(st.one_of(st.integers(0, 3), st.integers(0, least), st.integers(0, 4 * least)))


@st.composite
def _requests(draw: st.DrawFn, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests that arrive by step or by time, with fresh, shared, repeated and continued prompts."""
    longest, size = settings["max_model_len"] - 1, settings["block_size"]
    by_step = draw(st.booleans())
    apart = draw(st.sampled_from([0, 2, 8, 40]))
    most_output = draw(st.sampled_from([5, 20, 80]))
    ranked = settings["policy"] == "priority"
    lengths = st.one_of(st.integers(1, 24), st.integers(1, 8).map(lambda n: n * size), st.integers(1, 200))
    requests: list[dict[str, Any]] = []
    now = 0
    for number in range(draw(st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(12, 40)))):
        segments: list[list[Any]] = []
        kind = draw(st.sampled_from(["fresh", "shared", "repeated", "continued"]))
        if kind == "shared":
            segments.append([draw(st.sampled_from(["a", "b", "c"])), draw(lengths)])
        elif requests and kind in ("repeated", "continued"):
            before = draw(st.sampled_from(requests))
            segments += before["segments"]
            if kind == "continued":
                samples = before.get("n", 1)
                sample = f"{draw(st.integers(0, samples - 1))}_" if samples > 1 else ""
                output = draw(st.integers(1, before["output_len"]))
                segments.append([f"out:{sample}{before['id']}", output])
        if kind != "repeated" or draw(st.booleans()):
            segments.append([f"u{number}", draw(lengths)])
        now += draw(st.integers(0, apart))
        request: dict[str, Any] = {
            "id": f"r{number}",
            "segments": _cut(segments, longest) or [[f"u{number}", 1]],
            "output_len": draw(st.integers(1, most_output)),
        }
        if by_step:
            request["arrival_step"] = now
        else:
            request["arrival"] = round(now * STEP_TIME["a"] * draw(st.sampled_from([0.25, 0.5, 1.0])), 6)
        if ranked:
            request["priority"] = draw(st.integers(0, 3))
        if draw(st.integers(0, 7)) == 7:
            request["n"] = draw(st.integers(2, 4))
        requests.append(request)
    return requests


def _cut(segments: list[list[Any]], longest: int) -> list[list[Any]]:
    """The prompt without what would not leave room for one token of output."""
    kept = []
    for name, length in segments:
        if longest > 0:
            kept.append([name, min(length, longest)])
        longest -= length
    return kept
