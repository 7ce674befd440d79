"""Where the time of a decode step goes: weights, KV reads, compute, communication, host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from servesim.config.scenario import EngineConfig
from servesim.cost.host import host_profile
from servesim.cost.step_time import StepShape, StepTime

__all__ = ["DECODE_PARTS", "BrokenDown", "DecodeParts"]

DECODE_PARTS = ("weights", "kv_reads", "compute", "communication", "host")

Floats = NDArray[np.float64]
_COMMUNICATION = frozenset(("all_reduce", "pipeline_send", "logits_gather"))
_KV_READS = frozenset(("decode_attention", "context"))
_NO_PRODUCTS = frozenset(
    ("elementwise", "expert_rows", "sampling", "tokens", "verification_attention", "draft")
)
_MANY_TOKENS = 1 << 20  # of context, to read the law's slope


class BrokenDown(StepTime, Protocol):
    """A law of step time that tells its parts."""

    def breakdown(self, shape: StepShape) -> dict[str, float]: ...


class _Base(NamedTuple):
    """A step of so many decodes without context: seconds by part, and its bounds."""

    weights_s: float
    kv_reads_s: float
    compute_s: float
    communication_s: float
    slope_s: float
    least_s: float
    extra_s: float


class DecodeParts:
    """Splits the time of steps that only decode.

    Weights: what products take for a single token, and reading the experts that the batch reaches; compute:
    what the batch adds to the products, the experts' rows, and the kernels that are no products. Host:
    whatever the GPU waits for, launches included. KV reads are the rest of the GPU's time; where the host
    hides some of it, they follow from the context in full attention.
    """

    def __init__(self, law: BrokenDown, engine: EngineConfig) -> None:
        self._law, self._host = law, host_profile(engine)
        self._known: dict[tuple[int, int], _Base] = {}
        self._single = self._breakdown(1, 0, 0)

    def split(self, decodes: Any, drafts: Any, context_tokens: Floats, step_s: Floats) -> Floats:
        """Seconds by step and part of DECODE_PARTS; each step's add up to ``step_s``."""
        decodes, drafts = np.asarray(decodes, np.int64), np.asarray(drafts, np.int64)
        keys, which = np.unique(np.stack((decodes, drafts), axis=-1), axis=0, return_inverse=True)
        table = np.array([self._base(int(d), int(f)) for d, f in keys], np.float64).reshape(-1, 7)
        weights_s, fixed_s, compute_s, link_s, slope_s, least_s, extra_s = table[which.reshape(-1)].T
        base_s = weights_s + fixed_s + compute_s + link_s
        gpu_s = step_s - extra_s
        room_s = np.maximum(gpu_s - base_s, 0.0)
        bound_by_gpu = gpu_s > least_s * (1 + 1e-9)
        reads_s = np.where(bound_by_gpu, room_s, np.minimum(context_tokens * slope_s, room_s)) + fixed_s
        parts = np.stack((weights_s, reads_s, compute_s, link_s), axis=1)
        total_s = parts.sum(axis=1)
        # A step never takes less than its parts, but for rounding, and where several laws share a step.
        shrink = np.minimum(1.0, np.divide(step_s, total_s, out=np.ones_like(step_s), where=total_s > 0))
        parts *= shrink[:, None]
        return np.concatenate((parts, (step_s - parts.sum(axis=1))[:, None]), axis=1)

    def _base(self, decodes: int, drafts: int) -> _Base:
        key = decodes, drafts
        if key not in self._known:
            self._known[key] = self._computed(decodes, drafts)
        return self._known[key]

    def _computed(self, decodes: int, drafts: int) -> _Base:
        if not decodes:
            return _Base(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        parts = self._breakdown(decodes, drafts, 0)
        far = self._breakdown(decodes, drafts, _MANY_TOKENS)
        products = [
            name for name in parts if name not in _COMMUNICATION | _KV_READS | _NO_PRODUCTS | {"launch"}
        ]
        weights_s = sum(
            min(parts[name], self._single.get(name, 0.0)) for name in products if name != "experts"
        )
        weights_s += parts.get("experts", 0.0)
        reads_s, link_s = _sum(parts, _KV_READS), _sum(parts, _COMMUNICATION)
        busy_s = sum(parts.values()) - parts.get("launch", 0.0)
        least_s, extra_s = self._host.beside_gpu(decodes)
        floor_s = busy_s + parts["launch"] if parts.get("launch", 0.0) > 0 else 0.0
        return _Base(
            weights_s, reads_s, busy_s - weights_s - reads_s - link_s, link_s,
            (_sum(far, _KV_READS) - reads_s) / _MANY_TOKENS, max(least_s, floor_s), extra_s,
        )  # fmt: skip

    def _breakdown(self, decodes: int, drafts: int, context: int) -> dict[str, float]:
        contexts = tuple(context if number == 0 else 0 for number in range(len(self._law.windows)))
        return self._law.breakdown(StepShape(decodes, contexts, (), decodes + drafts, drafts))


def _sum(parts: dict[str, float], names: Iterable[str]) -> float:
    return sum(parts.get(name, 0.0) for name in names)
