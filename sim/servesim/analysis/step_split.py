"""The rows of a step log, each split into what decodes take of it and what prompt chunks add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servesim.config.scenario import EngineConfig
from servesim.cost.first_calls import FirstCallLaw
from servesim.cost.step_parts import DecodeParts
from servesim.cost.step_time import StepShape, StepTime
from servesim.cost.swap import SwapLaw
from servesim.engine.residence import Residence

__all__ = ["SplitRows"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class SplitRows:
    """Rows of an engine's step log, by number; ``of`` are its columns.

    ``decode`` (by row and DECODE_PARTS), ``interference_s`` (what prompt chunks add) and ``transfer_s`` (KV
    blocks moved before the step) add up to ``duration_s``. The law must tell its breakdown, as every law
    here does.
    """

    def __init__(
        self, of: Mapping[str, NDArray[Any]], engine: EngineConfig, residence: Residence, law: StepTime
    ) -> None:
        steps = of["steps"]
        self.start_s: Floats = of["start_s"]
        ends_s = self.start_s + steps * (of["first_s"] + (steps - 1) * of["growth_s"] / 2)
        follows = np.append(self.start_s[1:], np.inf)
        touches = np.abs(follows - ends_s) <= 1e-9 * np.maximum(1.0, ends_s)
        self.duration_s: Floats = np.where(touches, follows, ends_s) - self.start_s
        self.failure: Integers = of["admission_failure"]
        self.preempts: NDArray[np.bool_] = of["preemptions"] > 0
        self.has_chunks: NDArray[np.bool_] = of["prefills"] > 0
        self.is_static = engine.batching == "static"
        self._ending = np.cumsum(steps)
        self._law = _own(law)
        self._shapes = residence.shapes
        self.transfer_s = np.zeros(len(steps))
        if isinstance(law, SwapLaw):
            self._copies(law)
        self._split(of, DecodeParts(self._law, engine))  # type: ignore[arg-type]

    def of_step(self, step: Integers) -> Integers:
        """The rows of steps; those that were never done have the number after the last."""
        return np.searchsorted(self._ending, step, side="right")

    def ending_at(self, time_s: Floats) -> Integers:
        """The last rows that began before."""
        return np.searchsorted(self.start_s, time_s, side="left") - 1

    def _split(self, of: Mapping[str, NDArray[Any]], parts: DecodeParts) -> None:
        steps, decodes = of["steps"], of["decodes"]
        drafts = np.zeros(len(steps), np.int64)
        alone_s = np.divide(
            self.duration_s - self.transfer_s, steps, out=np.zeros(len(steps)), where=steps > 0
        )
        for row, shape in self._shaped():
            drafts[row] = shape.num_draft_tokens
            if shape.chunks:
                alone_s[row] = min(alone_s[row], self._without_chunks_s(shape))
        context = of["context_tokens"] + decodes * (steps - 1) / 2
        self.decode: Floats = parts.split(decodes, drafts, context, alone_s) * steps[:, None]
        self.interference_s: Floats = self.duration_s - self.transfer_s - self.decode.sum(axis=1)

    def _shaped(self) -> Iterator[tuple[int, StepShape]]:
        """The rows whose shape is known."""
        steps = np.fromiter(self._shapes, np.int64, len(self._shapes))
        for row, shape in zip(self.of_step(steps).tolist(), self._shapes.values(), strict=True):
            if row < len(self.start_s):  # else planned, never done
                yield row, shape

    def _copies(self, law: SwapLaw) -> None:
        for row, shape in self._shaped():
            if any(shape.swapped_blocks):
                self.transfer_s[row] = min(law.copies_s(shape), self.duration_s[row])

    def _without_chunks_s(self, shape: StepShape) -> float:
        if not shape.num_decodes:
            return 0.0
        return self._law.step_s(
            shape._replace(chunks=(), num_sampled=shape.num_decodes + shape.num_draft_tokens)
        )

    def beside_chunks(self, chunks: Integers) -> tuple[Floats, Floats]:
        """For chunks as Residence has them: seconds that others' chunks add to its step, and host seconds."""
        law, rows = self._law, self.of_step(chunks[:, 1])
        durations_s = (self.duration_s - self.transfer_s)[rows].tolist()
        gpu_s = getattr(law, "gpu_s", law.step_s)
        busy_s: dict[int, float] = {}
        others_s, host_s = np.zeros(len(chunks)), np.zeros(len(chunks))
        for number, (_, step, tokens, before, ends) in enumerate(chunks.tolist()):
            shape, duration_s = self._shapes[step], durations_s[number]
            if step not in busy_s:
                busy_s[step] = gpu_s(shape)
            host_s[number] = max(0.0, duration_s - busy_s[step])
            own = () if tokens == 1 and before else ((tokens, before),)
            if len(shape.chunks) > len(own):
                sampled = shape.num_decodes + shape.num_draft_tokens + (ends if own else 0)
                alone_s = law.step_s(shape._replace(chunks=own, num_sampled=sampled))
                others_s[number] = min(max(0.0, duration_s - alone_s), duration_s - host_s[number])
        return others_s, host_s


def _own(law: StepTime) -> StepTime:
    """The law of what the model itself takes: asked what might have been, it must not remember."""
    law = law.without_copies if isinstance(law, SwapLaw) else law
    return law.when_prepared if isinstance(law, FirstCallLaw) else law
