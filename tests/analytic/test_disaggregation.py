"""Prefill and decode on different replicas: deterministic servers in a row, and the link between them.

One prompt at a time, then one KV cache on the link, then one output: three deterministic servers in tandem.
However these are ordered, a request leaves when it would if it waited at the slowest alone (Friedman 1965,
Avi-Itzhak 1965): E2E = sum of D_i + the wait of M/D/1 at the largest D, lambda D^2 / (2 (1 - lambda D)).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from queueing import assert_agree, fixed, requests_of

from servesim.config.scenario import LinearStepTime
from servesim.cost.linear import LinearLaw
from servesim.engine.disaggregation import DecodeScheduler, PrefillScheduler
from servesim.engine.events import Log
from servesim.engine.fleet import Replica, Site, simulate_fleet
from servesim.engine.handover import KvPort
from servesim.engine.router import build_route
from servesim.engine.scheduler import SchedulerLimits
from servesim.engine.versions import RULES
from servesim.kv.paged import PagedKVCache

PROMPT, OUTPUT = 64, 8


def site(
    serves: Any, step_s: float, token_s: float = 0.0, *, max_num_seqs: int = 1, num_blocks: int = 1 << 40
) -> Site:
    """A replica whose steps all take equally long, as does each token that it pulls."""
    kind = DecodeScheduler if serves == "decode" else PrefillScheduler
    limits = SchedulerLimits(max_num_seqs, 1 << 40, 1 << 40)
    law = LinearLaw(LinearStepTime(law="linear", base_s=step_s))

    def make() -> Replica:
        return Replica(
            kind(limits, RULES["0.26"], PagedKVCache(num_blocks, 16, enable_prefix_caching=False)), law
        )

    return Site(make, serves=serves, kv_port=KvPort(1.0, token_s))


def served(
    seed: int, rate_per_s: float, sites: list[Site], latency_s: float, num_requests: int = 6_000
) -> Log:
    workload = {
        "num_requests": num_requests,
        "arrivals": {"process": "poisson", "rate_per_s": rate_per_s},
        "prompt_tokens": fixed(PROMPT),
        "output_tokens": fixed(OUTPUT),
    }
    return simulate_fleet(
        requests_of(workload, seed),
        sites,
        lambda members: build_route("round-robin", members, seed),
        link_latency_s=latency_s,
    )


@pytest.mark.parametrize("slowest", ["prefill", "link", "decode"])
def test_the_pipeline_is_a_tandem_of_deterministic_servers(slowest: str) -> None:
    durations_s = {"prefill": 0.4, "link": 0.3, "decode": 0.2} | {slowest: 1.0}
    rate_per_s, latency_s = 0.7, 0.05
    token_s = (durations_s["link"] - latency_s) / PROMPT
    sites = [site("prefill", durations_s["prefill"]), site("decode", durations_s["decode"] / OUTPUT, token_s)]
    theory_s = sum(durations_s.values()) + rate_per_s / (2 * (1 - rate_per_s))
    means, controls = [], []
    for seed in range(8):
        requests = served(seed, rate_per_s, sites, latency_s).requests.columns
        means.append(float((requests["finish_s"] - requests["arrival_s"])[500:].mean()))
        controls.append([float(requests["arrival_s"].max()) / len(requests["arrival_s"]) - 1 / rate_per_s])
    assert_agree(means, theory_s, controls, relative_error=0.02)


def test_two_prefilling_replicas_share_the_arrivals_of_one_decoding_one() -> None:
    """A random split makes two M/D/1 queues; with time to spare behind them, nobody waits twice."""
    rate_per_s, seeds = 1.4, range(8)
    sites = [site("prefill", 1.0), site("prefill", 1.0), site("decode", 1e-6, 1e-9, max_num_seqs=64)]
    means = []
    for seed in seeds:
        workload = {
            "num_requests": 6_000,
            "arrivals": {"process": "poisson", "rate_per_s": rate_per_s},
            "prompt_tokens": fixed(PROMPT),
            "output_tokens": fixed(1),
        }
        log = simulate_fleet(
            requests_of(workload, seed),
            sites,
            lambda members, seed=seed: build_route("random", members, seed),  # type: ignore[misc]
            link_latency_s=0.0,
        )
        requests = log.requests.columns
        means.append(float((requests["finish_s"] - requests["arrival_s"])[500:].mean()))
    load = rate_per_s / 2
    assert_agree(means, 1 + load / (2 * (1 - load)), relative_error=0.02)


def test_one_request_by_hand() -> None:
    """Prompt 0.4 s, latency 0.05 s, 64 tokens of 4 ms each on the link, eight steps of 25 ms."""
    log = served(1, 1e-3, [site("prefill", 0.4), site("decode", 0.025, 0.004)], 0.05, num_requests=1)
    [request] = log.requests.columns["arrival_s"]
    columns = {name: float(values[0]) for name, values in log.requests.columns.items()}
    assert columns["scheduled_s"] == request
    assert columns["first_token_s"] == pytest.approx(request + 0.4 + 0.05 + 0.256 + 0.025)
    assert columns["finish_s"] == pytest.approx(request + 0.4 + 0.05 + 0.256 + 0.2)
    assert columns["generated_tokens"] == OUTPUT
    assert log.steps.columns["outputs"] @ log.steps.columns["steps"] == OUTPUT, "the prefill's is no output"


def test_a_small_pool_makes_prompts_wait_where_they_are() -> None:
    """Decoding memory for two requests: the others stay in the prefilling replica until blocks are free."""
    sites = [
        site("prefill", 0.01, max_num_seqs=4, num_blocks=1 + 4 * 8),
        site("decode", 0.1, 1e-6, max_num_seqs=8, num_blocks=1 + 2 * 5),
    ]
    log = served(3, 5.0, sites, 0.001, num_requests=300)
    requests = log.requests.columns
    assert sorted(requests["index"]) == list(range(300))
    running = log.steps.columns["running"][log.steps.parts[0] :]
    assert running.max() == 2
    held = log.steps.columns["kv_tokens"][: log.steps.parts[0]]
    assert held.max() == 8 * PROMPT, "the prefilling replica is full of prompts that wait"
    assert np.isfinite(requests["finish_s"]).all()
