"""Acceptance laws, the cost of verification and drafting, and what a scenario may say about them."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.step_times import law_of as law_of_recording
from servesim.api import check, simulate
from servesim.config.defaults import resolve_engine
from servesim.config.load import load_scenario
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig
from servesim.config.speculative import SpeculativeConfig
from servesim.cost.cuda_graphs import captured_sizes
from servesim.cost.memory import memory_budget
from servesim.cost.step_time import StepShape, build_step_time
from servesim.engine.acceptance import build_acceptance, expected_tokens_per_step
from servesim.engine.state import RequestState
from servesim.errors import ConfigError, TraceError
from servesim.workload.request import Request

H100, LLAMA, SMALL = load_gpu("h100-sxm"), load_model("llama-3.1-8b"), load_model("llama-3.2-1b")


def speculative(method="eagle", num_tokens=3, rate=0.7, **options):
    acceptance = options.pop("acceptance", {"law": "iid", "rate": rate})
    if method == "draft":
        options.setdefault("draft_model", "llama-3.2-1b")
    return {"method": method, "num_speculative_tokens": num_tokens, "acceptance": acceptance, **options}


def no_file(name):
    raise AssertionError(name)


def law_of(seed=1, **options):
    return build_acceptance(SpeculativeConfig(**speculative(**options)), seed, no_file)


def state(index=0, output_tokens=100):
    return RequestState(Request(index, f"r{index}", 0.0, 10, output_tokens), None, 10_000)


def tokens_per_step(law, requests=400, output_tokens=200, num_drafts=3):
    """Tokens of every full verification of many requests."""
    yielded = []
    for index in range(requests):
        request = state(index, output_tokens)
        while request.num_output_tokens + num_drafts + 1 < output_tokens:
            accepted = law(request, num_drafts, False)
            yielded.append(accepted + 1)
            request.num_output_tokens += accepted + 1
    return yielded


def assert_mean(sample, expected):
    mean = sum(sample) / len(sample)
    variance = sum((x - mean) ** 2 for x in sample) / (len(sample) - 1)
    half_width = 3.3 * math.sqrt(variance / len(sample))  # 99.9 %
    assert mean == pytest.approx(expected, abs=half_width)
    assert half_width < 0.03 * expected


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.95])
def test_iid_acceptance_yields_the_geometric_sum(rate):
    expected = (1 - rate**4) / (1 - rate)
    assert expected_tokens_per_step((rate,) * 3) == pytest.approx(expected, rel=1e-12)
    assert_mean(tokens_per_step(law_of(rate=rate)), expected)


def test_acceptance_by_depth():
    rates = (0.8, 0.5, 0.2)
    law = law_of(acceptance={"law": "by_depth", "rates": rates})
    assert_mean(tokens_per_step(law), 1 + 0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.2)
    assert expected_tokens_per_step(rates) == pytest.approx(2.28)


def test_recorded_acceptance_goes_on_row_by_row(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("tokens\n1\n2\n3\n4\n")
    config = SpeculativeConfig(**speculative(acceptance={"law": "recorded", "file": "steps.csv"}))
    law = build_acceptance(config, 1, lambda name: tmp_path / name)
    request = state()
    drawn = [law(request, 3, False) for _ in range(8)]
    assert drawn[:4] == drawn[4:]
    assert sorted(drawn[:4]) == [0, 1, 2, 3]
    assert all((b - a) % 4 == 1 for a, b in pairwise(drawn))
    path.write_text("tokens\n0\n")
    with pytest.raises(TraceError, match="at least 1"):
        build_acceptance(config, 1, lambda name: tmp_path / name)


def test_acceptance_depends_on_the_place_and_not_on_who_asks_when():
    first, second = law_of(), law_of()
    a, b = state(1), state(2)
    alone = [first(a, 3, False), first(b, 3, False)]
    assert [second(b, 3, False), second(a, 3, False)] == alone[::-1]
    assert tokens_per_step(law_of(seed=1), 5) != tokens_per_step(law_of(seed=2), 5)
    assert first(a, 1, False) == min(first(a, 3, False), 1), "fewer drafts are a prefix of more"
    assert first(a, 3, True) == 0, "placeholders are never accepted"


@pytest.mark.parametrize("recorded", [False, True])
def test_a_law_keeps_nothing_of_a_request(tmp_path, recorded):
    """It may never be asked again: its last token comes without drafts, or its replica fails."""
    (tmp_path / "steps.csv").write_text("tokens\n1\n2\n")
    acceptance = {"law": "recorded", "file": "steps.csv"} if recorded else {"law": "iid", "rate": 0.7}
    config = SpeculativeConfig(**speculative(acceptance=acceptance))
    law, request = build_acceptance(config, 1, lambda name: tmp_path / name), state()
    before = sys.getrefcount(request)
    law(request, 3, False)
    assert sys.getrefcount(request) == before


# ---- cost --------------------------------------------------------------------------------------


def engine(**options):
    fixed = {"max_model_len": 8192, "max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    config = EngineConfig(**fixed, step_time={"law": "operators", "host": "none"}, **options)
    return resolve_engine(config, LLAMA, H100)


def gain(batch, spec, *, model=LLAMA, context=1000, mean_tokens=None, **options):
    """Tokens per second with speculation over those without."""
    drafts = spec["num_speculative_tokens"]
    draft = SMALL if spec["method"] == "draft" else None
    plain_s = build_step_time(model, H100, engine(**options)).step_s(
        StepShape(batch, (batch * context,), (), batch)
    )
    verification = StepShape(batch, (batch * (context + drafts),), (), batch * (1 + drafts), batch * drafts)
    spec_s = build_step_time(model, H100, engine(speculative=spec, **options), draft).step_s(verification)
    mean_tokens = mean_tokens or expected_tokens_per_step((spec["acceptance"]["rate"],) * drafts)
    return mean_tokens * plain_s / spec_s


def test_a_recording_is_judged_with_its_draft_model():
    """Four times over all sixteen layers of the draft model, and not over one layer of the model."""
    spec = speculative("draft", 4)
    prepared = prepare(load_scenario("std10k", [f"engine.speculative={json.dumps(spec)}"]))
    shape = StepShape(8, (8 * 1004,), (), 8 * 5, 8 * 4)
    wanted = build_step_time(LLAMA, H100, prepared.engine, SMALL)
    assert law_of_recording(prepared).step_s(shape) == pytest.approx(wanted.step_s(shape), rel=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        speculative("draft", 4),
        speculative("eagle", 3),
        speculative("medusa", 3, tree_tokens=64),
        speculative("ngram", 3),
    ],
    ids=lambda spec: spec["method"],
)
def test_calibrated_scalars_reach_drafting_and_verification(spec):
    drafts = spec["num_speculative_tokens"]
    shape = StepShape(64, (64 * 8000,), ((300, 0),), 64 * (1 + drafts) + 1, 64 * drafts)

    def law(**scalars):
        config = engine(speculative=spec)
        scaled = config.model_copy(update={"step_time": config.step_time.model_copy(update=scalars)})
        return build_step_time(LLAMA, H100, scaled, SMALL if spec["method"] == "draft" else None)

    plain, slow = law(), law(gpu_time_factor=1.3)
    assert slow.gpu_s(shape) == pytest.approx(1.3 * plain.gpu_s(shape), rel=1e-12)
    assert slow.verify_s(shape) == pytest.approx(1.3 * plain.verify_s(shape), rel=1e-12)
    assert sum(slow.breakdown(shape).values()) == pytest.approx(slow.gpu_s(shape))
    if spec["method"] != "ngram":  # which drafts on the host
        assert law(bandwidth_factor=0.5).draft_s(shape) > 1.6 * plain.draft_s(shape)


@pytest.mark.parametrize(
    "spec",
    [speculative("draft", 4), speculative("eagle", 5, 0.6), speculative("ngram", 3, 0.4)],
    ids=lambda spec: spec["method"],
)
def test_the_gain_falls_with_the_batch_and_below_one(spec):
    gains = [gain(batch, spec) for batch in (1, 16, 64, 128, 256, 512)]
    assert gains[0] > 1.3
    assert all(later < before + 0.01 for before, later in pairwise(gains))
    assert gains[-1] < 1


def test_a_tree_costs_more_rows_than_its_chain():
    tree = speculative("medusa", 3, tree_tokens=64)
    chain = speculative("medusa", 3)
    assert gain(1, tree) < gain(1, chain)
    assert gain(32, tree) < 0.5 * gain(32, chain), "64 candidates of 32 sequences are compute-bound"


def test_verification_wakes_more_experts():
    """EAGLE gains 1.50 on Mixtral at 3.25 tokens a step, and 3 on a dense model (arXiv 2401.15077)."""
    mixtral, spec = load_model("mixtral-8x7b"), speculative("eagle", 4)
    sparse = gain(1, spec, model=mixtral, mean_tokens=3.25, tensor_parallel_size=2)
    dense = gain(1, spec, mean_tokens=3.25)
    assert sparse == pytest.approx(1.5, rel=0.15)
    assert dense > 1.5 * sparse


@pytest.mark.parametrize("method", ["ngram", "draft", "eagle", "mtp", "medusa"])
def test_the_parts_of_a_step_add_up(method):
    draft = SMALL if method == "draft" else None
    law = build_step_time(LLAMA, H100, engine(speculative=speculative(method)), draft)
    for shape in (
        StepShape(8, (8000,), (), 32, 24),
        StepShape(8, (8000,), ((512, 0), (100, 400)), 34, 24),
        StepShape(0, (0,), ((512, 0),), 0),
        StepShape(0, (0,), ((512, 0),), 1),
    ):
        assert sum(law.breakdown(shape).values()) == pytest.approx(law.gpu_s(shape), rel=1e-9)
        assert law.draft_s(shape) >= 0
    assert (law.draft_s(StepShape(8, (8000,), (), 32, 24)) > 0) == (method != "ngram")


def test_a_shape_without_drafts_costs_what_it_did():
    law = build_step_time(LLAMA, H100, engine(speculative=speculative("ngram")))
    shape = StepShape(8, (8000,), ((512, 0),), 8)
    assert law.gpu_s(shape) == build_step_time(LLAMA, H100, engine()).gpu_s(shape)


def test_the_drafter_takes_weights_and_pages():
    plain = memory_budget(LLAMA, H100, engine())
    for method, weights in (("ngram", 0), ("draft", SMALL.weight_bytes(2.0, 2.0))):
        budget = memory_budget(
            LLAMA, H100, engine(speculative=speculative(method)), SMALL if method == "draft" else None
        )
        assert budget.weights_bytes - plain.weights_bytes == pytest.approx(weights, abs=1)
    draft = memory_budget(LLAMA, H100, engine(speculative=speculative("draft")), SMALL)
    token_bytes = LLAMA.kv_bytes_per_token() + SMALL.kv_bytes_per_token()
    assert draft.num_gpu_blocks == int(draft.kv_cache_bytes // (16 * token_bytes))
    head = memory_budget(LLAMA, H100, engine(speculative=speculative("eagle")))
    assert 0.2e9 < head.weights_bytes - plain.weights_bytes < 0.7e9
    block_bytes = 16 * LLAMA.kv_bytes_per_token() * 33 / 32
    assert head.num_gpu_blocks == head.kv_cache_bytes // block_bytes


def test_graphs_are_captured_for_uniform_decodes():
    few = EngineConfig(max_num_seqs=16, max_model_len=1024)
    many = few.model_copy(update={"speculative": SpeculativeConfig(**speculative(num_tokens=3))})
    assert captured_sizes(H100, resolve_engine(few, LLAMA, H100))[-1] == 32
    assert captured_sizes(H100, resolve_engine(many, LLAMA, H100))[-1] == 128


# ---- the scenario ------------------------------------------------------------------------------

SCENARIO = """
name: speculating
model: llama-3.1-8b
hardware: {gpu: h100-sxm}
engine:
  max_model_len: 8192
  speculative: {method: eagle, num_speculative_tokens: 3, acceptance: {law: iid, rate: 0.7}}
