"""Defaults of the engine: vLLM's API server column, and what it refuses."""

from __future__ import annotations

import pytest

from servesim.config.defaults import resolve_engine, tensor_parallel_problems
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig
from servesim.errors import ConfigError

LLAMA = load_model("llama-3.1-8b")


@pytest.mark.parametrize(
    ("gpu", "version", "tokens", "seqs"),
    [
        ("h100-sxm", "0.26", 8192, 1024),
        ("h200-sxm", "0.33", 8192, 1024),
        ("a100-80gb-sxm", "0.26", 2048, 256),
        ("a100-80gb-pcie", "0.33", 2048, 256),
        ("l40s", "0.26", 2048, 256),
        ("b200", "0.26", 8192, 1024),
        ("b200", "0.33", 16384, 1024),
        ("rtx-pro-6000", "0.22", 8192, 1024),
    ],
)
def test_limits_follow_memory_except_on_a100(gpu, version, tokens, seqs):
    resolved = resolve_engine(EngineConfig(version=version), LLAMA, load_gpu(gpu))
    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (tokens, seqs)
    assert resolved.max_model_len == 131_072


def test_what_is_given_is_kept():
    given = EngineConfig(max_model_len=1000, max_num_seqs=7, max_num_batched_tokens=99, block_size=32)
    assert resolve_engine(given, LLAMA, load_gpu("h100-sxm")) == given


def test_defaults_follow_from_each_other():
    h100 = load_gpu("h100-sxm")
    unchunked = resolve_engine(EngineConfig(enable_chunked_prefill=False), LLAMA, h100)
    assert unchunked.max_num_batched_tokens == 131_072
    assert resolve_engine(EngineConfig(max_num_batched_tokens=512), LLAMA, h100).max_num_seqs == 512
    few = resolve_engine(EngineConfig(max_num_seqs=2, max_model_len=1000), LLAMA, h100)
    assert few.max_num_batched_tokens == 2000


def test_every_refusal_is_listed_at_once():
    engine = EngineConfig(
        max_model_len=200_000,
        max_num_seqs=100,
        max_num_batched_tokens=50,
        enable_chunked_prefill=False,
        tensor_parallel_size=3,
    )
    with pytest.raises(ConfigError) as caught:
        resolve_engine(engine, LLAMA, load_gpu("h100-sxm"))
    assert str(caught.value).splitlines() == [
        "engine.max_model_len  llama-3.1-8b was trained for 131072 positions  got 200000"
        "  -> set engine.max_model_len to at most 131072",
        "engine.max_num_batched_tokens  a step must have room for one token of every sequence"
        "  got 50 with max_num_seqs 100  -> raise it to at least 100, or set engine.max_num_seqs: 50",
        "engine.max_num_batched_tokens  without chunked prefill a step must have room for the longest prompt"
        "  got 50 with max_model_len 200000  -> raise it to at least 200000, lower engine.max_model_len, "
        "or set engine.enable_chunked_prefill: true",
        "engine.tensor_parallel_size  llama-3.1-8b has 32 attention heads and 8 KV heads and an MLP width of "
        "14336, which this many GPUs cannot share evenly  got 3  -> choose one of 1, 2, 4, 8, 16",
    ]


def test_heads_decide_how_many_gpus_can_share_a_model():
    qwen, deepseek = load_model("qwen2.5-7b"), load_model("deepseek-v3")
    assert [d for d in (1, 2, 4, 8, 16) if not tensor_parallel_problems(qwen, d)] == [1, 2, 4]
    # A latent is replicated, and 8 KV heads are repeated on 16 GPUs: neither stands in the way.
    assert not tensor_parallel_problems(deepseek, 16)
    assert not tensor_parallel_problems(load_model("llama-3.1-70b"), 16)


def test_parallelism_that_the_model_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.enable_expert_parallel  llama-3\.1-8b has no experts"):
        resolve_engine(EngineConfig(enable_expert_parallel=True), LLAMA, load_gpu("h100-sxm"))
    with pytest.raises(ConfigError, match=r"got 33  -> set engine\.pipeline_parallel_size to at most 32"):
        resolve_engine(EngineConfig(pipeline_parallel_size=33), LLAMA, load_gpu("h100-sxm"))
    mixtral = load_model("mixtral-8x7b")
    engine = EngineConfig(enable_expert_parallel=True, tensor_parallel_size=2, pipeline_parallel_size=4)
    assert resolve_engine(engine, mixtral, load_gpu("h100-sxm")).enable_expert_parallel


@pytest.mark.parametrize(
    ("version", "utilization", "async_scheduling", "limits"),
    [
        ("0.6", 0.9, False, (2048, 256)),
        ("0.11", 0.9, False, (8192, 1024)),
        ("0.19", 0.9, True, (8192, 1024)),
        ("0.22", 0.92, True, (8192, 1024)),
    ],
)
def test_older_versions_have_their_own_defaults(version, utilization, async_scheduling, limits):
    model, gpu = load_model("llama-3.1-8b"), load_gpu("h100-sxm")
    engine = resolve_engine(EngineConfig(version=version, max_model_len=8192), model, gpu)
    assert engine.gpu_memory_utilization == utilization
    assert engine.async_scheduling is async_scheduling
    assert (engine.max_num_batched_tokens, engine.max_num_seqs) == limits
    said = EngineConfig(version=version, gpu_memory_utilization=0.5, async_scheduling=True)
    engine = resolve_engine(said, model, gpu)
    assert (engine.gpu_memory_utilization, engine.async_scheduling) == (0.5, True)
