"""What breaks first in a step whose shape is given."""

from __future__ import annotations

from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_constraint import _windowed, first_constraint
from servesim.analysis.plan_setup import traffic_in
from servesim.analysis.plan_trials import Trial
from servesim.config.load import load_scenario
from servesim.cost.step_time import StepShape


def analytic(*changes: str) -> Analytic:
    loaded = load_scenario("poisson-chat", ["workload.num_requests=100", *changes])
    return Analytic(loaded, traffic_in(loaded), loaded.scenario.slo)


def cause(shape: StepShape, *changes: str) -> str:
    p99_s = {"ttft": 0.1, "tpot": 0.1, "e2e": 1.0}
    return first_constraint(analytic(*changes), Trial(p99_s, 1.1, "tpot", True, 2000, 0.0, 0.0, shape))


def test_host_time_that_was_calibrated_is_host_time() -> None:
    few = StepShape(2, (2000,), (), 2)
    assert cause(few) == "TPOT: bandwidth"
    assert cause(few, "engine.step_time.exposed_host_s=0.05") == "TPOT: host"


def test_links_are_faster_in_latency_too() -> None:
    """Eight GPUs share a small model: their all-reduces of a few rows wait for launches, not for bytes."""
    shared = ["model=llama-3.2-1b", "engine.tensor_parallel_size=8", "engine.step_time.host=none"]
    assert cause(StepShape(2, (2000,), (), 2), *shared) == "TPOT: link"


def test_a_law_without_resources_has_none_that_breaks() -> None:
    linear = "engine.step_time={law: linear, base_s: 0.01}"
    assert cause(StepShape(2, (2000,), (), 2), linear) == "TPOT: step time"


def test_a_windowed_layer_attends_to_its_window() -> None:
    law = analytic("model=gemma-3-27b", "engine.max_model_len=20000").law
    assert set(law.windows) == {1024, None}
    found = dict(
        zip(law.windows, _windowed(StepShape(4, (40000,), (), 4), law).decode_context_tokens, strict=True)
    )
    assert found == {1024: 4096, None: 40000}
