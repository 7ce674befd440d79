"""What breaks first: the limit that requests waited for, or the resource that would shorten the step most."""

from __future__ import annotations

from collections.abc import Callable

from servesim.analysis.inputs import faster_compute, faster_links, faster_memory
from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_trials import Trial
from servesim.config.gpu_profile import GpuProfile
from servesim.config.scenario import OperatorStepTime
from servesim.cost.step_time import StepTime, build_step_time

__all__ = ["first_constraint"]

_WAITED = 0.01  # share of the requests from which on a P99 is made by who waits
_RESOURCES: dict[str, Callable[[GpuProfile, float], GpuProfile]] = {
    "compute": faster_compute,
    "bandwidth": faster_memory,
    "link": faster_links,
}


def first_constraint(analytic: Analytic, breach: Trial) -> str:
    """The latency that broke and why, as "TPOT: bandwidth"."""
    return f"{breach.worst.upper()}: {_cause(analytic, breach)}"


def _cause(analytic: Analytic, breach: Trial) -> str:
    if max(breach.seats, breach.memory) > _WAITED:
        return "KV blocks" if breach.memory >= breach.seats else "slots"
    prepared, engine = analytic.prepared, analytic.prepared.engine
    if not isinstance(engine.step_time, OperatorStepTime):
        return "step time"

    def law(gpu: GpuProfile) -> StepTime:
        return build_step_time(prepared.model, gpu, engine, prepared.draft)

    shape = breach.shape._replace(
        decode_context_tokens=breach.shape.decode_context_tokens * len(analytic.law.windows)
    )
    laws = {name: law(faster(prepared.gpu, 2.0)) for name, faster in _RESOURCES.items()}
    free = engine.model_copy(update={"step_time": engine.step_time.model_copy(update={"host": "none"})})
    laws["host"] = build_step_time(prepared.model, prepared.gpu, free, prepared.draft)
    return min(laws, key=lambda name: laws[name].step_s(shape))
