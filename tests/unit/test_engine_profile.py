"""Engine profiles: what they change, what wins over them, and whom they refuse."""

from __future__ import annotations

import pytest

from servesim.analysis.simulation import prepare
from servesim.config.defaults import resolve_engine
from servesim.config.load import load_scenario
from servesim.config.profiles import load_gpu, load_model
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.calibrated import with_bandwidth_factor
from servesim.cost.host import HOST_PROFILES
from servesim.cost.step_time import StepShape, build_step_time
from servesim.errors import ConfigError

LLAMA = load_model("llama-3.1-8b")
H100 = load_gpu("h100-sxm")
SHAPES = (
    StepShape(1, (500,), (), 1),
    StepShape(64, (64_000,), (), 64),
    StepShape(30, (30_000,), ((1024, 512), (900, 0)), 31),
)


def law(**step_time):
    engine = EngineConfig(step_time=OperatorStepTime(**step_time))
    return build_step_time(LLAMA, H100, resolve_engine(engine, LLAMA, H100))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_time_factor_scales_the_gpu_and_not_the_host(shape):
    sequences = shape.num_decodes + len(shape.chunks)
    gpu_s = law(host="none").step_s(shape)
    assert law(host="none", gpu_time_factor=1.3).step_s(shape) == pytest.approx(1.3 * gpu_s)
    host_s = HOST_PROFILES["v1-sync"].host_s(sequences)
    assert law(host="v1-sync", gpu_time_factor=1.3).step_s(shape) == pytest.approx(1.3 * gpu_s + host_s)
    breakdown = law(host="none", gpu_time_factor=1.3).breakdown(shape)
    assert sum(breakdown.values()) == pytest.approx(1.3 * gpu_s)


def test_less_bandwidth_slows_what_waits_for_memory():
    decode, prefill = SHAPES[0], StepShape(0, (0,), ((8192, 0),), 1)
    slow, plain = law(host="none", bandwidth_factor=0.5), law(host="none")
    assert slow.step_s(decode) > 1.7 * plain.step_s(decode)
    assert slow.step_s(prefill) < 1.25 * plain.step_s(prefill)


def test_no_factor_makes_memory_faster_than_its_peak():
    gpu = with_bandwidth_factor(H100, 5.0)
    assert gpu.efficiency.gemm["bf16"].memory == 1.0
    assert gpu.efficiency.decode_attention["bf16"].memory == 1.0
    assert with_bandwidth_factor(H100, 1.0) is H100


def test_the_exposed_host_time_is_the_residual_with_async_and_the_fixed_part_without():
    shape = SHAPES[1]
    gpu_s = law(host="none").step_s(shape)
    assert law(host="v1-async", exposed_host_s=0.004).step_s(shape) == pytest.approx(gpu_s + 0.004)
    per_sequence_s = HOST_PROFILES["v1-sync"].per_sequence_s * shape.num_decodes
    expected_s = gpu_s + 0.004 + per_sequence_s
    assert law(host="v1-sync", exposed_host_s=0.004).step_s(shape) == pytest.approx(expected_s)


@pytest.mark.parametrize("host", ["none", "v1-sync", "v1-async", "v0.6"])
@pytest.mark.parametrize("factor", [0.2, 1.4])
def test_a_run_of_steps_equals_its_steps_one_by_one(host, factor):
    one = law(host=host, gpu_time_factor=factor)
    run = one.decode_steps(16, (16_000,), (16,))
    for step in (0, 1, min(run.num_steps, 3000) - 1):
        shape = StepShape(16, (16_000 + 16 * step,), (), 16)
        assert run.first_s + step * run.growth_s == pytest.approx(one.step_s(shape), rel=1e-9)


SCENARIO = """
name: served
model: llama-3.1-8b
hardware: {{gpu: h100-sxm}}
engine: {{profile: mine.yaml, max_model_len: 4096{engine}}}
workload:
  arrivals: {{process: burst}}
  num_requests: 1
  prompt_tokens: {{law: fixed, tokens: 10}}
  output_tokens: {{law: fixed, tokens: 10}}
"""
PROFILE = """
name: mine
provenance: made up for this test
gpu_time_factor: 1.25
exposed_host_s: 0.002
num_gpu_blocks: 5000
"""


def prepared(folder, profile=PROFILE, engine=""):
    (folder / "mine.yaml").write_text(profile)
    (folder / "served.yaml").write_text(SCENARIO.format(engine=engine))
    return prepare(load_scenario(folder / "served.yaml"))


