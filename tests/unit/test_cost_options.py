"""What an engine's options change in the law of a step: graphs, parallelism, formats, kernels, sampling."""

from __future__ import annotations

import numpy as np
import pytest

from servesim.config.defaults import resolve_engine
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.operators import OperatorLaw
from servesim.cost.step_parts import DECODE_PARTS, DecodeParts
from servesim.cost.step_time import StepShape

LLAMA = load_model("llama-3.1-8b")
MIXTURE = load_model("qwen3-30b-a3b")
H100 = load_gpu("h100-sxm")


def law_of(model=LLAMA, gpu=H100, **engine):
    config = EngineConfig(step_time=OperatorStepTime(host="none"), **engine)
    return OperatorLaw(model, gpu, resolve_engine(config, model, gpu))


def decode(batch, context):
    return StepShape(batch, (batch * context,), (), batch)


def mixed(decodes, tokens):
    return StepShape(decodes, (100 * decodes,), ((tokens, 0),), decodes + 1)


def test_graph_modes_differ_in_what_is_launched():
    """GPT-2 is so small that a step takes as long as its launches: 12 layers of 11, or of 3 pieces."""
    eager_s, pieces_s = 12 * 11 * 6.5e-6, 12 * 3 * 6.5e-6
    steps = {
        mode: [
            law_of(load_model("gpt-2"), cudagraph_mode=mode).gpu_s(shape)
            for shape in (decode(1, 10), mixed(1, 9))
        ]
        for mode in ("none", "piecewise", "full", "full_decode_only", "full_and_piecewise")
    }
    assert steps["none"] == pytest.approx([eager_s, eager_s])
    full_s = steps["full"]
    assert steps["piecewise"] == [max(pieces_s, seconds) for seconds in full_s]
    assert steps["full_and_piecewise"] == [full_s[0], max(pieces_s, full_s[1])]
    assert steps["full_decode_only"] == [full_s[0], pytest.approx(eager_s)]
    assert full_s[0] < eager_s
    # Whatever the mode, a step above the largest size is launched kernel by kernel.
    assert {law_of(load_model("gpt-2"), cudagraph_mode=m).gpu_s(decode(1000, 10)) for m in steps} == {
        law_of(load_model("gpt-2"), cudagraph_mode="none").gpu_s(decode(1000, 10))
    }


def test_pipeline_stages_run_in_turn_and_hand_over():
    model = load_model("llama-3.1-70b")
    two = law_of(model, tensor_parallel_size=4)
    four = law_of(model, tensor_parallel_size=4, pipeline_parallel_size=4)
    shape = decode(64, 1000)
    sent_s = 3 * (10e-6 + 2 * 64 * 8192 * 2 / 64e9)  # 16 GPUs: the next board is reached over PCIe
    assert four.breakdown(shape)["pipeline_send"] == pytest.approx(sent_s)
    assert four.gpu_s(shape) == pytest.approx(two.gpu_s(shape) + sent_s)


def test_a_pipeline_stage_holds_its_layers_and_one_vocabulary_table():
    llama = load_model("llama-3.1-70b")
    stage = llama.pipeline_stage(4)
    assert stage.num_layers == 20
    assert stage.num_parameters == llama.layer_totals.total / 4 + 128_256 * 8192 + 8192
    deepseek = load_model("deepseek-v3").pipeline_stage(2)
    assert (deepseek.num_layers, deepseek.num_dense_layers) == (31, 1)
    assert len(load_model("gemma-3-27b").pipeline_stage(2).windows) == 31
    assert llama.pipeline_stage(1) is llama


@pytest.mark.parametrize("num_tokens", [8, 64, 2048])
def test_expert_parallelism_waits_for_the_busiest_gpu(num_tokens):
    """Whole experts read no slices, but their GPU with most to do is the one that counts."""
    model = load_model("qwen3-30b-a3b")
    shape = StepShape(num_tokens, (num_tokens * 100,), (), num_tokens)
    split, whole = (
        law_of(model, tensor_parallel_size=4, enable_expert_parallel=ep).breakdown(shape)["experts"]
        for ep in (False, True)
    )
    single = law_of(model).breakdown(shape)["experts"]
    assert whole > single / 4
    if num_tokens <= 8:  # later all experts are read, and slices cost the activations of every routed row
        assert whole > split


