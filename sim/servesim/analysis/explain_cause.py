"""What is the matter with a tail: where its time goes, checked against what relaxing that saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.attribution import PARTS

__all__ = ["cause_of"]

Floats = NDArray[np.float64]

_CAUSE_OF_PART = {
    "slot": "slots",
    "kv_blocks": "kv",
    "preemption": "kv",
    "transfer": "kv",
    "host": "host",
    "communication": "link",
    "weights": "bandwidth",
    "kv_reads": "bandwidth",
    "compute": "compute",
    "interference": "interference",
    "batch": "batch",
    "failure": "failure",
    "joining": "prompts",
    "tokens": "prompts",
    "prefill": "prompts",
}
_PROMPT_CAUSES = ("cold_cache", "oversize", "compute", "bandwidth", "link", "host")  # of long steps
_TELLS = 0.1  # share of the figure that relaxing a cause must save
_BURSTY = 1.5  # coefficient of variation of the gaps; 1 is Poisson
_TAIL_IS_DIFFERENT = 1.5  # the tail's mean over the typical request's
_MOST = 0.5  # share that relaxing the traffic or the fleet must save to be the matter
_AS_GOOD = 0.8  # of what relaxing the engine's own shortage saves


def cause_of(
    metric: str,
    static: bool,
    apart: bool,
    tail: Floats,
    typical: Floats,
    saved: Mapping[str, float],
    variation: float,
) -> str:
    """A key of CAUSE_WORDS in report/explain_words.py.

    ``tail`` and ``typical``: seconds by PARTS of the slow and of the usual requests; ``saved``: the share of
    the figure that relaxing a cause saves; ``variation``: of the gaps between arrivals; ``static``:
    batches; ``apart``: prefill and decode on different replicas.
    """
    excess = np.maximum(tail - typical, 0.0) if tail.sum() > _TAIL_IS_DIFFERENT * typical.sum() else tail
    weights: dict[str, float] = {}
    for name, seconds in zip(PARTS, excess.tolist(), strict=True):
        cause = _cause_of_part(name, metric, static, apart)
        weights[cause] = weights.get(cause, 0.0) + seconds
    ordered = sorted(weights, key=lambda cause: -weights[cause])
    from_outside = _from_outside(ordered[0], saved, variation)
    if from_outside is not None:
        return from_outside
    for cause in ordered:
        if weights[cause] < _TELLS * excess.sum():
            break
        if cause == "batch":
            return cause
        if cause == "prompts":
            own = excess[PARTS.index("prefill")] > _MOST * excess.sum()  # the slow ones are the long ones
            told = [one for one in _PROMPT_CAUSES if not (own and one == "oversize")]
            return _most_saving(told, saved)
        if cause == "interference" and saved.get("oversize", 0.0) >= 0.5 * saved.get(cause, 0.0) > 0:
            return "oversize"
        if saved.get(cause, 0.0) >= _TELLS:
            return cause
    return _most_saving(saved, saved)


def _most_saving(causes: Iterable[str], saved: Mapping[str, float]) -> str:
    """That whose relaxation saves most; compute, which there always is, where none was tried that saves."""
    return max((one for one in causes if saved.get(one, 0.0) > 0), key=saved.__getitem__, default="compute")


def _from_outside(largest: str, saved: Mapping[str, float], variation: float) -> str | None:
    """What happens to an engine that would do otherwise: its share of the traffic, and when that comes."""
    for event in ("failure", "autoscaler"):
        if saved.get(event, 0.0) >= _MOST:
            return event
    own = max(saved.get(one, 0.0) for one in (_PROMPT_CAUSES if largest == "prompts" else (largest,)))
    if saved.get("router", 0.0) >= max(_MOST, _AS_GOOD * own):
        return "router"
    if variation > _BURSTY and saved.get("bursty", 0.0) >= _MOST and largest in ("prompts", "kv", "slots"):
        return "bursty"
    return None


def _cause_of_part(part: str, metric: str, static: bool, apart: bool) -> str:
    if part == "transfer" and apart:
        return "kv_link"
    if part == "interference" and metric == "ttft":
        return "prompts"
    if part == "slot" and static:
        return "batch"  # a running batch that nobody may join
    return _CAUSE_OF_PART[part]
