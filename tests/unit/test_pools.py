"""Fleets whose pools differ: what a scenario may say, who gets how much, and what is told of each pool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from servesim.analysis.metrics import summarise
from servesim.analysis.run import Run
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.tables import requests_frame
from servesim.api import check, fragmentation
from servesim.config.load import load_scenario
from servesim.config.scenario import Router
from servesim.engine.disaggregation import DecodeScheduler
from servesim.engine.queues import FcfsQueue
from servesim.engine.scheduler import SchedulerLimits
from servesim.engine.state import RequestState
from servesim.engine.versions import RULES
from servesim.errors import ConfigError, MemoryDoesNotFitError
from servesim.kv.paged import PagedKVCache
from servesim.report.html import report_html
from servesim.report.terminal import result_text
from servesim.workload.request import Request

FEW = ("workload.trace.max_requests=1200",)
APART = ("hardware.gpu=h100-sxm", "model=llama-3.1-8b", "engine.tensor_parallel_size=1")

HUNDRED = (
    "workload={num_requests: 5, prompt_tokens: {law: fixed, tokens: 100}, "
    "output_tokens: {law: fixed, tokens: 2}, arrivals: {process: burst}}",
    "workload.trace=null",
)


def run(name: str, *overrides: str) -> Run:
    return run_prepared(prepare(load_scenario(name, overrides)))


@pytest.mark.parametrize("router", ["round-robin", "random", "least-outstanding"])
def test_weights_divide_the_requests(router: Router) -> None:
    """Two replicas of weight 3 beside three of weight 1: six ninths of the requests, when all are busy."""
    found = run(
        "mixed-pools", *FEW, f"hardware.router={router}", "fleet.pools.new.gpu=a100-80gb-sxm",
        "workload.trace.rate_scale=2000",
    )  # fmt: skip
    parts = found.log.requests.parts
    tolerance = {"round-robin": 0.002, "random": 0.05, "least-outstanding": 0.05}[router]
    assert sum(parts[:2]) / sum(parts) == pytest.approx(6 / 9, abs=tolerance)
    assert parts[0] / sum(parts) == pytest.approx(3 / 9, abs=tolerance)


def test_pools_are_told_apart() -> None:
    found = run("mixed-pools", *FEW)
    summary = summarise(found)
    assert summary.num_gpus == 5
    prices = {pool.name: pool.gpu.price_per_hour_usd for pool in found.pools}
    assert summary.price_per_hour_usd == pytest.approx(2 * prices["new"] + 3 * prices["old"])
    assert summary.fleet is not None
    new, old = summary.fleet.pools
    assert (new.gpu, old.gpu) == ("b200", "a100-80gb-sxm")
    assert new.requests + old.requests == summary.completed == 1200
    assert new.requests > old.requests
    assert summary.kv.adds_up
    slots = [pool.memory.kv_cache_tokens for pool in found.pools]
    assert summary.kv.pool_tokens == pytest.approx((2 * slots[0] + 3 * slots[1]) / 5, rel=0.01)
    assert sum(summary.kv.mean.values()) == pytest.approx(1)
    assert "new: busy (%):" in result_text(summary)
    assert "2 × NVIDIA B200" in report_html(found, summary)


def test_shares_are_of_the_pools_of_the_replicas_that_are_looked_at() -> None:
    found = run("mixed-pools", "workload.trace.max_requests=1500", "workload.trace.rate_scale=200")
    kv = summarise(found).kv
    assert sum(kv.in_queue.values()) == pytest.approx(1)
    assert kv.mean_usage < kv.peak_usage <= 1


def test_settings_of_a_pool_are_put_on_those_of_the_engine() -> None:
    found = run(
        "mixed-pools", *FEW, "engine.max_num_batched_tokens=4096", "fleet.pools.old.engine={max_num_seqs: 7}"
    )
    new, old = (pool.engine for pool in found.pools)
    assert (new.max_num_batched_tokens, old.max_num_batched_tokens) == (4096, 4096)
    assert old.max_num_seqs == 7 != new.max_num_seqs
    running = np.split(found.log.steps.columns["running"], np.cumsum(found.log.steps.parts)[:-1])
    assert max(one.max() for one in running[2:]) <= 7


def test_stages_of_a_request_are_written_down() -> None:
    found = run("prefill-decode-70b", *FEW, *APART, "workload.trace.rate_scale=10")
    frame = requests_frame(found.log)
    stages = ["arrival_s", "scheduled_s", "prefilled_s", "blocks_s", "transfer_begun_s", "transfer_done_s"]
    for before, after in zip(stages, [*stages[1:], "first_token_s"], strict=True):
        assert (frame[before] <= frame[after]).all(), after
    assert np.allclose(frame["transfer_s"], frame["transfer_done_s"] - frame["prefilled_s"])
    assert set(frame["prefill_replica"]) == {0, 1}
    assert set(frame["replica"]) == {2, 3}
    [one] = found.log.fleet.transfers.columns["num_tokens"][:1] if found.log.fleet else [0]
    transfers = found.log.fleet.transfers.columns if found.log.fleet else {}
    on_link_s = transfers["done_s"][0] - transfers["begun_s"][0]
    assert on_link_s == pytest.approx(20e-6 + one * 131_072 / 50e9)  # 128 KiB of KV per token of Llama-3.1-8B
    summary = summarise(found)
    assert summary.fleet is not None
    assert summary.fleet.transfers is not None
    assert summary.fleet.transfers.count == summary.completed == 1200
    assert summary.kv.adds_up
    assert "KV transfer, mean (ms):" in result_text(summary)


def test_a_kv_cache_moves_in_the_layout_of_whoever_pulls_it() -> None:
    """Every GPU of a replica has the whole latent of MLA: eight take eight times the bytes, on one port."""
    found = run(
        "prefill-decode-70b", *APART, "model=deepseek-v2-lite", "workload.trace.max_requests=60",
        "fleet.pools={eight: {serves: decode, engine: {tensor_parallel_size: 8}}}",
    )  # fmt: skip
    assert found.log.fleet is not None
    of = found.log.fleet.transfers.columns
    token_s = (of["done_s"] - of["begun_s"] - 20e-6) / of["num_tokens"]
    assert set(of["target"]) == {2, 3, 4}
    num_gpus = np.where(of["target"] == 4, 8, 1)
    assert token_s == pytest.approx(num_gpus * 27 * 576 * 2 / 50e9)


def test_a_long_queue_is_not_gone_through_for_every_step() -> None:
    """A decoding replica without free blocks looks at the first request that waits for some."""
    looked = 0

    class Looked(FcfsQueue):
        def __iter__(self) -> Iterator[RequestState]:
            nonlocal looked
            for state in super().__iter__():
                looked += 1
                yield state

        def unordered(self) -> list[RequestState]:
            return list(self)

    kv = PagedKVCache(9, 16, enable_prefix_caching=False)
    scheduler = DecodeScheduler(SchedulerLimits(8, 512, 128), RULES["0.26"], kv)
    scheduler.on_pull = lambda request, num_tokens: None
    queue = scheduler.waiting = Looked()
    for index in range(400):
        scheduler.add(Request(index, f"r{index}", 0.0, 64, 8))
    for _ in range(50):
        assert scheduler.plan() is None
        assert scheduler.waiting is queue
    assert len(queue) == 400
    assert looked <= 50 * 4, "two for which there was room, and the one after them"


def test_no_prompt_is_computed_beside_a_decode() -> None:
    """The reason to take them apart: the longest gap between two tokens is a step of decodes."""
    apart = summarise(run("prefill-decode-70b", *FEW, *APART, "workload.trace.rate_scale=10"))
    whole = summarise(
        run("azure-conv-70b", *FEW, *APART, "hardware.replicas=4", "workload.trace.rate_scale=10")
    )
    assert apart.itl.p99_s < whole.itl.p99_s
    assert apart.total_output_tokens == whole.total_output_tokens


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["fleet.pools.decode.serves=all"], "pools that serve all do not go with pools that serve prefill"),
        (["fleet.pools.decode.serves=prefill"], "need both kinds and no other; missing: decode"),
        (["fleet.kv_link=null"], "fleet.kv_link  is missing: the KV cache of every prompt is pulled over it"),
        (["fleet.kv_link=infiniband-nrd"], "no such link.*did you mean infiniband-ndr"),
        (["fleet.pools.decode.gpu=h100-sxn"], "fleet.pools.decode.gpu  no such GPU.*did you mean h100-sxm"),
        (["fleet.failures=[{replica: 0, at_s: 1}]"], "do not go with pools that serve prefill and decode"),
        (["hardware.replicas=3"], "hardware.replicas.*does not go with fleet.pools"),
        (["fleet.pools.decode.engine={batching: static}"], "static needs a contiguous allocator"),
        (
            ["engine.scheduling_policy=priority"],
            "engine.scheduling_policy  does not go with serves: prefill",
        ),
        (
            ["fleet.pools.decode.engine={kv_cache_dtype: fp8}"],
            "pools between which KV caches move need one kv_cache_dtype",
        ),
        (  # a prompt that the decoder refuses would stay with the prefiller for ever
            ["fleet.pools.decode.engine={max_model_len: 2048}"],
            "pools between which KV caches move need one max_model_len",
        ),
        (
            ["fleet.pools.decode.serves=all", "fleet.pools.prefill.serves=all"],
            "fleet.kv_link  needs pools that serve prefill and decode",
        ),
    ],
)
def test_mistakes_in_pools_are_explained(changes: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_scenario("prefill-decode-70b", changes)


def test_check_looks_at_every_pool() -> None:
    """Seventy billion parameters do not fit one L4; `servesim check` says so without simulating."""
    with pytest.raises(MemoryDoesNotFitError, match="l4"):
        check("prefill-decode-70b", overrides=["fleet.pools.decode.gpu=l4"])


def test_an_engine_that_no_pool_has_need_not_serve() -> None:
    """Seventy billion parameters do not fit one H100, nor a hundred tokens of prompt into 16."""
    four = "engine={tensor_parallel_size: 4, max_model_len: 8192}"
    every = [f"fleet.pools.{name}.{four}" for name in ("prefill", "decode")]
    unused = ["engine.tensor_parallel_size=1", "engine.max_model_len=16", *HUNDRED]
    _, memory, _ = check("prefill-decode-70b", overrides=[*unused, *every])
    assert memory.num_gpu_blocks > 0
    assert summarise(run("prefill-decode-70b", *unused, *every)).completed == 5


def test_requests_that_only_some_pool_can_serve_are_not_all_refused() -> None:
    short = [f"fleet.pools.{name}.engine={{max_model_len: 16}}" for name in ("new", "old")]
    check("mixed-pools", overrides=[*short[:1], *HUNDRED])
    with pytest.raises(ConfigError, match="every request would be refused"):
        check("mixed-pools", overrides=[*short, *HUNDRED])


def test_a_memory_study_is_of_equal_pools() -> None:
    with pytest.raises(ConfigError, match=r"a memory study is of equal KV pools.*fleet=null"):
        fragmentation("mixed-pools")


def test_models_with_windows_are_not_taken_apart() -> None:
    with pytest.raises(ConfigError, match="attention windows cannot be served by prefill and decode pools"):
        run("prefill-decode-70b", *FEW, *APART, "model=gemma-2-27b", "engine.max_model_len=8192")
