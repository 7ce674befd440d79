"""What a scenario may ask of a KV cache that is short of room, what it costs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from servesim import api
from servesim.config.defaults import resolve_engine
from servesim.config.files import find_data
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.kv_groups import kv_layout
from servesim.cost.step_time import StepShape, build_step_time
from servesim.cost.swap import BlockCopies
from servesim.errors import ConfigError, MemoryDoesNotFitError
from servesim.kv.host import SwapSpace
from servesim.workload.build import build_workload

LLAMA = load_model(str(find_data("models", "llama-3.1-8b")))
OPT = load_model(str(find_data("models", "opt-13b")))
DEEPSEEK = load_model(str(find_data("models", "deepseek-v2-lite")))
H100 = load_gpu(str(find_data("gpus", "h100-sxm")))
A100 = load_gpu(str(find_data("gpus", "a100-40gb-sxm")))
DECODE = StepShape(64, (64 * 8000,), (), 64)


def engine_of(model=LLAMA, gpu=H100, **settings):
    return resolve_engine(EngineConfig(**settings), model, gpu)


# ---- formats of the KV cache -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype", "token_bytes"),
    [
        (LLAMA, "auto", 131_072),
        (LLAMA, "fp8", 65_536),
        (LLAMA, "int8", 65_536 + 32 * 8 * 2 * 4),  # layers, KV heads, key and value, scale and zero point
        (LLAMA, "int4", 32_768 + 32 * 8 * 2 * 4),
        (DEEPSEEK, "int8", 27 * (576 + 4)),  # one latent per layer
    ],
)
def test_bytes_of_a_token(model, dtype: str, token_bytes: int) -> None:
    layout = kv_layout(model, engine_of(model, kv_cache_dtype=dtype))
    assert layout.token_bytes == token_bytes
    assert layout.block_bytes == 16 * token_bytes


def test_fewer_bits_are_read_faster_but_not_in_proportion() -> None:
    slopes = {
        dtype: build_step_time(LLAMA, H100, engine_of(kv_cache_dtype=dtype)).context_slopes_s[0]
        for dtype in ("auto", "fp8", "int8", "int4")
    }
    assert slopes["auto"] > slopes["int8"] > slopes["int4"]
    assert 1.5 < slopes["auto"] / slopes["int8"] < 2
    assert 2 < slopes["auto"] / slopes["int4"] < 4


def test_an_integer_cache_needs_no_fp8_kernels() -> None:
    engine = engine_of(OPT, A100, kv_cache_dtype="int8")
    assert build_step_time(OPT, A100, engine).step_s(DECODE) > 0
    with pytest.raises(ConfigError, match="no coefficients for attention on an fp8"):
        build_step_time(OPT, A100, engine_of(OPT, A100, kv_cache_dtype="fp8"))


def test_four_bits_in_llama_2_7b_serve_as_many_requests_as_lmdeploy_says() -> None:
    """Requests per second over those of fp16: 1.3 (int8) and 1.4 (int4) in its documentation."""
    settings = [
        "model=llama-2-7b",
        "engine.enable_prefix_caching=false",
        "engine.max_num_seqs=256",
        "workload.trace.max_requests=1500",
        "workload.arrivals.concurrency=600",
    ]
    rates = {
        dtype: api.simulate(
            "closed-loop-sharegpt", overrides=[*settings, f"engine.kv_cache_dtype={dtype}"]
        ).summary.request_throughput
        for dtype in ("auto", "int8", "int4")
    }
    assert rates["int8"] / rates["auto"] == pytest.approx(1.3, rel=0.1)
    assert rates["int4"] / rates["auto"] == pytest.approx(1.4, rel=0.1)


# ---- paging and swapping -----------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "factor"), [(16, 1.25), (1, 5.0), (64, 1.0625)])
def test_paging_overhead_counts_lookups(block_size: int, factor: float) -> None:
    free, paged = (
        build_step_time(
            LLAMA, H100, engine_of(block_size=block_size, step_time=OperatorStepTime(paging_overhead=share))
        ).context_slopes_s[0]
        for share in (0.0, 0.25)
    )
    assert paged == pytest.approx(factor * free)


def test_copies_are_launches_and_bytes() -> None:
    copies = BlockCopies(1_000_000, 80, 5e-6, 25e9, 1e9)
    assert copies.seconds(10) == pytest.approx(10 * 80 * 5e-6 + 10e6 / 25e9)
    assert copies.seconds(0, 10) == pytest.approx(copies.seconds(10) + 10e6 / 1e9)
    assert copies.seconds(0, 0) == 0


def test_a_step_waits_for_what_it_swaps() -> None:
    plain = build_step_time(OPT, A100, engine_of(OPT, A100, async_scheduling=False))
    law = build_step_time(OPT, A100, engine_of(OPT, A100, preemption_mode="swap"))
    assert law.step_s(DECODE) == plain.step_s(DECODE)
    swapping = DECODE._replace(swapped_blocks=(3, 0))
    block_s = 80 * 6e-6 + 16 * 819_200 / (32e9 * 0.78)
    assert law.step_s(swapping) - law.step_s(DECODE) == pytest.approx(3 * block_s)


def test_the_disk_takes_what_the_host_has_no_room_for() -> None:
    space = SwapSpace(10, 5)
    assert space.put("a", 8) == (8, 0)
    assert space.has_room(5)
    assert space.put("b", 3) == (0, 3)
    assert not space.has_room(3)
    assert space.take("a") == (8, 0)
    assert space.has_room(10)


# ---- what is refused ---------------------------------------------------------------------------

SCENARIO = """\
name: test
model: {model}
hardware: {{gpu: h100-sxm}}
engine:
  {engine}
