"""What breaks first: the limit that requests waited for, or the resource that would shorten the step most."""

from __future__ import annotations

from servesim.analysis.plan_bounds import Analytic
from servesim.analysis.plan_trials import Trial
from servesim.analysis.relaxations import relaxations_of
from servesim.analysis.simulation import Prepared
from servesim.cost.step_time import StepShape, StepTime, build_step_time

__all__ = ["first_constraint"]

_WAITED = 0.01  # share of the requests from which on a P99 is made by who waits
_RESOURCES = ("compute", "bandwidth", "link", "host")
"""Keys of relaxations that shorten steps."""


def first_constraint(analytic: Analytic, breach: Trial) -> str:
    """The latency that broke and why, as "TPOT: bandwidth"."""
    return f"{breach.worst.upper()}: {_cause(analytic, breach)}"


def _cause(analytic: Analytic, breach: Trial) -> str:
    if max(breach.seats, breach.memory) > _WAITED:
        return "KV blocks" if breach.memory >= breach.seats else "slots"
    prepared, shape = analytic.prepared, _windowed(breach.shape, analytic.law)
    shorter = {
        one.key: _law(one.relax(prepared)).step_s(shape)
        for one in relaxations_of(prepared)
        if one.key in _RESOURCES
    }
    return min(shorter, key=lambda key: shorter[key]) if shorter else "step time"


def _law(prepared: Prepared) -> StepTime:
    return build_step_time(prepared.model, prepared.gpu, prepared.engine, prepared.draft)


def _windowed(shape: StepShape, law: StepTime) -> StepShape:
    """The same step under every window of the model: so far its context is that of full attention."""
    [context] = shape.decode_context_tokens
    ends = (context if window is None else shape.num_decodes * window for window in law.windows)
    return shape._replace(decode_context_tokens=tuple(min(context, end) for end in ends))
