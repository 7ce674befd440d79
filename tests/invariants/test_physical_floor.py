"""No step is faster than physics allows, and none gets faster by doing more: every shipped model and GPU."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from servesim.config.defaults import resolve_engine, tensor_parallel_problems
from servesim.config.load import list_data
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.config.weight_formats import WEIGHT_FORMATS
from servesim.cost.floor import floor_s
from servesim.cost.operators import OperatorLaw
from servesim.cost.ops import Gemm
from servesim.cost.step_time import StepShape
from servesim.errors import ConfigError

MODELS = list_data("models")
GPUS = list_data("gpus")
model_of, gpu_of = cache(load_model), cache(load_gpu)


@cache
def engine_of(model, gpu, degree, quantization, kv_cache_dtype, graphs, stages=1, experts=None, options=()):
    config = EngineConfig(
        tensor_parallel_size=degree,
        pipeline_parallel_size=stages,
        enable_expert_parallel=experts == "whole",
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        cudagraph_mode=graphs,
        step_time=OperatorStepTime(host="none", **dict(options)),
    )
    return resolve_engine(config, model_of(model), gpu_of(gpu))


@cache
def law_of(model, gpu, *setting):
    return OperatorLaw(model_of(model), gpu_of(gpu), engine_of(model, gpu, *setting))


def step(model, contexts, chunks, num_sampled=None):
    """The shape of a step that decodes one sequence per entry of ``contexts`` and prefills ``chunks``."""
    windows = tuple(dict.fromkeys(model_of(model).windows))
    attended = tuple(sum(min(context, window or context) for context in contexts) for window in windows)
    sampled = len(contexts) + len(chunks) if num_sampled is None else num_sampled
    return StepShape(len(contexts), attended, tuple(chunks), sampled)


def weights_of(gpu):
    """Every value of engine.quantization that the GPU can multiply with."""
    allowed = []
    for name, weights in WEIGHT_FORMATS.items():
        try:
            Gemm(gpu_of(gpu), weights)
        except ConfigError:
            continue
        allowed.append(name)
    return allowed


OPTIONS = [
    (),
    (("sampler", "top_k_top_p"),),
    (("expert_popularity_skew", 1.0),),
    (("attention_kernel", "standard"),),
    (("shared_memory_per_sm_kib", 48),),
]


def settings_of(model, gpu):
    """Every combination of parallelism, types, graphs and kernels that the GPU and the model allow."""
    efficiency = gpu_of(gpu).efficiency
    degrees = [1, *(d for d in efficiency.all_reduce if not tensor_parallel_problems(model_of(model), d))]
    caches = ["auto", "fp8"] if "fp8" in efficiency.decode_attention else ["auto"]
    graphs = ["none", "piecewise", "full", "full_decode_only", "full_and_piecewise"]
    return st.tuples(
        st.sampled_from(degrees),
        st.sampled_from(weights_of(gpu)),
        st.sampled_from(caches),
        st.sampled_from(graphs),
        st.sampled_from([1, 2]),
        st.sampled_from(["split", "whole"] if model_of(model).moe else ["split"]),
        st.sampled_from(OPTIONS),
    )


CONTEXTS = st.builds(
    lambda batch, context, spread: [1 + (context + i * spread) % 40_000 for i in range(batch)],
    st.integers(0, 600),
    st.integers(0, 30_000),
    st.integers(0, 500),
)
CHUNKS = st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 60_000)), max_size=4)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", MODELS)
def test_fixed_shapes_on_every_model_and_gpu(model, gpu):
    shapes = [
        step(model, [100], []),
        step(model, [1000] * 64, []),
        step(model, [8000] * 256, []),
        step(model, [], [(1, 0)]),
        step(model, [], [(2048, 0)], 0),
        step(model, [], [(8192, 30_000)]),
        step(model, [2000] * 100, [(500, 0), (1000, 3000)]),
    ]
    caches = ["auto", "fp8"] if "fp8" in gpu_of(gpu).efficiency.decode_attention else ["auto"]
    for setting in product([1], weights_of(gpu), caches, ["full_and_piecewise"]):
        law, engine = law_of(model, gpu, *setting), engine_of(model, gpu, *setting)
        for shape in shapes:
            least_s = floor_s(model_of(model), gpu_of(gpu), engine, shape)
            assert 0 < least_s <= law.gpu_s(shape)


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(), model=st.sampled_from(MODELS), gpu=st.sampled_from(GPUS), contexts=CONTEXTS, chunks=CHUNKS
)
def test_no_step_beats_its_bytes_operations_and_links(data, model, gpu, contexts, chunks):
    assume(contexts or chunks)
    setting = data.draw(settings_of(model, gpu))
    sampled = data.draw(st.integers(len(contexts), len(contexts) + len(chunks)))
    shape = step(model, contexts, chunks, sampled)
    least_s = floor_s(model_of(model), gpu_of(gpu), engine_of(model, gpu, *setting), shape)
    assert 0 < least_s <= law_of(model, gpu, *setting).gpu_s(shape)


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(), model=st.sampled_from(MODELS), gpu=st.sampled_from(GPUS), contexts=CONTEXTS, chunks=CHUNKS
)
def test_no_step_gets_faster_by_doing_more(data, model, gpu, contexts, chunks):
    assume(contexts or chunks)
    law = law_of(model, gpu, *data.draw(settings_of(model, gpu)))
    before_s = law.gpu_s(step(model, contexts, chunks))
    more_contexts = [context + data.draw(st.integers(0, 5000)) for context in contexts[:5]] + contexts[5:]
    more_chunks = [
        (new + data.draw(st.integers(0, 500)), old + data.draw(st.integers(0, 500))) for new, old in chunks
    ]
    kind = data.draw(st.sampled_from(["context", "chunk", "sequence", "prompt"]))
    if kind == "sequence":
        more_contexts = [*contexts, data.draw(st.integers(1, 5000))]
    elif kind == "prompt":
        more_chunks = [*chunks, data.draw(st.tuples(st.integers(1, 5000), st.integers(0, 5000)))]
    after = step(
        model, more_contexts if kind != "chunk" else contexts, more_chunks if kind != "context" else chunks
    )
    assert law.gpu_s(after) >= before_s * (1 - 1e-12)


def test_the_floor_of_a_batch_1_decode_is_its_weights_and_cache():
    model, engine = (
        model_of("llama-3.1-8b"),
        engine_of("llama-3.1-8b", "h100-sxm", 1, "none", "auto", "full_and_piecewise"),
    )
    least_s = floor_s(model, gpu_of("h100-sxm"), engine, step("llama-3.1-8b", [1000], []))
    read_bytes = 2 * (model.num_parameters - model.embedding_parameters) + 1000 * 131_072
    assert least_s == pytest.approx(read_bytes / 3.35e12)


def test_the_floor_of_a_long_prefill_is_its_operations():
    engine = engine_of("llama-3.1-8b", "h100-sxm", 1, "none", "auto", "full_and_piecewise")
    least_s = floor_s(
        model_of("llama-3.1-8b"), gpu_of("h100-sxm"), engine, step("llama-3.1-8b", [], [(8192, 0)], 0)
    )
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    attention = 4 * 32 * 128 * 8192 * 8193 / 2
    assert least_s == pytest.approx(32 * (2 * 8192 * layer + attention) / 989.4e12)


def test_the_floor_of_parallel_gpus_counts_the_link():
    setting = ("llama-3.1-8b", "l4", 2, "none", "auto", "full_and_piecewise")
    shape = step("llama-3.1-8b", [], [(4096, 0)], 0)
    link_s = 2 * 32 * 4096 * 4096 * 2 / gpu_of("l4").pcie_bandwidth_bytes_per_s
    assert floor_s(model_of("llama-3.1-8b"), gpu_of("l4"), engine_of(*setting), shape) >= link_s
