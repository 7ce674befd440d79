"""What an engine on a CPU prepares once for every count of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from servesim import api
from servesim.analysis.attribution import PARTS
from servesim.analysis.kernel_table import read_kernel_table
from servesim.analysis.simulation import prepare, run_prepared
from servesim.analysis.stepwise import read_stepwise
from servesim.config.load import load_scenario
from servesim.config.profiles import FirstCallEfficiency, load_gpu
from servesim.cost.experts import Routing
from servesim.cost.first_calls import FirstCallLaw, after, first_call_s
from servesim.cost.host import HOST_PROFILES
from servesim.cost.step_time import StepShape, build_step_time
from servesim.report.fitted import block_text

REPORTS = Path(__file__).parents[2] / "reports" / "validation"
RUN = REPORTS / "runs" / "cpu-core-vllm-0.32-llama-c87m"


def law_of(folder=RUN, *overrides):
    prepared = prepare(load_scenario(folder / "scenario.yaml", overrides))
    return build_step_time(prepared.model, prepared.gpu, prepared.engine), prepared


def prompt(tokens):
    return StepShape(0, (0,), ((tokens, 0),), 1)


def test_only_the_first_step_of_so_many_tokens_takes_longer():
    law, prepared = law_of()
    first_s, second_s, other_s = law.step_s(prompt(300)), law.step_s(prompt(300)), law.step_s(prompt(301))
    # qkv, output, gate and up, down: one preparation each, for all layers.
    kinds = ((1280, 768), (768, 768), (4096, 768), (768, 2048))
    efficiency = prepared.gpu.efficiency.first_call
    extra_s = sum(first_call_s(efficiency, 300, n, k) for n, k in kinds)
    assert first_s - second_s == pytest.approx(extra_s)
    assert 0.005 < extra_s < 0.025
    assert other_s - second_s > extra_s


def test_decodes_prepare_nothing_and_runs_of_them_are_what_single_steps_are():
    law, _ = law_of()
    first_s, growth_s, _ = law.decode_steps(4, (400,), (4,))
    assert law.step_s(StepShape(4, (400,), (), 4)) == pytest.approx(first_s)
    assert law.step_s(StepShape(4, (404,), (), 4)) == pytest.approx(first_s + growth_s)


def test_verifying_drafts_prepares_products_too():
    settings = ("method=ngram", "num_speculative_tokens=4", "acceptance.law=iid", "acceptance.rate=0")
    law, _ = law_of(RUN, *(f"engine.speculative.{each}" for each in settings))
    verified = StepShape(4, (400,), (), 4 + 12, 12)
    first_s = law.step_s(verified)
    assert first_s > law.step_s(verified) + 0.001
    assert law.step_s(StepShape(4, (400,), (), 4 + 13, 13)) > law.step_s(verified) + 0.001


def test_a_process_forgets_the_counts_that_it_has_not_seen_for_long():
    law, _ = law_of()
    first_s = law.step_s(prompt(10))
    for tokens in range(11, 11 + 255):  # 1,024 primitives, four kinds of matrix
        law.step_s(prompt(tokens))
    assert law.step_s(prompt(10)) < first_s
    for tokens in range(400, 400 + 256):
        law.step_s(prompt(tokens))
    assert law.step_s(prompt(10)) == pytest.approx(first_s)


def test_a_law_can_begin_where_a_process_stands_and_others_stay_as_they_are():
    law, _ = law_of()
    met = after(law, [300])
    assert met.step_s(prompt(300)) < law.step_s(prompt(300))
    gpu = prepare(load_scenario("poisson-chat"))
    plain = build_step_time(gpu.model, gpu.gpu, gpu.engine)
    assert not isinstance(plain, FirstCallLaw)
    assert after(plain, [300]) is plain


def test_small_matrices_need_no_preparation():
    """Those of the mixture of experts have at most 1 MiB: 1024 x 512 and 512 x 512 of two bytes."""
    law, _ = law_of(REPORTS / "runs" / "cpu-core-vllm-0.32-moe-c130m")
    assert law.step_s(prompt(300)) == pytest.approx(law.step_s(prompt(300)))


def test_a_simulation_begins_with_nothing_prepared_and_repeats_itself():
    _, prepared = law_of(RUN, "workload.num_requests=20")
    one, two = run_prepared(prepared), run_prepared(prepared)
    ends = [run.log.requests.columns["finish_s"] for run in (one, two)]
    assert list(ends[0]) == list(ends[1])


def test_every_replica_of_a_fleet_prepares_its_own_products():
    settings = ("hardware.replicas=2", "workload.num_requests=2", "workload.arrivals={process: burst}")
    _, prepared = law_of(RUN, *settings)
    first_s = run_prepared(prepared).log.requests.columns["first_token_s"]
    assert first_s[0] == pytest.approx(first_s[1])


def test_recorded_runs_know_what_their_process_had_met():
    runs = {run.name: run for run in read_stepwise(RUN)}
    assert runs["prefill-16-r1"].rows_met == ()
    assert runs["prefill-24-r1"].rows_met == (16, 1)
    assert set(runs["chat-burst-r1"].rows_met) > {16, 32, 512}
    assert set(runs["chat-30-r1"].rows_met) > set(runs["chat-burst-r1"].rows_met)
    assert runs["prefill-16-r2"].rows_met == ()


def test_first_calls_are_fitted_where_a_table_has_them(tmp_path):
    pytest.importorskip("scipy")
    rows = pd.read_csv(REPORTS / "hardware" / "cpu-core-kernels.csv")
    first = rows["op"] == "gemm_first"
    made = FirstCallEfficiency(launch_s=400e-6, per_row_s=2e-6, per_row_k_s=6e-9, turned=0.7)
    sizes = rows.loc[first, ["m", "n", "k"]].to_numpy(int).tolist()
    rows.loc[first, "latency_us"] = [1e6 * first_call_s(made, m, n, k) for m, n, k in sizes]
    rows.to_csv(tmp_path / "mine.csv", index=False)
    core = REPORTS / "hardware" / "cpu-core.yaml"
    _, fit = api.fit(core, tmp_path / "mine.csv")
    found = fit.efficiency.first_call
    assert found.launch_us == pytest.approx(400, rel=0.02)
    assert found.per_row_us == pytest.approx(2, rel=0.05)
    assert found.per_row_k_ns == pytest.approx(6, rel=0.02)
    assert found.turned == pytest.approx(0.7, rel=0.02)
    assert "first_call: {launch_us: 4" in block_text(fit) or "first_call: {launch_us: 39" in block_text(fit)
    rows[~first].to_csv(tmp_path / "none.csv", index=False)
    _, fit = api.fit(core, tmp_path / "none.csv")
    assert fit.efficiency.first_call is None
    assert "first_call" not in block_text(fit)


def test_uniform_routing_of_a_table_is_that_of_the_law():
    core = REPORTS / "hardware" / "cpu-core.yaml"
    rows = read_kernel_table(load_gpu(core), core.parent / "cpu-core-kernels.csv").rows("moe", "bf16")
    row = rows[(rows["num_experts"] == 24) & (rows["m"] == 9)].iloc[0]
    load = Routing(24, 3).load(9)
    assert (row["experts"], row["tile_rows"]) == (load.experts, load.tile_rows)


def test_norms_of_queries_and_keys_are_kernels_of_their_own_without_compilation():
    folder = REPORTS / "runs" / "cpu-core-vllm-0.32-moe-c130m"
    eager, prepared = law_of(folder)
    compiled, _ = law_of(folder, "engine.enforce_eager=false")
    law = prepared.gpu.efficiency.elementwise["head_norm"]
    expected_s = 2 * 6 * (law.launch_s + 2 * (8 + 4) * 64 * 100 / law.bytes_per_s)
    assert eager._law.gpu_s(prompt(100)) - compiled._law.gpu_s(prompt(100)) == pytest.approx(expected_s)


def test_preparing_is_the_hosts_when_latencies_are_explained():
    """Explaining asks the law what might have been; it must not take that for steps that were."""
    wanted = ["workload.num_requests=20", "workload.prompt_tokens.tokens=300"]
    of = api.explain(RUN / "scenario.yaml", overrides=wanted, jobs=1).explanation.attribution
    assert of.parts_of("ttft").sum(axis=1) == pytest.approx(of.ttft_s, rel=1e-9)
    preparing_s = law_of()[0].step_s(prompt(300)) - prepared_s(prompt(300))
    host_s = of.before[:, PARTS.index("host")]
    assert host_s[0] > preparing_s > 0.005  # the first request of all is alone and meets a new count


def prepared_s(shape):
    """Seconds of a step of which nothing is new."""
    law, _ = law_of()
    return law.when_prepared.step_s(shape)


def test_the_host_of_the_cpu_build_is_what_was_measured_beside_model_and_sampler():
    rows = pd.read_csv(REPORTS / "hardware" / "cpu-core-kernels.csv")
    host = rows[rows["op"] == "host"]
    per_sequence_us, fixed_us = np.polyfit(host["batch"], host["latency_us"], 1)
    profile = HOST_PROFILES["v1-cpu"]
    assert 1e6 * profile.fixed_s == pytest.approx(fixed_us, rel=0.01)
    assert 1e6 * profile.per_sequence_s == pytest.approx(per_sequence_us, rel=0.01)