def test_popular_experts_make_small_steps_faster():
    skewed = EngineConfig(step_time=OperatorStepTime(host="none", expert_popularity_skew=1.0))
    model = load_model("qwen3-30b-a3b")
    law = OperatorLaw(model, H100, resolve_engine(skewed, model, H100))
    for batch in (8, 16, 64):
        shape = decode(batch, 500)
        assert law.breakdown(shape)["experts"] < 0.85 * law_of(model).breakdown(shape)["experts"]


def test_sorting_logits_takes_longer_than_the_largest_one():
    sorting = EngineConfig(step_time=OperatorStepTime(host="none", sampler="top_k_top_p"))
    law = OperatorLaw(LLAMA, H100, resolve_engine(sorting, LLAMA, H100))
    greedy, sorted_ = (each.breakdown(decode(256, 100))["sampling"] for each in (law_of(), law))
    read_s = 256 * 128_256 * 4 / (3.35e12 * H100.efficiency.gemm["bf16"].memory)
    assert greedy == pytest.approx(0.1e-3 + 2 * read_s)
    assert sorted_ == pytest.approx(0.3e-3 + 15 * read_s)


def test_attention_kernels_are_chosen_in_the_scenario():
    def law(**options):
        engine = EngineConfig(step_time=OperatorStepTime(host="none", **options))
        return OperatorLaw(LLAMA, H100, resolve_engine(engine, LLAMA, H100))

    long = StepShape(0, (0,), ((131_072, 0),), 0)
    flash, standard = law().gpu_s(long), law(attention_kernel="standard").gpu_s(long)
    assert standard > 2 * flash
    assert law(shared_memory_per_sm_kib=57).gpu_s(long) > 1.05 * flash
    assert law(shared_memory_per_sm_kib=228).gpu_s(long) == flash
    assert law(shared_memory_per_sm_kib=57).gpu_s(decode(64, 8000)) == law().gpu_s(decode(64, 8000))


@pytest.mark.parametrize("quantization", ["fp8", "fp8_block", "int8", "w4a16", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", ["h100-sxm", "b200"])
def test_quantised_weights_make_small_batches_faster(name, quantization):
    gpu = load_gpu(name)
    plain, quantised = law_of(gpu=gpu), law_of(gpu=gpu, quantization=quantization)
    assert quantised.gpu_s(decode(1, 500)) < plain.gpu_s(decode(1, 500))
    # The LM head keeps its type, and so does attention.
    for name in ("lm_head", "decode_attention"):
        assert quantised.breakdown(decode(1, 500))[name] == plain.breakdown(decode(1, 500))[name]


def test_published_experts_keep_their_own_format():
    gpt, shape = load_model("gpt-oss-20b"), StepShape(64, (64 * 128, 64 * 500), (), 64)
    plain, fp8 = (law_of(gpt, quantization=q).breakdown(shape) for q in ("none", "fp8"))
    assert plain["experts"] == fp8["experts"]
    assert plain["qkv"] != fp8["qkv"]


@pytest.mark.parametrize(("batch", "at_least", "at_most"), [(64, 0.85, 1.0), (16384, 0.0, 0.25)])
def test_reading_experts_is_weights_and_computing_with_them_is_not(batch, at_least, at_most):
    """64 tokens reach nearly all experts with 4 rows each; 16,384 with 1,024, which compute for long."""
    engine = resolve_engine(EngineConfig(step_time=OperatorStepTime(host="none")), MIXTURE, H100)
    law = OperatorLaw(MIXTURE, H100, engine)
    parts = law.breakdown(decode(batch, 0))
    experts_s = parts["experts"] + parts["expert_rows"]
    assert at_least < parts["experts"] / experts_s < at_most
    assert sum(parts.values()) == pytest.approx(law.gpu_s(decode(batch, 0)), rel=1e-12)
    step_s = np.array([law.step_s(decode(batch, 0))])
    split = DecodeParts(law, engine).split([batch], [0], np.zeros(1), step_s)[0]
    assert split.sum() == pytest.approx(step_s[0], rel=1e-9)
    of = dict(zip(DECODE_PARTS, split.tolist(), strict=True))
    assert of["compute"] > parts["expert_rows"]
    assert parts["experts"] < of["weights"] < parts["experts"] + 0.5 * experts_s
