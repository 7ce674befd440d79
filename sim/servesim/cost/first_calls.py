"""What an engine does once for every count of rows: preparing its matrix products for them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

from servesim.config.profiles import FirstCallEfficiency, GpuProfile, ModelProfile
from servesim.config.scenario import EngineConfig
from servesim.cost.blocking import code, is_turned
from servesim.cost.layers import Linear, shard
from servesim.cost.step_time import AffineSteps, StepShape, StepTime

__all__ = ["FirstCallLaw", "after", "first_call_s"]

# oneDNN keeps its 1,024 most recent primitives (ONEDNN_PRIMITIVE_CACHE_CAPACITY); one serves all layers.
_KEPT_PRIMITIVES = 1024
# Matrices up to this size run on kernels that need no preparation (vLLM 0.32, layers/utils.py).
_LEAST_BYTES = 1024 * 1024
_WEIGHT_BYTES = 2


class FirstCallLaw:
    """A law of step time for an engine that generates code for every new count of rows: oneDNN, on a CPU.

    The first step with prompt chunks or drafts that has so many tokens takes longer, once per kind of
    matrix.  The law remembers the counts that it was asked about, the most recent ones, so it stands for one
    process of an engine; ``after`` gives one with another memory.  Steps that only decode are free: their
    counts are few.
    """

    def __init__(self, law: StepTime, model: ModelProfile, gpu: GpuProfile, engine: EngineConfig) -> None:
        assert gpu.efficiency.first_call is not None
        self._law, self._first_call = law, gpu.efficiency.first_call
        linears = shard(model, engine.tensor_parallel_size, engine.enable_expert_parallel).linears
        self._kinds = sorted({(one.n, one.k) for one in linears if _is_prepared(one)})
        self._most = _KEPT_PRIMITIVES // max(1, len(self._kinds))
        self._met: dict[int, None] = {}

    def after(self, row_counts: Iterable[int]) -> FirstCallLaw:
        """The law of a process that has run steps of so many tokens, in this order."""
        law = copy(self)
        law._met = {}
        for rows in row_counts:
            law._meets(rows)
        return law

    @property
    def when_prepared(self) -> StepTime:
        """The law of the same steps when nothing is left to prepare."""
        return self._law

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the model's layers (None: full attention)."""
        return self._law.windows

    def step_s(self, shape: StepShape) -> float:
        """Seconds of one step, and of preparing for its tokens if they are so many for the first time."""
        seconds = self._law.step_s(shape)
        if (shape.chunks or shape.num_draft_tokens) and self._meets(shape.num_tokens):
            rows = shape.num_tokens
            seconds += sum(first_call_s(self._first_call, rows, n, k) for n, k in self._kinds)
        return seconds

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        """Durations of a run of pure decode steps, for which nothing is prepared."""
        return self._law.decode_steps(num_decodes, context_tokens, context_growth)

    def _meets(self, rows: int) -> bool:
        """Remember a count; whether it is new."""
        is_new = rows not in self._met
        self._met.pop(rows, None)
        self._met[rows] = None
        if len(self._met) > self._most:
            del self._met[next(iter(self._met))]
        return is_new


def after(law: StepTime, row_counts: Iterable[int]) -> StepTime:
    """``law`` as of a process that has run steps of so many tokens; itself where that makes no difference."""
    return law.after(row_counts) if isinstance(law, FirstCallLaw) else law


def first_call_s(law: FirstCallEfficiency, rows: int, n: int, k: int) -> float:
    """What the first product of ``rows`` x k with a kind of matrix of n columns takes more.

    The time goes with the code that is generated, which is unrolled: cost.blocking.code.
    """
    length, inner = code(rows, n, k)
    share = law.turned if is_turned(rows, n, k) else 1.0
    return law.launch_s + share * length * (law.per_row_s + law.per_row_k_s * inner)


def _is_prepared(linear: Linear) -> bool:
    return linear.n * linear.k * _WEIGHT_BYTES > _LEAST_BYTES
