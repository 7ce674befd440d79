"""Replicas behind a router: splits, the order of routers, and what stands for the rest."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.analysis.fragmentation import fragmentation
from servesim.analysis.metrics import request_times, summarise
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.tables import requests_frame
from servesim.analysis.timeline import timeline
from servesim.config.load import load_scenario
from servesim.engine import router
from servesim.errors import ConfigError

QUEUE = (
    "engine.max_num_seqs=1",
    "engine.async_scheduling=false",
    "engine.step_time={law: linear, base_s: 0.01, per_token_s: 0.0001}",
    "workload={num_requests: 12000, prompt_tokens: {law: fixed, tokens: 100}, "
    "output_tokens: {law: fixed, tokens: 1}, arrivals: {process: poisson, rate_per_s: 120}}",
    "workload.sessions=null",
    "workload.shared_prefixes=null",
    "hardware.replicas=4",
)
SERVICE_S = 0.01 + 100 * 1e-4
CHATS = ("workload.arrivals.rate_per_s=12", "workload.num_requests=2000", "hardware.replicas=4")
TRACE = ("workload.trace.max_requests=3000", "workload.trace.rate_scale=9", "hardware.replicas=3")


def run(name: str, *overrides: str) -> Run:
    return run_prepared(prepare(load_scenario(name, overrides)))


def by_replica(run: Run, column: str) -> list[np.ndarray]:
    requests = run.log.requests
    return np.split(np.array(requests.columns[column]), np.cumsum(requests.parts)[:-1])


def test_random_split_of_poisson_arrivals_is_independent_m_d_1_queues() -> None:
    """Each replica is an M/D/1 queue at a quarter of the rate: W = D + rho D / (2 (1 - rho))."""
    load = 120 / 4 * SERVICE_S
    expected_s = SERVICE_S * (1 + load / (2 * (1 - load)))
    means, queues = [], []
    for seed in range(8):
        found = run("poisson-chat", *QUEUE, "hardware.router=random", f"seed={seed}")
        means.append(request_times(found.log).e2e_s.mean())
        arrivals, ends = by_replica(found, "arrival_s"), by_replica(found, "finish_s")
        edges_s = np.arange(5.0, 95.0, 0.5)
        queues.append([
            np.searchsorted(np.sort(a), edges_s) - np.searchsorted(np.sort(b), edges_s)
            for a, b in zip(arrivals, ends, strict=True)
        ])  # fmt: skip
    assert np.mean(means) == pytest.approx(expected_s, rel=0.02)
    correlations = [np.corrcoef(one)[np.triu_indices(4, 1)] for one in queues]
    assert abs(np.mean(correlations)) < 0.03


def test_a_split_in_advance_is_what_the_router_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that meet at every arrival serve each request at the times of engines simulated alone."""
    from servesim.analysis import fleet

    for policy in ("random", "round-robin"):
        alone = run("azure-conv-h100", *TRACE, f"hardware.router={policy}")
        with monkeypatch.context() as changed:
            changed.setattr(fleet, "BLIND", ())
            together = run("azure-conv-h100", *TRACE, f"hardware.router={policy}")
        assert alone.log.requests.parts == together.log.requests.parts
        for name in ("index", "arrival_s", "first_token_s", "finish_s"):
            for a, b in zip(by_replica(alone, name), by_replica(together, name), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("overrides", [QUEUE, TRACE], ids=["single-servers", "trace"])
def test_the_shortest_queue_is_never_worse(overrides: tuple[str, ...]) -> None:
    """Same requests, another router: joining the shortest queue is never worse on average."""
    name = "poisson-chat" if overrides is QUEUE else "azure-conv-h100"
    scale = "workload.arrivals.rate_per_s" if overrides is QUEUE else "workload.trace.rate_scale"
    for value in (80, 160, 190) if overrides is QUEUE else (9, 14):
        mean = {
            policy: request_times(
                run(name, *overrides, f"{scale}={value}", f"hardware.router={policy}").log
            ).e2e_s.mean()
            for policy in ("least-outstanding", "random", "round-robin")
        }
        assert mean["least-outstanding"] <= mean["round-robin"] <= mean["random"]


@pytest.mark.parametrize(
    "policy", ["round-robin", "random", "least-outstanding", "least-kv", "prefix-affinity"]
)
def test_every_request_is_served_once(policy: router.Router) -> None:
    found = run("poisson-chat", *CHATS, f"hardware.router={policy}")
    assert sorted(found.log.requests.columns["index"]) == list(range(2000))
    assert len(found.log.requests.parts) == 4
    summary = summarise(found)
    assert summary.completed == 2000
    assert summary.kv.adds_up
    assert sum(found.log.steps.columns["outputs"] * found.log.steps.columns["steps"]) == (
        summary.total_output_tokens
    )


def test_affinity_finds_more_in_the_prefix_cache() -> None:
    hits = {
        policy: summarise(run("poisson-chat", *CHATS, f"hardware.router={policy}")).load.prefix_cache_hit_rate
        for policy in ("round-robin", "prefix-affinity")
    }
    assert hits["prefix-affinity"] > hits["round-robin"] + 0.1


def test_figures_of_a_fleet_are_those_of_its_replicas() -> None:
    """Means per replica, rates of the fleet; a replica without requests counts as idle."""
    found = run("azure-conv-h100", "workload.trace.max_requests=3", "hardware.replicas=4")
    line, summary = timeline(found.log.steps, 0.0), summarise(found)
    assert len(line.parts) == 4
    assert found.log.requests.parts == (1, 1, 1, 0)
    each_s = [float(line.duration_s[rows].sum()) for rows in line.parts]
    np.testing.assert_allclose(each_s, summary.load.horizon_s)
    busy_s = float(line.duration_s[line.columns["steps"] > 0].sum())
    assert summary.load.mean_running == pytest.approx(busy_s / summary.load.horizon_s / 4)
    assert summary.kv.adds_up


def test_a_fleet_in_which_one_replica_never_has_a_queue_can_be_reported() -> None:
    """The queues of the others are put end to end; the shares of the pool still add up."""
    found = run(
        "azure-conv-h100", "workload.trace.max_requests=5", "workload.trace.rate_scale=1000",
        "hardware.replicas=4", "engine.max_num_seqs=1",
    )  # fmt: skip
    line, summary = timeline(found.log.steps, 0.0), summarise(found)
    assert [(line.columns["waiting"][rows] > 0).any() for rows in line.parts] == [True, False, False, False]
    account = fragmentation(found, summary)
    assert account is not None
    for shares in (account.whole, account.in_queue):
        assert shares is not None
        assert sum(one.mean for one in shares.of.values()) == pytest.approx(1)
    assert account.whole.time_s == pytest.approx(summary.load.horizon_s)


def test_sampled_replicas_stand_for_thousands() -> None:
    """4 of 2,000 replicas: the same load per replica, and the rates of all 2,000, within the noise."""
    shared = ("workload.num_requests=120000", "engine.step_time={law: linear, base_s: 0.004}")
    loads = ("workload.sessions=null", "workload.shared_prefixes=null", "hardware.router=random")
    big = run(
        "poisson-chat", *shared, *loads, "workload.arrivals.rate_per_s=10000",
        "hardware.replicas=2000", "hardware.simulated_replicas=4",
    )  # fmt: skip
    summary = summarise(big)
    assert summary.num_gpus == 2000
    assert summary.request_throughput == pytest.approx(summary.completed / summary.duration_s * 500)
    assert summary.offered_rate == pytest.approx(10_000, rel=0.25)
    assert "sampled" in [warned.caveat.key for warned in summary.warnings]
    whole = run(
        "poisson-chat", *shared, *loads, "workload.arrivals.rate_per_s=10000", "hardware.replicas=2000"
    )
    few, all_of_them = summary.e2el.mean_s, summarise(whole).e2el.mean_s
    assert few == pytest.approx(all_of_them, rel=0.2)


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not go with router: least-kv"):
        load_scenario(
            "azure-conv-h100", [*TRACE, "hardware.router=least-kv", "hardware.simulated_replicas=1"]
        )
    with pytest.raises(ConfigError, match="does not go with a closed loop"):
        run("closed-loop-sharegpt", "hardware.replicas=4", "hardware.simulated_replicas=1")


ONE_AT_A_TIME = (
    *QUEUE[:-1],
    "workload.num_requests=400",
    "hardware.replicas=2",
    "hardware.router=least-outstanding",
)
FAILURE = "fleet={failures: [{replica: 0, at_s: 1, down_s: 2}], in_flight: %s}"


def test_a_failed_replica_by_hand() -> None:
    """D = 20 ms, two servers, of which one is away from 1 s to 3 s; each request is served in one step."""
    found = run("poisson-chat", *ONE_AT_A_TIME, FAILURE % "retry")
    requests, (first, _) = found.log.requests.columns, found.log.requests.parts
    finish_s, index = requests["finish_s"], requests["index"]
    assert sorted(index) == list(range(400))
    away = (finish_s[:first] > 1 + 2 * SERVICE_S + 1e-9) & (finish_s[:first] < 3 + SERVICE_S - 1e-9)
    assert not away.any()
    assert (finish_s[:first] > 3).any()
    assert found.log.fleet is not None
    aborted = found.log.fleet.aborts.columns
    late = np.isin(index, aborted["index"])
    assert late.sum() == len(aborted["index"]) > 0
    assert (finish_s[late] >= aborted["at_s"].max() + SERVICE_S - 1e-9).all()
    assert (finish_s - requests["arrival_s"])[late].max() > SERVICE_S, "the arrival stays"
    fleet = summarise(found).fleet
    assert fleet is not None
    assert (fleet.failures, fleet.retried, fleet.lost) == (1, late.sum(), 0)
    horizon_s = float(finish_s.max() - requests["arrival_s"].min())
    assert fleet.up_share == pytest.approx(1 - 2 / horizon_s / 2)
    frame = requests_frame(found.log)
    assert frame["aborts"].sum() == late.sum()


def test_lost_requests_are_failed_requests() -> None:
    lost = summarise(run("poisson-chat", *ONE_AT_A_TIME, FAILURE % "lose"))
    assert lost.fleet is not None
    assert lost.failed == lost.fleet.lost == lost.fleet.aborts > 0
    assert lost.completed + lost.failed == 400
    assert [one.caveat.key for one in lost.warnings if one.caveat.key == "lost"]


def test_nobody_is_left_to_serve() -> None:
    """The only replica fails for ever: what it has not served is lost, and counted."""
    found = run(
        "poisson-chat", *ONE_AT_A_TIME, "hardware.replicas=1", "fleet={failures: [{replica: 0, at_s: 1}]}"
    )
    summary = summarise(found)
    assert summary.fleet is not None
    assert summary.completed + summary.fleet.lost == 400
    assert np.nanmax(found.log.requests.columns["finish_s"]) < 1 + 2 * SERVICE_S + 1e-9


def test_a_failure_after_the_last_request_is_told() -> None:
    late = summarise(run("poisson-chat", *ONE_AT_A_TIME, "fleet={failures: [{replica: 0, at_s: 1000}]}"))
    assert "failed_too_late" in [one.caveat.key for one in late.warnings]
    assert late.fleet is not None
    assert late.fleet.failures == 0
    assert late.duration_s < 1000


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["fleet={failures: [{replica: 2, at_s: 1}]}"], "there is no replica 2: they are counted from 0"),
        (
            ["fleet={failures: [{replica: 0, at_s: 1}, {replica: 0, at_s: 5}]}"],
            r"fleet.failures\[1\].at_s.*replica 0 is down already: it fails at 1 s, for ever",
        ),
        (["fleet={failures: [{replica: 0, at_s: 1, down_s: 0}]}"], "greater than 0"),
        (
            ["hardware.router=random", "hardware.simulated_replicas=1", "fleet={in_flight: retry}"],
            "does not go with hardware.simulated_replicas",
        ),
    ],
)
def test_mistakes_in_a_fleet_are_explained(changes: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_scenario("poisson-chat", [*ONE_AT_A_TIME, *changes])
