"""Bounds without simulation: they refuse no scenario that keeps its SLO, and ask for no replica too many."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_guess import Fluid
from servesim.analysis.plan_setup import traffic_in
from servesim.analysis.plan_trials import TrialTask, run_trial
from servesim.config.load import load_scenario

CHAT = (
    "workload.sessions=null",
    "workload.shared_prefixes=null",
    "workload.num_requests=2000",
    "workload.prompt_tokens={law: geometric, mean_tokens: 600}",
    "workload.output_tokens={law: geometric, mean_tokens: 60}",
)
SHARED = "workload.shared_prefixes={num_prefixes: 2, tokens: 24000}"
DRAFTS = "engine.speculative={method: ngram, num_speculative_tokens: 4, acceptance: {law: iid, rate: 0.9}}"


def analytic(*changes: str, base: Sequence[str] = CHAT) -> Analytic:
    loaded = load_scenario("poisson-chat", [*base, *changes])
    return Analytic(loaded, traffic_in(loaded), loaded.scenario.slo)


def keeps(one: Analytic, factor: float) -> bool:
    return run_trial(TrialTask(one.loaded, factor, 1, 1, "round-robin", 1)).keeps


def test_who_refuses_or_cuts_requests_is_not_cheap() -> None:
    lengths = [
        "workload.prompt_tokens={law: fixed, tokens: 1000}",
        "workload.output_tokens={law: fixed, tokens: 24}",
    ]
    assert analytic(*lengths, "engine.max_model_len=1024").alone() == ""
    for short in (1023, 1000):  # the last token does not fit, or none
        told = analytic(*lengths, f"engine.max_model_len={short}").alone()
        assert told.startswith(f"2,000 of 2,000 requests are longer than engine.max_model_len={short}")


def test_text_that_the_cache_holds_is_not_waited_for() -> None:
    found = analytic(SHARED, "slo.ttft_p99_s=0.3")
    assert found.alone() == ""
    assert keeps(found, 0.2)
    cold = analytic(SHARED, "slo.ttft_p99_s=0.3", "engine.enable_prefix_caching=false")
    assert "new tokens (P99) alone takes" in cold.alone()


def test_what_was_generated_is_in_the_cache_too() -> None:
    chats = ["workload.num_requests=50", "workload.shared_prefixes=null"]
    chats += [
        "workload.prompt_tokens={law: fixed, tokens: 100}",
        "workload.output_tokens={law: fixed, tokens: 900}",
    ]
    assert set(analytic(base=chats).prompts) == {100.0}


def test_a_step_yields_the_drafts_that_are_accepted() -> None:
    answers = "workload.output_tokens={law: fixed, tokens: 100}"
    plain = analytic(answers)
    found = analytic(answers, DRAFTS, f"slo.tpot_p99_s={plain.token_s(1) / 2}")
    assert found.tokens_per_step == pytest.approx(1 + 0.9 + 0.9**2 + 0.9**3 + 0.9**4)
    assert found.alone() == ""
    assert keeps(found, 0.05)
    assert analytic(answers, DRAFTS).most_rate_per_s() > plain.most_rate_per_s()


def test_recorded_drafts_count_by_what_was_recorded(tmp_path) -> None:
    (tmp_path / "steps.csv").write_text("tokens\n1\n3\n9\n")
    law = f"acceptance: {{law: recorded, file: {tmp_path / 'steps.csv'}}}"
    found = analytic(f"engine.speculative={{method: ngram, num_speculative_tokens: 4, {law}}}")
    assert found.tokens_per_step == 3  # of at most five


def test_blocks_that_requests_share_are_counted_once() -> None:
    small = "engine.num_gpu_blocks_override=4000"  # 64,000 tokens
    alone, shared = analytic(small), analytic(small, SHARED)
    assert 50 < 0.9 * alone.most_running < shared.most_running  # some are the first to bring it
    apart = analytic(small, SHARED, "engine.enable_prefix_caching=false")
    assert apart.most_running == 2


def test_a_window_keeps_no_more_than_itself() -> None:
    """Contexts of 60,000 tokens, of which only every sixth layer keeps all."""
    long = ["model=gemma-3-27b", "engine.max_model_len=70000", "slo.ttft_p99_s=30"]
    long += ["workload.prompt_tokens={law: fixed, tokens: 60000}"]
    found = analytic(*long)
    assert found.prepared.memory.kv_cache_tokens < 60000
    assert found.most_running == 2
    assert Fluid.of(found).attained(1, 1e-3) < 1


def test_a_budget_keeps_no_more_than_itself() -> None:
    blocks, few = (
        "engine.num_gpu_blocks_override=4000",
        "engine.kv_eviction={policy: heavy-hitters, budget_tokens: 128}",
    )
    assert analytic(blocks, few).most_running > 4 * analytic(blocks).most_running


def test_a_replica_that_misses_when_never_idle_may_still_do() -> None:
    """A prompt takes longer than the TPOT may, but few prompts come while four tokens are generated."""
    short = [
        "workload.prompt_tokens={law: fixed, tokens: 3000}",
        "workload.output_tokens={law: fixed, tokens: 4}",
    ]
    found = analytic(*short, "slo.tpot_p99_s=0.02", "slo.ttft_p99_s=1")
    assert found.prompt_s(3000) / 3 > 0.02 > found.token_s(1)
    assert found.most_rate_per_s() > 0
    assert keeps(found, 0.01)


def test_contexts_under_a_window_are_those_of_every_step() -> None:
    traffic = analytic().traffic._replace(outputs=analytic().traffic.outputs[:2])
    traffic = traffic._replace(outputs=traffic.outputs * 0 + [3, 5])
    steps = [min(10 + j, 12) for j in range(1, 3)] + [min(9 + j, 12) for j in range(1, 5)]
    assert traffic.decode_context_tokens(traffic.outputs * 0 + [10, 9], 12) == sum(steps) / 6
