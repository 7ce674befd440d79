"""The autoscaler: its rule, a run worked out by hand, and what a scenario may say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from servesim.analysis.metrics import summarise
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.config.fleet import AutoscalerConfig
from servesim.config.load import load_scenario
from servesim.engine.autoscaler import Autoscaler
from servesim.engine.router import Members, build_route
from servesim.engine.scheduler import Scheduler
from servesim.errors import ConfigError
from servesim.report.terminal import result_text
from servesim.workload.request import Request, Segment

# Forty requests at once, of a second each, one at a time.
QUEUE = (
    "engine.max_num_seqs=1",
    "engine.async_scheduling=false",
    "engine.step_time={law: linear, base_s: 1}",
    "workload={num_requests: 40, prompt_tokens: {law: fixed, tokens: 100}, "
    "output_tokens: {law: fixed, tokens: 1}, arrivals: {process: burst}}",
    "workload.sessions=null",
    "workload.shared_prefixes=null",
    "hardware.router=least-outstanding",
)
RULE = "fleet={autoscaler: {max_replicas: 6, target: 10, interval_s: 5, startup_s: 10, cooldown_s: %g}}"


def run(name: str, *overrides: str) -> Run:
    return run_prepared(prepare(load_scenario(name, overrides)))


def busy(*outstanding: int) -> list[Scheduler]:
    """Schedulers with so many requests each."""
    return [cast(Scheduler, SimpleNamespace(num_unfinished=n)) for n in outstanding]


def test_as_many_replicas_as_bring_each_to_the_target() -> None:
    def wanted(*outstanding: int, current: int | None = None, now_s: float = 1e9) -> int:
        scaler = Autoscaler(AutoscalerConfig(max_replicas=8, min_replicas=2, target=10))
        return scaler.wanted(busy(*outstanding), current or len(outstanding), now_s)

    assert wanted(10, 10) == 2
    assert wanted(10, 11) == 3
    assert wanted(0, 1) == 2, "min_replicas"
    assert wanted(500, 1) == 8, "max_replicas"
    assert wanted(25, 25, current=5) == 5, "three of the five are still starting"
    assert wanted(0, 0, 0, 0, now_s=299) == 4, "too early for fewer"
    assert wanted(0, 0, 0, 0, now_s=300) == 2
    assert wanted(99, 0, now_s=0) == 8, "never too early for more"


def test_the_rule_of_kv_use_counts_pools() -> None:
    """A small pool fills up, so replicas are ordered; the first one never holds more than its pool."""
    scaled = run(
        "poisson-chat", "workload.num_requests=2000", "workload.arrivals.rate_per_s=30",
        "engine.num_gpu_blocks_override=3000", "engine.max_model_len=8192",
        "fleet={autoscaler: {max_replicas: 4, metric: kv_usage, target: 0.5, interval_s: 2, startup_s: 1}}",
    )  # fmt: skip
    fleet = summarise(scaled).fleet
    assert fleet is not None
    assert fleet.scaling is not None
    assert fleet.scaling.orders > 0
    assert max(scaled.log.steps.columns["kv_tokens"][: scaled.log.steps.parts[0]]) > 0.5 * 2999 * 16


def test_a_run_by_hand() -> None:
    """At 5 s 35 are left: four replicas are wanted, three ordered, which serve from 15 s on; end at 40 s."""
    found = run("poisson-chat", *QUEUE, RULE % 1000)
    assert found.log.fleet is not None
    spans = found.log.fleet.spans.columns
    assert sorted(zip(spans["ordered_s"].tolist(), spans["ready_s"].tolist(), strict=True)) == [
        (0, 0), (5, 15), (5, 15), (5, 15),
    ]  # fmt: skip
    summary = summarise(found)
    assert summary.duration_s == pytest.approx(40)
    assert summary.fleet is not None
    scaling: Any = summary.fleet.scaling
    assert scaling.gpu_hours == pytest.approx((40 + 3 * 35) / 3600)
    assert scaling.mean_serving == pytest.approx((40 + 3 * 25) / 40)
    assert (scaling.orders, scaling.peak_serving) == (3, 4)
    assert scaling.cost_usd == pytest.approx(scaling.gpu_hours * found.gpu.price_per_hour_usd)
    assert summary.price_per_hour_usd == pytest.approx(scaling.cost_usd / 40 * 3600)
    assert "GPU-hours:" in result_text(summary)


def test_what_is_not_needed_is_given_back() -> None:
    """25 are left at 15 s, 20 at 20 s, 10 at 30 s: each time an idle replica goes, at the next look."""
    found = run("poisson-chat", *QUEUE, RULE % 0)
    assert found.log.fleet is not None
    spans = found.log.fleet.spans.columns
    assert sorted(spans["gone_s"][~np.isnan(spans["gone_s"])].tolist()) == [20, 25, 35]
    assert sorted(found.log.requests.columns["index"]) == list(range(40))


def test_a_replica_that_goes_on_is_remembered() -> None:
    """It was closed for a while, but has its cache; one that begins anew has an empty one."""
    members, request = Members([1.0, 1.0]), Request(0, "r0", 0.0, 9, 1, (Segment("text", 9),))
    first, second, anew = busy(5, 6, 7)
    members.join(0, first)
    members.join(1, second)
    route = build_route("prefix-affinity", members, 1)
    assert route(request) == 0
    members.leave(0)
    members.join(0, first)
    cast(Any, first).num_unfinished = 9
    assert route(request) == 0
    members.leave(0)
    members.join(0, anew)
    assert route(request) == 1


def test_fewer_gpu_hours_and_a_longer_tail_than_all_replicas_all_the_time() -> None:
    """Both ends of the bargain, on the shipped scenario."""
    scaled = summarise(run("autoscaled"))
    whole = summarise(run("autoscaled", "fleet=null", "hardware.replicas=4"))
    assert scaled.completed == whole.completed
    assert scaled.fleet is not None
    assert scaled.fleet.scaling is not None
    assert scaled.fleet.scaling.gpu_hours < 0.9 * 4 * whole.duration_s / 3600
    assert scaled.ttft.p99_s > whole.ttft.p99_s


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["fleet.autoscaler.min_replicas=9"], "min_replicas.*is above max_replicas"),
        (["hardware.replicas=5"], "is not between min_replicas and max_replicas"),
        (["fleet.autoscaler.metric=kv_usage"], "a share of the KV pool is at most 1.*write 0.8 for 80 %"),
        (["fleet.failures=[{replica: 0, at_s: 1}]"], "does not go with fleet.failures"),
    ],
)
def test_mistakes_in_an_autoscaler_are_explained(changes: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_scenario("autoscaled", changes)
