"""What the lengths alone say about a KV pool: slots per running request, without any simulation.

A request is seen running in proportion to the steps that it runs, so a mean over the running requests is a
mean over all requests weighted with their output length O. With P prompt tokens it holds P + j slots in its
step j = 0 .. O - 1, on average P + (O - 1) / 2, and will still fill (O - 1) / 2 more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.run import Run
from servesim.config.scenario import EngineConfig

__all__ = ["PerRequest", "empty_in_last_block", "per_request", "requested_slots", "wasted_slots"]

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PerRequest:
    """Mean slots of a running request by class, and what follows for the pool."""

    tokens: float
    reserved: float
    internal: float
    round_up: float
    pool_slots: int
    requests_that_fit: float
    """Of this mean size; whole reservations where all have one size."""

    @property
    def allocated(self) -> float:
        """Slots that a running request takes."""
        return self.tokens + self.reserved + self.internal + self.round_up

    def shares(self, running: float) -> dict[str, float]:
        """Shares of the pool by class with ``running`` requests at a time."""
        named = {name: getattr(self, name) for name in ("tokens", "reserved", "internal", "round_up")}
        return {name: slots * running / self.pool_slots for name, slots in named.items()}


def per_request(run: Run, pool_slots: int) -> PerRequest | None:
    """The means over the requests that were served; None when there are none.

    Nothing is shared, and no prompt is computed in pieces.
    """
    prompt, output, final = _lengths(run)
    if not len(output) or not pool_slots:
        return None
    engine = run.scenario.engine
    weights = output / output.sum()
    tokens = float(weights @ (prompt + (output - 1) / 2))
    to_come = float(weights @ ((output - 1) / 2))
    if engine.allocator == "paged":
        block = engine.block_size
        in_last_block = np.minimum((final - 1) % block + 1, output)
        internal = float((-final % block) @ in_last_block / output.sum())
        empty = empty_in_last_block(prompt, output, block)
        return PerRequest(
            tokens, max(empty - internal, 0.0), internal, 0.0, pool_slots, pool_slots / (tokens + empty)
        )
    asked = requested_slots(engine, prompt, output)
    chunk = chunk_slots(engine, asked)
    fit = pool_slots / float(weights @ chunk)
    if (chunk == chunk[0]).all():
        fit = float(pool_slots // int(chunk[0]))
    return PerRequest(
        tokens, to_come, float(weights @ (asked - final)), float(weights @ (chunk - asked)), pool_slots, fit
    )


def empty_in_last_block(prompt: Integers, output: Integers, block_size: int) -> float:
    """Mean empty slots of a running request's last block; (B - 1) / 2 where remainders are uniform.

    Sum over n = P .. P + O - 1 of -n mod B, from the sum over n = 1 .. m: m // B whole cycles of
    B (B - 1) / 2 each, and r B - r (r + 1) / 2 for the r = m mod B slots after them.
    """

    def up_to(m: Integers) -> Integers:
        cycles, rest = np.divmod(m, block_size)
        whole = cycles * (block_size * (block_size - 1) // 2)
        return np.asarray(whole + rest * block_size - rest * (rest + 1) // 2)

    return float((up_to(prompt + output - 1) - up_to(prompt - 1)).sum() / output.sum())


def requested_slots(engine: EngineConfig, prompt: Integers, output: Integers) -> Integers:
    """Slots that requests of these lengths ask for, before any rounding by the allocator."""
    assert engine.max_model_len is not None
    final = prompt + output - 1
    if engine.allocator == "paged":
        return final + -final % engine.block_size
    return np.full(len(prompt), engine.max_model_len, dtype=np.int64)


def chunk_slots(engine: EngineConfig, asked: Integers) -> Integers:
    """Slots that the allocator takes for what was asked."""
    return asked


def wasted_slots(run: Run) -> tuple[Integers, Integers]:
    """Output tokens of every served request, and the slots it was given and never filled."""
    prompt, output, final = _lengths(run)
    return output, requested_slots(run.scenario.engine, prompt, output) - final


def _lengths(run: Run) -> tuple[Integers, Integers, Integers]:
    """Prompt, output and final slots of the requests that ended; the last token's KV is never written."""
    column = {name: np.array(values) for name, values in run.log.requests.columns.items()}
    done = (column["status"] <= 1) & (column["generated_tokens"] > 0)
    prompt = column["prompt_tokens"][done].astype(np.int64)
    output = column["generated_tokens"][done].astype(np.int64)
    return prompt, output, prompt + output - 1