workload:
  arrivals: {process: poisson, rate_per_s: 8}
  num_requests: 150
  prompt_tokens: {law: fixed, tokens: 200}
  output_tokens: {law: fixed, tokens: 200}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(SCENARIO)
    return path


def test_a_run_reports_what_vllm_reports(scenario):
    result = simulate(scenario)
    of = result.summary.speculation
    rates = of.position_rates
    assert of.acceptance_length == pytest.approx(2.533, rel=0.02)
    assert rates == pytest.approx((0.7, 0.49, 0.343), rel=0.05)
    assert of.acceptance_length == pytest.approx(1 + sum(rates))
    assert of.draft_tokens == 3 * of.num_drafts
    text = str(result)
    assert "Speculative Decoding" in text
    assert "  Position 2:" in text
    assert '"spec_decode_acceptance_length"' in result.to_json()
    plain = simulate(scenario, overrides=["engine.speculative=null"])
    assert plain.summary.speculation is None
    assert result.summary.tpot.mean_s < plain.summary.tpot.mean_s
    assert result.summary.itl.mean_s > result.summary.tpot.mean_s, "a gap brings several tokens"
    assert result.summary.total_output_tokens == plain.summary.total_output_tokens == 30_000
    assert result.summary.kv.adds_up


@pytest.mark.parametrize(
    ("version", "method", "is_async"),
    [
        ("0.26", "eagle", True),
        ("0.26", "mtp", True),
        ("0.26", "draft", False),
        ("0.33", "draft", True),
        ("0.33", "ngram", False),
        ("0.26", "medusa", False),
    ],
)
def test_async_by_default(version, method, is_async):
    config = EngineConfig(version=version, max_model_len=4096, speculative=speculative(method))
    assert resolve_engine(config, LLAMA, H100).async_scheduling is is_async


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.speculative.method=ngram", "engine.async_scheduling=true"], "is not possible with ngram"),
        (["engine.speculative.method=draft"], "comes with method: draft"),
        (["engine.speculative.draft_model=llama-3.2-1b"], "comes with method: draft"),
        (["engine.speculative.tree_tokens=9"], "is for method: medusa"),
        (["engine.speculative.acceptance={law: by_depth, rates: [0.5]}"], "one rate for each of the 3"),
        (["engine.allocator=contiguous-max"], "needs allocator: paged"),
        (["engine.speculative.acceptance={law: recorded, file: none.csv}"], "none.csv"),
    ],
)
def test_what_cannot_be_is_refused(scenario, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_scenario(scenario, overrides)


def test_check_builds_the_engine(scenario):
    with pytest.raises(ConfigError, match=r"vLLM 0.22 has no watermark"):
        check(scenario, overrides=["engine.version=0.22", "engine.watermark=0.1"])


def test_what_was_accepted_is_noted_for_a_step_trace_only(scenario):
    schedulers, steps = [], []

    def watch(number, engine, scheduler, law):
        schedulers.append(scheduler)
        return law

    for options in ({}, {"step_trace": steps.append}):
        few = load_scenario(scenario, ["workload.num_requests=20"])
        run_prepared(prepare(few), watch=watch, **options)
    sizes = [max(map(len, dicts_of(one.accept)), default=0) for one in schedulers]
    assert sizes == [0, 0], "a line of a trace takes what was noted"
    assert sum(sum(step.get("accepted", {}).values()) for step in steps) > 100


def dicts_of(law):
    return [value for value in vars(law).values() if isinstance(value, dict)]


def test_drafting_needs_room_in_a_step():
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=64, speculative=speculative("draft"))
    with pytest.raises(ConfigError, match="no room for a token"):
        resolve_engine(config, LLAMA, H100)


@pytest.mark.parametrize(
    ("overrides", "other_tokens"),
    [
        (["engine.version=0.26", "engine.max_num_seqs=256"], 256),
        (["engine.version=0.33", "engine.max_num_batched_tokens=8191", "engine.max_model_len=8191"], 0),
        (["engine.speculative=null", "workload.sampling={method: parallel, n: 4}"], 3),
    ],
)
def test_a_whole_prompt_needs_room_beside_drafts_and_sequences(scenario, overrides, other_tokens):
    """Where it has none it would never start, nor would whoever is behind it."""
    drafting = ["engine.speculative.method=draft", "engine.speculative.draft_model=llama-3.2-1b"]
    whole = ["engine.enable_chunked_prefill=false", "engine.max_num_batched_tokens=8192"]
    loaded = load_scenario(scenario, [*drafting, *whole, *overrides, "workload.num_requests=2"])
    if not other_tokens:
        assert run_prepared(prepare(loaded)).log.requests.columns["status"].tolist() == [0, 0]
        return
    with pytest.raises(
        ConfigError, match=rf"beside the {other_tokens} .*raise it to at least {8191 + other_tokens}"
    ):
        run_prepared(prepare(loaded))
