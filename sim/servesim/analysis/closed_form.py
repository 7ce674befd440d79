"""What the lengths alone say about a KV pool: slots per running request, without any simulation.

A request is seen running in proportion to the steps that it runs, so a mean over the running requests is a
mean over all requests weighted with their output length O. With P prompt tokens it holds P + j slots in its
step j = 0 .. O - 1, on average P + (O - 1) / 2, and will still fill (O - 1) / 2 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from servesim.analysis.run import Run
from servesim.kv.address_space import build_address_space
from servesim.kv.contiguous import Reservation, reserved_slots

__all__ = ["PerRequest", "Served", "empty_in_last_block", "per_request", "served_requests"]

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
    left_over: int = 0
    """Slots that reservations of one size cannot use: what is left beside as many as fit."""

    @property
    def allocated(self) -> float:
        """Slots that a running request takes."""
        return self.tokens + self.reserved + self.internal + self.round_up

    def shares(self, running: float) -> dict[str, float]:
        """Shares of the pool by class with ``running`` requests at a time."""
        named = {name: getattr(self, name) for name in ("tokens", "reserved", "internal", "round_up")}
        shares = {name: slots * running / self.pool_slots for name, slots in named.items()}
        return shares | ({"holes": self.left_over / self.pool_slots} if self.left_over else {})


def per_request(run: Run, pool_slots: int) -> PerRequest | None:
    """The means over the requests that were served. None when there are none.

    Nothing is shared, and no prompt is computed in pieces. None also for static batching (a request keeps its
    memory until the whole batch has ended), for several sequences per request, for evicted tokens and for
    paged layers with attention windows, which give up what lies behind theirs.
    """
    served, engine = served_requests(run), run.scenario.engine
    prompt, output = served.prompt, served.output
    windows = engine.allocator == "paged" and run.memory.kv_layout.group_windows != (None,)
    sampling = run.scenario.workload.sampling
    other_rules = engine.batching == "static" or engine.kv_eviction or sampling or windows
    if not len(output) or not pool_slots or other_rules:
        return None
    final = prompt + output - 1
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
    asked = served.requested
    space = build_address_space(engine.contiguous_fit, pool_slots)
    chunk = np.array([space.granted(slots) for slots in asked.tolist()])
    fit = pool_slots / float(weights @ chunk)
    left_over = 0
    if (chunk == chunk[0]).all():
        fit, left_over = float(pool_slots // int(chunk[0])), pool_slots % int(chunk[0])
    return PerRequest(
        tokens,
        to_come,
        float(weights @ (asked - final)),
        float(weights @ (chunk - asked)),
        pool_slots,
        fit,
        left_over,
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


@dataclass(frozen=True, slots=True)
class Served:
    """Lengths of the requests that ended; ``requested``: slots asked for, before any rounding."""

    prompt: Integers
    output: Integers
    requested: Integers

    @property
    def wasted(self) -> Integers:
        """Slots asked for and never filled; the KV of a request's last token is never written."""
        return self.requested - (self.prompt + self.output - 1)


def served_requests(run: Run) -> Served:
    """The requests of a run that ended, and what they asked of the allocator."""
    column, engine = run.log.requests.columns, run.scenario.engine
    done = (np.array(column["status"]) <= 1) & (np.array(column["generated_tokens"]) > 0)
    names = ("prompt_tokens", "generated_tokens", "output_tokens")
    prompt, output, asked = (np.array(column[name], dtype=np.int64)[done] for name in names)
    final = prompt + output - 1
    if engine.allocator == "paged":
        return Served(prompt, output, final + -final % engine.block_size)
    policy, most = cast(Reservation, engine.allocator.removeprefix("contiguous-")), engine.max_model_len
    assert most is not None
    slots = [reserved_slots(policy, p, o, most) for p, o in zip(prompt.tolist(), asked.tolist(), strict=True)]
    return Served(prompt, output, np.array(slots, dtype=np.int64))
