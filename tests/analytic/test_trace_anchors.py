"""Figures that follow from the traces alone, worked out from the lengths and found again by simulation.

The expected numbers were computed from the same public traces by other means than this program's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from queueing import requests_of, rows

from servesim.analysis.timeline import timeline
from servesim.config.load import find_data
from servesim.config.scenario import LinearStepTime
from servesim.cost.linear import LinearLaw
from servesim.engine.events import Log
from servesim.engine.loop import simulate
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.static_batching import StaticScheduler
from servesim.engine.versions import RULES
from servesim.kv.contiguous import ContiguousKVCache
from servesim.kv.paged import PagedKVCache
from servesim.workload.traces import read_lengths, read_mooncake

Floats = NDArray[np.float64]
AZURE = ("ContextTokens", "GeneratedTokens")
FILES = {
    "code": ("azure_llm_2023_code.csv.gz", AZURE),
    "conv": ("azure_llm_2023_conv.csv.gz", AZURE),
    "sharegpt": ("sharegpt_lengths.csv.gz", ("num_prefill_tokens", "num_decode_tokens")),
    "mooncake": ("mooncake_conversation.jsonl.gz", None),
}


@cache
def path_of(name: str) -> Path:
    return find_data("traces", f"traces/{FILES[name][0]}")


@cache
def lengths(name: str) -> tuple[Floats, Floats]:
    """Prompt and output lengths of a shipped trace, in its order."""
    columns = FILES[name][1]
    trace = read_mooncake(path_of(name), 512) if columns is None else read_lengths(path_of(name), *columns)
    return trace.prompt_tokens.astype(float), trace.output_tokens.astype(float)


def burst(name: str, count: int | None = None) -> dict[str, Any]:
    """A trace's first requests, all there from the begin, in its order."""
    prompt_column, output_column = FILES[name][1]
    trace = {"file": str(path_of(name)), "format": "lengths", "max_requests": count}
    trace |= {"prompt_column": prompt_column, "output_column": output_column}
    return {"trace": trace, "arrivals": {"process": "burst"}}


def serve(name: str, kv: Any, *, batch: int, count: int | None = None, kind: Any = Scheduler) -> Log:
    """Steps of one second each, whatever they compute."""
    limits = SchedulerLimits(max_num_seqs=batch, max_num_batched_tokens=1 << 40, max_model_len=1 << 30)
    law = LinearLaw(LinearStepTime(law="linear", base_s=1.0))
    return simulate(requests_of(burst(name, count), 1), kind(limits, RULES["0.26"], kv), law)


# ---- static against continuous batching -------------------------------------------------------------


def slot_steps(output: Floats, batch: int) -> float:
    """Seats times steps of static batches, the last one incomplete, over those that yield a token."""
    longest = np.maximum.reduceat(output, np.arange(0, len(output), batch))
    return float(batch * longest.sum() / output.sum())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("code", (3.7, 8.3, 16, 22)),
        ("conv", (2.1, 2.6, 3.3, 3.7)),
        ("mooncake", (2.1, 3.0, 4.5, 5.4)),
        ("sharegpt", (1.8, 2.3, 2.7, 2.8)),
    ],
)
def test_slot_steps_of_the_traces(name: str, expected: tuple[float, ...]) -> None:
    for batch, ratio in zip((8, 32, 128, 256), expected, strict=True):
        digits = 0.5 if ratio >= 10 else 0.05
        assert slot_steps(lengths(name)[1], batch) == pytest.approx(ratio, abs=digits)


@pytest.mark.parametrize(("name", "batch"), [("code", 8), ("code", 32), ("conv", 8), ("conv", 32)])
def test_slot_steps_by_simulation(name: str, batch: int) -> None:
    """Static steps are the sum over batches of the longest output, exactly; continuous ones fill every seat.

    But for the last ones: when nobody waits any more, seats stay empty until the longest that runs ends.
    """
    count = 100 * batch
    output = lengths(name)[1][:count]
    static, continuous = (
        serve(name, ContiguousKVCache(1 << 40, 1 << 30), batch=batch, count=count, kind=kind).counters[
            "steps"
        ]
        for kind in (StaticScheduler, Scheduler)
    )
    assert static * batch / output.sum() == pytest.approx(slot_steps(output, batch), rel=1e-12)
    least = output.sum() / batch
    assert least <= continuous <= least + output.max()