def test_a_scenario_takes_the_values_of_the_profile_it_names(tmp_path):
    found = prepared(tmp_path)
    assert found.engine.step_time.gpu_time_factor == 1.25
    assert found.engine.step_time.exposed_host_s == 0.002
    assert found.engine.step_time.bandwidth_factor == 1.0
    assert found.memory.num_gpu_blocks == 5000


def test_what_the_scenario_says_itself_wins(tmp_path):
    said = ", num_gpu_blocks_override: 777, step_time: {gpu_time_factor: 1.5}"
    found = prepared(tmp_path, engine=said)
    assert found.engine.step_time.gpu_time_factor == 1.5
    assert found.engine.step_time.exposed_host_s == 0.002
    assert found.memory.num_gpu_blocks == 777


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gpu: a100-80gb-sxm", "was fitted with gpu a100-80gb-sxm"),
        ("model: llama-2-7b", "was fitted with model llama-2-7b"),
        ("tensor_parallel_size: 2", "was fitted with tensor_parallel_size 2"),
    ],
)
def test_a_profile_of_another_deployment_is_refused_with_its_line(tmp_path, line, words):
    with pytest.raises(ConfigError, match=words) as caught:
        prepared(tmp_path, PROFILE + line + "\n")
    assert "mine.yaml:7:" in str(caught.value)
    assert "got a scenario with" in str(caught.value)


UNDER = """
fitted_under:
  async_scheduling: true
  gpu_memory_utilization: 0.92
  block_size: 16
  kv_cache_dtype: auto
"""


@pytest.mark.parametrize(
    ("engine", "words", "step"),
    [
        ("gpu_memory_utilization: 0.8", "was fitted with gpu_memory_utilization 0.92", "num_gpu_blocks"),
        ("kv_cache_dtype: fp8", "was fitted with kv_cache_dtype auto", "num_gpu_blocks"),
        ("block_size: 32", "was fitted with block_size 16", "num_gpu_blocks"),
        ("async_scheduling: false", "was fitted with async_scheduling True", "exposed_host_s"),
        ('version: "0.11", gpu_memory_utilization: 0.92', "async_scheduling True", "exposed_host_s"),
    ],
)
def test_scalars_are_refused_under_other_settings_than_they_were_fitted_under(tmp_path, engine, words, step):
    with pytest.raises(ConfigError, match=rf"mine.yaml:\d+:.*{words}.*got a scenario with.*remove {step}"):
        prepared(tmp_path, PROFILE + UNDER, engine=f", {engine}")


def test_settings_that_no_taken_scalar_hangs_on_may_differ(tmp_path):
    """The scenario has a pool and a host time of its own; the factor is of any pool."""
    assert prepared(tmp_path, PROFILE + UNDER).memory.num_gpu_blocks == 5000
    own = ", num_gpu_blocks_override: 777, step_time: {exposed_host_s: 0.001}"
    others = ", gpu_memory_utilization: 0.8, async_scheduling: false"
    assert prepared(tmp_path, PROFILE + UNDER, engine=own + others).engine.step_time.gpu_time_factor == 1.25
    factor = "name: x\nprovenance: this test\ngpu_time_factor: 1.25\n"
    assert prepared(tmp_path, factor + UNDER, engine=others).engine.step_time.gpu_time_factor == 1.25


def test_a_profile_of_the_same_deployment_is_taken(tmp_path):
    same = PROFILE + "gpu: h100-sxm\nmodel: llama-3.1-8b\ntensor_parallel_size: 1\n"
    assert prepared(tmp_path, same).engine.step_time.gpu_time_factor == 1.25


def test_mistakes_in_a_profile_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.yaml.*gpu_time_facto.*did you mean gpu_time_factor"):
        prepared(tmp_path, PROFILE.replace("gpu_time_factor", "gpu_time_facto"))
    with pytest.raises(ConfigError, match=r"mine.yaml.*block_sise.*did you mean block_size"):
        prepared(tmp_path, PROFILE + UNDER.replace("block_size", "block_sise"))
    with pytest.raises(ConfigError, match="an engine profile needs the law of operators"):
        prepared(tmp_path, engine=", step_time: {law: linear, base_s: 0.01}")
    (tmp_path / "served.yaml").write_text(SCENARIO.format(engine="").replace("mine.yaml", "other.yaml"))
    with pytest.raises(ConfigError, match=r"engine.profile.*no such engine profile"):
        load_scenario(tmp_path / "served.yaml")
