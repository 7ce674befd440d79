"""Latencies in parts: sums on every shipped scenario, and a few requests worked out by hand."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from servesim.analysis.attribution import PARTS, Attribution
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.watched_run import watched_run
from servesim.config.load import load_scenario, shipped
from servesim.engine.scheduler import Scheduler

SHIPPED = sorted(path.stem for path in Path(shipped("scenarios")).glob("*.yaml"))
NEEDS = {
    "context-500k": ["engine.tensor_parallel_size=2"],  # more memory than the file's one GPU has
}


def attributed(name: str | Path, *overrides: str, one_by_one: bool = False) -> tuple[Run, Attribution]:
    observe = (lambda scheduler: None) if one_by_one else None  # who is observed is scheduled one by one
    run, split = watched_run(prepare(load_scenario(name, overrides)), observe=observe)
    return run, split()


def assert_adds_up(of: Attribution) -> None:
    assert len(of.index)
    for parts, whole in ((of.before, of.ttft_s), (of.parts_s, of.e2e_s)):
        np.testing.assert_allclose(parts.sum(axis=1), whole, rtol=1e-9, atol=0)
        assert parts.min() > -1e-9 * whole.max()


def mean(of: Attribution, part: str) -> float:
    return float(of.parts_s[:, PARTS.index(part)].mean())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_parts_of_every_request_of_every_shipped_scenario_add_up(name: str) -> None:
    run, of = attributed(name, *NEEDS.get(name, []))
    assert_adds_up(of)
    assert len(of.index) == (run.log.requests.columns["status"] <= 1).sum()


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.speculative={method: ngram, num_speculative_tokens: 3, acceptance: {law: iid, rate: 0.5}}"],
        ["engine.batching=prefill-first", "engine.async_scheduling=false"],
        ["engine.num_gpu_blocks_override=900", "engine.max_model_len=8192"],
        ["engine.num_gpu_blocks_override=900", "engine.max_model_len=8192", "engine.async_scheduling=false"],
        ["engine.max_num_batched_tokens=96", "engine.max_num_seqs=96"],
        ["engine.scheduling_policy=priority", "engine.version=0.22"],
        ["model=gemma-2-27b", "engine.max_model_len=8192"],
        ["model=qwen3-30b-a3b", "engine.tensor_parallel_size=2"],
        ["engine.step_time={law: linear, base_s: 0.01, per_token_s: 1e-5, per_context_token_s: 1e-8}"],
        ["engine.step_time.gpu_time_factor=1.2", "engine.step_time.bandwidth_factor=0.9"],
        ["engine.version=0.6", "engine.enforce_eager=true"],
        [
            "engine.preemption_mode=swap",
            "engine.async_scheduling=false",
            "engine.enable_prefix_caching=false",
            "engine.num_gpu_blocks_override=1500",
            "engine.max_model_len=8192",
        ],
    ],
)
def test_they_add_up_whatever_the_engine_does(overrides: list[str]) -> None:
    small = ["workload.num_requests=400", "workload.arrivals.rate_per_s=12"]
    _, of = attributed("poisson-chat", *small, *overrides)
    assert_adds_up(of)


@pytest.mark.parametrize(
    "words",
    [
        ["poisson-chat", "workload.num_requests=500", "workload.arrivals.rate_per_s=8"],
        ["chat-1000"],
        ["chat-1000", "engine.async_scheduling=false"],
        ["poisson-chat", "workload.num_requests=300", "engine.batching=prefill-first"],
        ["pagedattention-swap", "workload.num_requests=500"],
    ],
)
def test_every_part_is_the_same_where_each_request_is_looked_at_in_each_step(words: list[str]) -> None:
    (_, together), (_, one_by_one) = attributed(*words), attributed(*words, one_by_one=True)
    for parts, others in ((together.before, one_by_one.before), (together.after, one_by_one.after)):
        np.testing.assert_allclose(parts, others, rtol=0, atol=1e-10)


HAND = """\
name: hand
model: llama-3.2-1b
hardware: {{gpu: h100-sxm}}
engine:
  max_model_len: 512
  max_num_seqs: {seats}
  max_num_batched_tokens: 64
  async_scheduling: false
  enable_prefix_caching: false
  step_time: {{law: linear, base_s: 1, per_token_s: {per_token}}}