workload:
  arrivals: {{process: burst}}
  prompt_tokens: {{law: fixed, tokens: 100}}
  output_tokens: {{law: fixed, tokens: 10}}
  num_requests: 3
  {workload}
"""
BEAM, SWAP = "sampling: {method: beam, n: 2}", "preemption_mode: swap"
BUDGET = "kv_eviction: {policy: heavy-hitters, budget_tokens: 50}"


def scenario(folder: Path, engine: str = "block_size: 16", workload: str = "", model: str = "llama-3.1-8b"):
    file = folder / "test.yaml"
    file.write_text(SCENARIO.format(engine=engine, workload=workload, model=model), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("engine", "workload", "message"),
    [
        (
            f"{{{SWAP}, async_scheduling: true}}",
            "",
            "async_scheduling  does not go with preemption_mode: swap",
        ),
        (f"{{{SWAP}, enable_prefix_caching: true}}", "", "enable_prefix_caching  does not go with"),
        (f"{{{SWAP}, batching: prefill-first}}", "", "batching  does not go with"),
        (f"{{{SWAP}, allocator: contiguous-max}}", "", "allocator  does not go with"),
        (f"{{{SWAP}, {BUDGET}}}", "", "kv_eviction  does not go with preemption_mode: swap"),
        (f"{{{BUDGET}, allocator: contiguous-max}}", "", "allocator  does not go with kv_eviction"),
        ("{enable_prefix_caching: true}", BEAM, "enable_prefix_caching  does not go with workload.sampling"),
        (f"{{{BUDGET}}}", BEAM, "kv_eviction  does not go with workload.sampling"),
        (
            "{kv_eviction: {policy: sliding-sink}}",
            "",
            "needs exactly one of budget_tokens and budget_fraction",
        ),
        ("{kv_eviction: {policy: sliding-sink, budget_tokens: 4}}", "", "leaves no token of the budget"),
        ("{}", "sampling: {method: beam, n: 2, sharing: prefix-cache}", "needs method: parallel"),
        (
            "{}",
            "sampling: {method: parallel, n: 2, sharing: prefix-cache}\n  sessions: {turns: 2}",
            "wait for no",
        ),
        ("{}", "sampling: {method: parallel, n: 2, concentration: 1}", "is for method: beam"),
    ],
)
def test_combinations_that_vllm_did_not_have(
    tmp_path: Path, engine: str, workload: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        api.load(scenario(tmp_path, engine, workload))
    assert message in str(caught.value)


@pytest.mark.parametrize(("engine", "workload"), [(f"{{{SWAP}}}", ""), ("{}", BEAM), (f"{{{BUDGET}}}", "")])
def test_a_model_with_windows_cannot(tmp_path: Path, engine: str, workload: str) -> None:
    with pytest.raises(ConfigError, match="windows"):
        api.simulate(scenario(tmp_path, engine, workload, "gemma-2-27b"))


def test_a_budget_may_be_a_share(tmp_path: Path) -> None:
    engine = "{max_model_len: 1000, kv_eviction: {policy: sliding-sink, budget_fraction: 0.05}}"
    result = api.simulate(scenario(tmp_path, engine))
    eviction = result.run.scenario.engine.kv_eviction
    assert eviction is not None
    assert eviction.budget_tokens == 50
    assert any(warned.caveat.key == "kv_dropped" for warned in result.summary.warnings)


def test_a_pool_too_small_for_the_beams_still_serves_them(tmp_path: Path) -> None:
    """Without a swap space, sequences are computed anew, each by itself behind the prompt."""
    engine = "{num_gpu_blocks_override: 50, max_model_len: 120, preemption_mode: recompute}"
    beams = "sampling: {method: beam, n: 6}"
    overrides = ["workload.output_tokens.tokens=20", "workload.num_requests=6"]
    result = api.simulate(scenario(tmp_path, engine, beams), overrides=overrides)
    assert result.summary.completed == 6
    assert result.summary.load.preemptions > 0
    message = "6 sequences of this length need 54 blocks and the pool has 49 .* at most 128"
    with pytest.raises(MemoryDoesNotFitError, match=message):
        api.simulate(scenario(tmp_path, engine, beams), overrides=[*overrides, "engine.max_model_len=144"])


# ---- samples as requests -----------------------------------------------------------------------


def test_samples_share_their_prompt_and_nothing_else(tmp_path: Path) -> None:
    samples = "sampling: {method: parallel, n: 3, sharing: prefix-cache}"
    loaded = api.load(scenario(tmp_path, workload=samples))
    work = build_workload(loaded.scenario.workload, 1, lambda name: tmp_path / name)
    requests = list(work.arrivals())
    assert work.num_requests == len(requests) == 9
    assert [request.index for request in requests] == list(range(9))
    assert len({request.request_id for request in requests}) == 9
    assert [len({r.prompt for r in requests[i : i + 3]}) for i in (0, 3, 6)] == [1, 1, 1]
    assert len({request.prompt for request in requests}) == 3
    load = api.simulate(loaded).summary.load
    assert load.prefix_cache_hits == 6 * 96, "all full blocks of the prompt, for all but the first sample"
