"""The law of one step: composition, reference figures, runs of decode steps, host time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.config.defaults import resolve_engine
from servesim.config.profiles import DecodeAttentionEfficiency, GemmEfficiency, load_gpu, load_model
from servesim.config.scenario import EngineConfig, LinearStepTime, OperatorStepTime
from servesim.cost.collectives import AllReduce
from servesim.cost.cuda_graphs import captured_sizes, padded_tokens
from servesim.cost.host import HOST_PROFILES
from servesim.cost.layers import shard
from servesim.cost.operators import OperatorLaw
from servesim.cost.step_time import StepShape, build_step_time
from servesim.errors import ConfigError

LLAMA = load_model("llama-3.1-8b")
H100 = load_gpu("h100-sxm")
REFERENCE_MS = {  # batch 1 at 500, 32 at 1000, 128 at 1000 tokens of context
    "a100-80gb-sxm": (11.6, 14.4, 25.1),
    "h100-sxm": (6.27, 7.64, 11.9),
    "h200-sxm": (4.94, 5.94, 9.05),
    "b200": (3.43, 4.02, 5.85),
}
POINTS = ((1, 500), (32, 1000), (128, 1000))


def law_of(model=LLAMA, gpu=H100, host="none", **engine):
    config = EngineConfig(step_time=OperatorStepTime(host=host), **engine)
    return OperatorLaw(model, gpu, resolve_engine(config, model, gpu))


def decode(batch, context):
    return StepShape(batch, (batch * context,), (), batch)


# Coefficients that the reference figures were computed with: compute, memory, launch, knee of bf16 products;
# launch and memory of decode attention. B200's shares are of 8,000 GB/s.
REFERENCE_LAWS = {
    "a100-80gb-sxm": ((0.84, 0.81, 5.0e-6, 1.8), (17.8e-6, 0.74)),
    "h100-sxm": ((0.83, 0.88, 3.6e-6, 4.5), (11.5e-6, 0.93)),
    "h200-sxm": ((0.84, 0.84, 4.0e-6, 5.1), (11.4e-6, 0.89)),
    "b200": ((0.74, 0.80 * 8000 / 7672, 3.6e-6, 3.3), (9.0e-6, 0.92 * 8000 / 7672)),
}


def reference_gpu(name):
    """The GPU with the coefficients of the reference figures."""
    gpu = load_gpu(name)
    (compute, memory, launch_s, knee), (attention_s, attention_memory) = REFERENCE_LAWS[name]
    gemm = GemmEfficiency(compute=compute, memory=memory, launch_s=launch_s, knee=knee, wave=0.0)
    decode = DecodeAttentionEfficiency(launch_s=attention_s, per_seq_kv_head_s=0.0, memory=attention_memory)
    update = {"gemm": {"bf16": gemm}, "decode_attention": {"bf16": decode}}
    return gpu.model_copy(update={"efficiency": gpu.efficiency.model_copy(update=update)})


@pytest.mark.parametrize("name", REFERENCE_MS)
def test_reference_decode_steps_of_llama_8b(name):
    """The composition: with the published coefficients the published figures come out, sampling aside."""
    law = law_of(gpu=reference_gpu(name))
    for (batch, context), expected_ms in zip(POINTS, REFERENCE_MS[name], strict=True):
        parts = law.breakdown(decode(batch, context))
        assert (sum(parts.values()) - parts["sampling"]) * 1e3 == pytest.approx(expected_ms, rel=0.01)


@pytest.mark.parametrize("name", REFERENCE_MS)
def test_our_coefficients_stay_near_the_reference(name):
    """Fitted to the same kernels with more terms, which the published figures leave out at batch 128."""
    law = law_of(gpu=load_gpu(name))
    for (batch, context), expected_ms in zip(POINTS, REFERENCE_MS[name], strict=True):
        parts = law.breakdown(decode(batch, context))
        assert (sum(parts.values()) - parts["sampling"]) * 1e3 == pytest.approx(
            expected_ms, rel=0.04 if batch < 128 else 0.08
        )


def test_tokens_per_second_at_batch_1_with_the_engine_around_it():
    # Measured on H100 with vLLM-like engines: 158 tokens/s.
    seconds = law_of(host="auto").step_s(decode(1, 500))
    assert 1 / seconds == pytest.approx(158, rel=0.05)


SHAPES = st.builds(
    lambda decodes, context, chunks: StepShape(
        decodes, (decodes * context, decodes * min(context, 128)), chunks, decodes + len(chunks)
    ),
    st.integers(0, 600),
    st.integers(1, 20_000),
    st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 50_000)), max_size=4).map(tuple),
).filter(lambda shape: shape.num_tokens)


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        ("gpt-oss-20b", {}),
        ("gpt-oss-20b", {"tensor_parallel_size": 4, "enforce_eager": True}),
        ("gpt-oss-20b", {"quantization": "fp8", "kv_cache_dtype": "fp8", "max_num_seqs": 64}),
        ("deepseek-v3", {"tensor_parallel_size": 8, "quantization": "fp8"}),
        ("llama-3.1-70b", {"tensor_parallel_size": 2}),
        ("llama-3.1-70b", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "quantization": "w4a16"}),
        (
            "qwen3-30b-a3b",
            {"tensor_parallel_size": 4, "enable_expert_parallel": True, "quantization": "int8"},
        ),
        ("gpt-oss-20b", {"cudagraph_mode": "full_decode_only"}),
    ],
)
@settings(deadline=None)
@given(shape=SHAPES)
def test_the_breakdown_adds_up(model, engine, shape):
    law = law_of(load_model(model), **engine)
    shape = shape._replace(decode_context_tokens=shape.decode_context_tokens[: len(law.windows)])
    parts = law.breakdown(shape)
    assert all(seconds >= 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(law.gpu_s(shape), rel=1e-9)


@pytest.mark.parametrize("host", [*HOST_PROFILES, "auto"])
@pytest.mark.parametrize("mode", ["none", "piecewise", "full_and_piecewise"])
@settings(deadline=None)
@given(batch=st.integers(1, 1000), context=st.integers(1, 3000), growing=st.integers(0, 1000), data=st.data())
def test_a_run_of_decode_steps_equals_its_steps(host, mode, batch, context, growing, data):
    law = law_of(load_model("gpt-oss-20b"), host=host, cudagraph_mode=mode, max_num_batched_tokens=8192)
    windows = (batch * min(context, 128), batch * context)
    growth = (min(growing, batch), batch)
    run = law.decode_steps(batch, windows, growth)
    assert run.first_s == law.step_s(StepShape(batch, windows, (), batch))
    step = data.draw(st.integers(0, min(run.num_steps, 100_000) - 1))
    later = tuple(tokens + step * more for tokens, more in zip(windows, growth, strict=True))
    assert run.first_s + step * run.growth_s == pytest.approx(
        law.step_s(StepShape(batch, later, (), batch)), rel=1e-9
    )


def test_a_run_is_split_where_the_gpu_overtakes_the_host():
    law = law_of(load_model("llama-3.2-1b"), host="auto")
    run = law.decode_steps(128, (128,), (128,))
    assert run.growth_s == 0
    assert run.first_s == pytest.approx(1e-3 + 128 * 10e-6 + 0.2e-3)
    at_the_end, after = (128 + 128 * step for step in (run.num_steps - 1, run.num_steps))
    assert law.step_s(StepShape(128, (at_the_end,), (), 128)) == run.first_s
    assert law.step_s(StepShape(128, (after,), (), 128)) > run.first_s
    second = law.decode_steps(128, (after,), (128,))
    assert second.growth_s > 0


def test_host_time_is_added_or_hidden():
    shape = decode(32, 1000)
    gpu_s = law_of(host="none").step_s(shape)
    assert law_of(host="v0.6").step_s(shape) == pytest.approx(gpu_s + 3e-3)
    assert law_of(host="auto", async_scheduling=False).step_s(shape) == pytest.approx(
        gpu_s + 1e-3 + 32 * 10e-6
    )
    assert law_of(host="auto").step_s(shape) == pytest.approx(gpu_s + 0.2e-3)
    tiny = law_of(load_model("gpt-2"), host="auto")
    assert tiny.step_s(decode(1, 10)) == pytest.approx(1e-3 + 10e-6 + 0.2e-3)


def test_steps_are_padded_to_captured_sizes():
    engine = resolve_engine(EngineConfig(), LLAMA, H100)
    sizes = captured_sizes(H100, engine)
    assert sizes[:5] == (1, 2, 4, 8, 16)
    assert (sizes[-1], len(sizes)) == (512, 51)
    assert [padded_tokens(n, sizes) for n in (3, 9, 249, 257, 512, 513)] == [4, 16, 256, 272, 512, 513]
    law = law_of()
    assert law.breakdown(decode(9, 100))["mlp"] == law.breakdown(decode(16, 100))["mlp"]
    assert law.breakdown(decode(9, 100))["lm_head"] < law.breakdown(decode(16, 100))["lm_head"]


@pytest.mark.parametrize(
    ("version", "gpu", "seqs", "largest"),
    [
        ("0.26", "b200", 1024, 512),
        ("0.33", "b200", 1024, 1024),
        ("0.33", "h100-sxm", 1024, 512),
        ("0.26", "b200", 100, 200),
    ],
)
def test_the_largest_captured_size(version, gpu, seqs, largest):
    engine = EngineConfig(version=version, max_num_seqs=seqs)
    assert captured_sizes(load_gpu(gpu), resolve_engine(engine, LLAMA, load_gpu(gpu)))[-1] == largest


def test_eager_steps_take_at_least_their_launches():
    graph, eager = law_of(load_model("gpt-2")), law_of(load_model("gpt-2"), enforce_eager=True)
    assert eager.gpu_s(decode(1, 10)) == pytest.approx(12 * 11 * 6.5e-6)
    assert graph.gpu_s(decode(1, 10)) < eager.gpu_s(decode(1, 10))
    long = StepShape(0, (0,), ((8000, 0),), 1)
    assert graph.gpu_s(long) == eager.gpu_s(long)
    assert captured_sizes(H100, resolve_engine(EngineConfig(enforce_eager=True), LLAMA, H100)) == ()


def test_a_mixed_step_costs_its_parts_and_not_their_blend():
    law = law_of()
    mixed = StepShape(32, (32_000,), ((2000, 4000),), 33)
    parts = law.breakdown(mixed)
    assert parts["decode_attention"] == law.breakdown(decode(32, 1000))["decode_attention"]
    alone = StepShape(0, (0,), ((2000, 4000),), 1)
    assert parts["prefill_attention"] == law.breakdown(alone)["prefill_attention"]
    assert law.gpu_s(mixed) < law.gpu_s(alone) + law.gpu_s(decode(32, 1000))
    assert law.gpu_s(mixed) > law.gpu_s(alone)


def test_an_unfinished_prompt_samples_nothing():
    law = law_of()
    assert "lm_head" not in law.breakdown(StepShape(0, (0,), ((2048, 0),), 0))


def test_tensor_parallelism_divides_work_and_adds_sums():
    model = load_model("llama-3.1-70b")
    one, eight = (
        law_of(model).breakdown(decode(64, 1000)),
        law_of(model, tensor_parallel_size=8).breakdown(decode(64, 1000)),
    )
    assert "all_reduce" not in one
    assert eight["all_reduce"] == pytest.approx((2 * 80 + 1) * AllReduce(H100, 8).seconds(64 * 8192 * 2))
    assert 5 < one["mlp"] / eight["mlp"] < 8


def test_kv_heads_and_latents_are_replicated():
    falcon = load_model("llama-3.1-70b")
    assert [shard(falcon, degree).attention.num_kv_heads for degree in (1, 2, 8, 16)] == [8, 4, 1, 1]
    deepseek = load_model("deepseek-v3")
    assert shard(deepseek, 8).attention.kv_elements == shard(deepseek, 1).attention.kv_elements == 576


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-8b",
        "falcon-40b",
        "gemma-3-27b",
        "gpt-oss-120b",
        "deepseek-v3",
        "deepseek-v2-lite",
        "opt-13b",
    ],
)
@pytest.mark.parametrize("degree", [1, 2])
def test_the_products_of_a_shard_are_the_models_matrices(name, degree):
    """Counted apart from the shapes: parameters of the model file, split as vLLM splits them."""
    model = load_model(name)
    part, totals = shard(model, degree), model.layer_totals
    linear = sum(line.num_layers * line.n * line.k for line in (*part.linears, *part.prefill_linears))
    if part.experts:
        per_expert = part.hidden_size * (part.experts.up + part.experts.width)
        linear += part.experts.num_layers * part.experts.num_experts * per_expert
    split = totals.attention + totals.dense_mlp + totals.routed_experts + totals.shared_experts
    whole = model.num_layers * model.replicated_attention_parameters
    assert linear == (split - whole) / degree + whole + totals.router
    absorbed = sum(line.num_layers * line.n * line.k for line in part.decode_linears)
    assert absorbed == sum(line.num_layers * line.n * line.k for line in part.prefill_linears)


def test_windows_are_the_models_distinct_ones():
    assert law_of().windows == (None,)
    assert law_of(load_model("mistral-7b-v0.1")).windows == (4096,)
    assert set(law_of(load_model("gpt-oss-20b")).windows) == {128, None}


def test_the_linear_law_counts_what_schedulers_count():
    config = LinearStepTime(law="linear", base_s=8e-3, per_token_s=2e-5, per_context_token_s=2e-8)
    engine = resolve_engine(EngineConfig(step_time=config), LLAMA, H100)
    law = build_step_time(LLAMA, H100, engine)
    assert law.windows == (None,)
    # Decodes that attend to 10, 20 and 30 tokens, and 100 new tokens behind 400: 103 scheduled, 560 attended.
    shape = StepShape(3, (60,), ((100, 400),), 4)
    assert law.step_s(shape) == pytest.approx(8e-3 + 103 * 2e-5 + 560 * 2e-8, rel=1e-12)
    run = law.decode_steps(3, (60,), (3,))
    assert math.isclose(run.first_s + 1000 * run.growth_s, law.step_s(StepShape(3, (3060,), (), 3)))
    assert run.num_steps > 10**12


def test_build_refuses_what_the_gpu_cannot_do():
    peaks = {kind: peak for kind, peak in H100.peak_flops_per_s.items() if kind != "int8"}
    without = H100.model_copy(update={"peak_flops_per_s": peaks})
    engine = resolve_engine(EngineConfig(quantization="int8"), LLAMA, without)
    with pytest.raises(ConfigError, match="no int8 matrix products"):
        build_step_time(LLAMA, without, engine)
    linear = engine.model_copy(update={"step_time": LinearStepTime(law="linear", base_s=0.01)})
    assert build_step_time(LLAMA, without, linear).step_s(decode(1, 1)) == 0.01


def test_fp8_weights_are_expanded_on_a_gpu_without_fp8():
    """vLLM serves them on Ampere through Marlin: half the bytes, products in bf16."""
    a100 = load_gpu("a100-80gb-sxm")
    plain, fp8, block = (
        build_step_time(LLAMA, a100, resolve_engine(EngineConfig(quantization=name), LLAMA, a100))
        for name in ("none", "fp8", "fp8_block")
    )
    one, many = decode(1, 100), StepShape(0, (0,), ((2048, 0),), 1)
    assert 0.5 < fp8.step_s(one) / plain.step_s(one) < 0.65
    assert fp8.step_s(many) == pytest.approx(plain.step_s(many), rel=0.05)
    assert fp8.step_s(one) <= block.step_s(one) < 1.01 * fp8.step_s(one)


def test_a_chunk_makes_the_decodes_beside_it_slower_on_ampere():
    a100 = load_gpu("a100-80gb-sxm")
    law = build_step_time(LLAMA, a100, resolve_engine(EngineConfig(), LLAMA, a100))
    alone = law.breakdown(decode(64, 2000))["decode_attention"]
    mixed = law.breakdown(StepShape(64, (128_000,), ((512, 0),), 64))["decode_attention"]
    hopper = build_step_time(LLAMA, H100, resolve_engine(EngineConfig(), LLAMA, H100))
    assert mixed > 2 * alone
    assert hopper.breakdown(StepShape(64, (128_000,), ((512, 0),), 64))["decode_attention"] == pytest.approx(
        hopper.breakdown(decode(64, 2000))["decode_attention"]
    )