workload:
  trace: {{file: requests.csv, format: csv}}
"""


def by_hand(
    tmp_path: Path, seats: int, per_token: float, *requests: str, fleet: tuple[str, ...] = ()
) -> list[dict[str, float]]:
    (tmp_path / "requests.csv").write_text(
        "\n".join(["arrival_s,prompt_tokens,output_tokens", *requests, ""])
    )
    (tmp_path / "hand.yaml").write_text(HAND.format(seats=seats, per_token=per_token))
    _, of = attributed(tmp_path / "hand.yaml", *fleet)
    assert_adds_up(of)
    return [
        {name: round(seconds, 9) for name, seconds in zip(PARTS, row, strict=True) if abs(seconds) > 1e-12}
        for row in of.parts_s.tolist()
    ]


def test_a_seat_is_waited_for_from_the_end_of_the_step_in_flight(tmp_path: Path) -> None:
    first, second = by_hand(tmp_path, 1, 0, "0,10,3", "0.5,10,2")
    assert first == {"prefill": 1, "weights": 2}
    assert second == {"joining": 0.5, "slot": 2, "prefill": 1, "weights": 1}


def test_a_chunk_of_others_is_interference_to_who_decodes_and_who_prefills(tmp_path: Path) -> None:
    # 0 to 2: both prompts (100 tokens, budget 64: 50 and 14); 2 to 3.37: 36 tokens beside a decode.
    first, second = by_hand(tmp_path, 8, 0.01, "0,50,3", "0,50,1")
    step_1, step_2, step_3 = 1 + 0.64, 1 + 0.37, 1 + 0.01
    assert sum(first.values()) == pytest.approx(step_1 + step_2 + step_3)
    assert first == {
        "prefill": 1.5,
        "interference": pytest.approx(0.14 + 0.36),
        "weights": 2,
        "compute": 0.02,
    }
    assert second == {"prefill": pytest.approx(1.14 + 1.37), "interference": 0.5}


def test_a_prompt_without_budget_waits_for_tokens(tmp_path: Path) -> None:
    _, second = by_hand(tmp_path, 8, 0, "0,128,1", "0,10,1")
    assert second == {"tokens": 2, "prefill": 1}


def test_noting_does_not_change_what_happens() -> None:
    plain = run_prepared(prepare(load_scenario("chat-1000")))
    noted, _ = attributed("chat-1000")
    for name, column in plain.log.requests.columns.items():
        np.testing.assert_array_equal(column, noted.log.requests.columns[name])


def test_who_took_notes_keeps_no_engine() -> None:
    """Its prefix cache may be larger than the log."""

    def engines() -> int:
        gc.collect()
        return sum(issubclass(type(one), Scheduler) for one in gc.get_objects())

    before = engines()
    run, split = watched_run(prepare(load_scenario("poisson-chat", ["workload.num_requests=50"])))
    assert engines() == before
    assert len(split().index) == len(run.log.requests) == 50


FLEET = ["workload.num_requests=600", "workload.arrivals.rate_per_s=24", "hardware.replicas=3"]


@pytest.mark.parametrize(
    "router", ["round-robin", "random", "least-outstanding", "least-kv", "prefix-affinity"]
)
def test_the_parts_of_a_fleet_add_up_under_every_router(router: str) -> None:
    run, of = attributed("poisson-chat", *FLEET, f"hardware.router={router}")
    assert_adds_up(of)
    assert of.index.tolist() == sorted(of.index)
    served = np.bincount(of.replica, minlength=3)
    assert served.sum() == 600
    assert tuple(served) == run.log.requests.parts


def test_a_replica_of_a_fleet_has_the_parts_of_an_engine_that_serves_its_requests_alone() -> None:
    single_turns = [*FLEET, "workload.sessions=null"]
    _, fleet = attributed("poisson-chat", *single_turns)
    _, first = attributed("poisson-chat", *single_turns, "hardware.simulated_replicas=1")
    assert len(first.index) == 200
    np.testing.assert_array_equal(fleet.of(fleet.replica == 0).parts_s, first.parts_s)


def test_a_replica_without_requests_has_no_rows() -> None:
    _, of = attributed("chat-1000", "workload.trace.max_requests=2", "hardware.replicas=4")
    assert_adds_up(of)
    assert of.replica.tolist() == [0, 1]


def test_what_a_failure_costs_lasts_until_another_replica_has_the_request(tmp_path: Path) -> None:
    # Replica 0 fails in its second step and completes that and the third; the request begins anew elsewhere.
    fleet = ("hardware.replicas=2", "fleet={failures: [{replica: 0, at_s: 1.5}]}")
    first, second = by_hand(tmp_path, 8, 0, "0,10,4", "0,10,2", fleet=fleet)
    assert first == {"failure": 3, "prefill": 1, "weights": 3}
    assert second == {"prefill": 1, "weights": 1}


def test_what_a_failure_costs_lasts_until_the_only_replica_is_back(tmp_path: Path) -> None:
    fleet = ("fleet={failures: [{replica: 0, at_s: 1.5, down_s: 10}, {replica: 0, at_s: 13, down_s: 2}]}",)
    first, second, third = by_hand(tmp_path, 8, 0, "0,10,2", "0,10,5", "5,10,1", fleet=fleet)
    assert first == {"prefill": 1, "weights": 1}  # ends with the step in which the replica fails
    assert second == {"failure": 15, "prefill": 1, "weights": 4}
    assert third == {"failure": 6.5, "prefill": 1}


@pytest.mark.parametrize("in_flight", ["retry", "lose"])
@pytest.mark.parametrize("router", ["round-robin", "least-kv", "prefix-affinity"])
def test_the_parts_of_a_fleet_add_up_whatever_fails(router: str, in_flight: str) -> None:
    failures = "{replica: 1, at_s: 9, down_s: 6}, {replica: 1, at_s: 22, down_s: 9}, {replica: 0, at_s: 30}"
    overrides = [*FLEET, f"hardware.router={router}", "engine.num_gpu_blocks_override=1500"]
    fleet = f"fleet={{failures: [{failures}], in_flight: {in_flight}}}"
    run, of = attributed("poisson-chat", *overrides, "engine.max_model_len=16384", fleet)
    assert_adds_up(of)
    retried = np.intersect1d(run.log.fleet.aborts.columns["index"], of.index)
    failure_s = of.parts_s[:, PARTS.index("failure")]
    assert set(of.index[failure_s > 0]) == set(retried)
    assert len(retried) > 10 if in_flight == "retry" else not len(retried)


def test_the_time_on_the_link_is_what_the_log_says(tmp_path: Path) -> None:
    fleet = "fleet={kv_link: ethernet-100g, pools: {a: {serves: prefill, replicas: 2}, b: {serves: decode}}}"
    overrides = ["workload.num_requests=150", "workload.sessions=null", "hardware.router=least-outstanding"]
    run, of = attributed("poisson-chat", *overrides, "workload.arrivals.rate_per_s=15", fleet)
    assert_adds_up(of)
    moved = run.log.fleet.transfers.columns
    order = np.argsort(moved["index"])
    np.testing.assert_array_equal(moved["index"][order], of.index)
    on_link_s = (moved["done_s"] - moved["asked_s"])[order]
    np.testing.assert_allclose(of.before[:, PARTS.index("transfer")], on_link_s, atol=1e-9)
    elsewhere_s = moved["prefilled_s"][order] - arrivals_s(run, of)
    parts = [PARTS.index(name) for name in ("prefill", "interference", "tokens", "joining", "host")]
    assert (of.before[:, parts].sum(axis=1) >= elsewhere_s - 1e-9).all()


def arrivals_s(run: Run, of: Attribution) -> np.ndarray:
    columns = run.log.requests.columns
    order = np.argsort(columns["index"])
    return columns["arrival_s"][order][np.searchsorted(columns["index"][order], of.index)]