# ---- contiguous reservations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most", "at_end", "on_average"),
    [
        *(("code", *row) for row in ((2048, 42, 41), (4096, 34, 34), (8192, 25, 25), (16384, 13, 13))),
        *(("conv", *row) for row in ((2048, 48, 42), (4096, 27, 24), (8192, 17, 15), (16384, 8.3, 7.7))),
        ("sharegpt", 2048, 15, 9.2),
    ],
)
def test_used_share_of_reservations(name: str, most: int, at_end: float, on_average: float) -> None:
    """Of a reservation of max_model_len, mean over the requests that fit: at the end, and while decoding."""
    prompt, output = lengths(name)
    fits = prompt + output <= most
    prompt, output = prompt[fits], output[fits]
    for expected, used in ((at_end, prompt + output), (on_average, prompt + output / 2)):
        digits = 0.05 if expected < 10 else 0.5
        assert 100 * (used / most).mean() == pytest.approx(expected, abs=digits)


def one_at_a_time(name: str, kv: Any, count: int | None = None) -> tuple[dict[str, Floats], Any]:
    """The requests in the order in which they were served, and the pool over time."""
    log = serve(name, kv, batch=1, count=count)
    return rows(log), timeline(log.steps, 0.0)


def last_rows(of: dict[str, Floats], line: Any) -> NDArray[np.intp]:
    """The row in which each request's last step ran; steps take a second."""
    return np.searchsorted(line.start_s, of["finish_s"] - 0.5, side="right") - 1


@pytest.mark.parametrize(("name", "on_average"), [("conv", 42), ("code", 41), ("sharegpt", 9.2)])
def test_used_share_of_reservations_by_simulation(name: str, on_average: float) -> None:
    """One request at a time, so that the pool is its reservation; those that do not fit are left out."""
    prompt, output = lengths(name)
    count = min(len(prompt), 20_000)
    fits = prompt[:count] + output[:count] <= 2048
    of, line = one_at_a_time(name, ContiguousKVCache(1 << 20, 1 << 20, "oracle"), count)
    edges_s = np.append(of["scheduled_s"], of["finish_s"][-1])
    tokens = line.bin_means(edges_s, *line.kv("tokens"))
    digits = 0.05 if on_average < 10 else 0.5
    assert 100 * (tokens[fits] / 2048).mean() == pytest.approx(on_average, abs=digits + 0.1)


@pytest.mark.parametrize(("name", "expected"), [("code", 72), ("conv", 65)])
def test_power_of_two_reservations(name: str, expected: float) -> None:
    """What a buddy system gives for exact reservations, used at the end: all requests together."""
    prompt, output = lengths(name)
    total = prompt + output
    assert 100 * total.sum() / (2 ** np.ceil(np.log2(total))).sum() == pytest.approx(expected, abs=0.5)
    of, line = one_at_a_time(name, ContiguousKVCache(1 << 20, 1 << 20, "oracle", "buddy"))
    last = last_rows(of, line)
    used, round_up = (line.kv(part)[1][last].sum() for part in ("tokens", "round_up"))
    assert 100 * used / (used + round_up) == pytest.approx(expected, abs=0.6)


# ---- the end of the last block --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("code", (0.37, 0.73, 1.5, 3.0, 6.1)),
        ("conv", (0.54, 1.1, 2.2, 4.4, 8.0)),
        ("mooncake", (0.06, 0.12, 0.25, 0.51, 1.0)),
    ],
)
def test_last_block_waste(name: str, expected: tuple[float, ...]) -> None:
    total = sum(lengths(name))
    for size, percent in zip((16, 32, 64, 128, 256), expected, strict=True):
        blocks = np.ceil(total / size) * size
        digits = 0.005 if percent < 1 else 0.05
        assert 100 * (blocks - total).sum() / blocks.sum() == pytest.approx(percent, abs=digits)


@pytest.mark.parametrize(
    ("name", "size", "expected"), [("conv", 16, 0.54), ("conv", 128, 4.4), ("code", 16, 0.37)]
)
def test_last_block_waste_by_simulation(name: str, size: int, expected: float) -> None:
    kv = PagedKVCache(1 << 20, size, enable_prefix_caching=False)
    of, line = one_at_a_time(name, kv)
    last = last_rows(of, line)
    tokens, waste = (line.kv(part)[1][last].sum() for part in ("tokens", "internal"))
    digits = 0.005 if expected < 1 else 0.05
    assert 100 * waste / (tokens + waste) == pytest.approx(expected, abs=digits)
