"""Small engines under small workloads, drawn to be difficult: full pools, shared prefixes, every setting.

All times are multiples of a power of two, so that sums are exact, arrivals fall on step boundaries now and
then, and two ways to the same schedule must agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from hypothesis import strategies as st

from servesim.cost.step_time import AffineSteps, StepShape
from servesim.engine.events import Log
from servesim.engine.loop import simulate
from servesim.engine.scheduler import Scheduler, SchedulerLimits
from servesim.engine.versions import RULES
from servesim.kv.address_space import Fit, build_address_space
from servesim.kv.base import KVCacheManager
from servesim.kv.contiguous import ContiguousKVCache, Reservation
from servesim.kv.paged import PagedKVCache
from servesim.workload.request import Request, Segment

__all__ = ["TICK_S", "Case", "ScriptedWorkload", "WindowLaw", "cases", "run_case"]

TICK_S = 2.0**-10
MOST_STEPS = 10_000


@dataclass(frozen=True)
class WindowLaw:
    """base + tokens + context under every window, in ticks; asked again after ``num_steps`` steps."""

    windows: tuple[int | None, ...] = (None,)
    base: int = 16
    per_token: int = 1
    per_context: tuple[int, ...] = (1,)
    num_steps: int = 1 << 40

    def step_s(self, shape: StepShape) -> float:
        ticks = self.base + self.per_token * shape.num_tokens
        for window, cost, context in zip(
            self.windows, self.per_context, shape.decode_context_tokens, strict=True
        ):
            ticks += cost * context
            ticks += cost * sum(
                min(new + old, window) if window is not None else new + old for new, old in shape.chunks
            )
        return ticks * TICK_S

    def decode_steps(
        self, num_decodes: int, context_tokens: tuple[int, ...], context_growth: tuple[int, ...]
    ) -> AffineSteps:
        growth = sum(c * g for c, g in zip(self.per_context, context_growth, strict=True)) * TICK_S
        first = self.step_s(StepShape(num_decodes, context_tokens, (), num_decodes))
        return AffineSteps(first, growth, self.num_steps)


@dataclass
class ScriptedWorkload:
    """Requests written down; ``chains[i]`` is the request released, some time after, when request i ends."""

    starts: list[Request]
    chains: dict[int, Request] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return len(self.starts) + len(self.chains)

    def arrivals(self) -> Iterator[Request]:
        return iter(sorted(self.starts, key=lambda request: request.arrival_s))

    def follow_up(self, finished: Request, now_s: float) -> Request | None:
        after = self.chains.get(finished.index)
        return None if after is None else after._replace(arrival_s=now_s + after.arrival_s)


@dataclass(frozen=True)
class Case:
    """One engine and what it is asked to serve."""

    limits: SchedulerLimits
    version: str
    allocator: tuple[Reservation, Fit] | None  # None: paged
    num_blocks: int  # with the null block
    block_size: int
    caching: bool
    pipeline_depth: int
    law: WindowLaw
    starts: tuple[Request, ...]
    chains: tuple[tuple[int, Request], ...] = ()

    def kv(self, *, track_ids: bool = False) -> KVCacheManager[Any]:
        if self.allocator is not None:
            slots = (self.num_blocks - 1) * self.block_size
            return ContiguousKVCache(slots, self.limits.max_model_len, *self.allocator)
        return PagedKVCache(
            self.num_blocks,
            self.block_size,
            enable_prefix_caching=self.caching,
            blank_blocks_first=RULES[self.version].blank_blocks_first,
            track_ids=track_ids,
        )

    def workload(self) -> ScriptedWorkload:
        return ScriptedWorkload(list(self.starts), dict(self.chains))


def run_case(case: Case, scheduler: Scheduler) -> Log:
    """Serve the case's requests to the end; fails when the engine goes in circles."""

    def stop() -> bool:
        assert scheduler.step < MOST_STEPS, "the engine makes no progress"
        return False

    return simulate(case.workload(), scheduler, case.law, pipeline_depth=case.pipeline_depth, stop=stop)


# ---- drawing cases -----------------------------------------------------------------------------

_lengths = st.integers(1, 16)
_names = st.sampled_from(["a", "b", "c", None])
_prompts = st.lists(st.tuples(_names, _lengths), min_size=1, max_size=2)


@st.composite
def _requests(draw: st.DrawFn, calm: bool) -> tuple[tuple[Request, ...], tuple[tuple[int, Request], ...]]:
    """Requests that share prefixes, and follow-ups that repeat the prompt and the output they follow.

    As in a real engine, nobody's prompt holds an output that is not there yet.
    """
    starts: list[Request] = []
    chains: list[tuple[int, Request]] = []
    ends: list[Request] = []  # requests that nothing follows yet
    named = not calm and draw(st.booleans())
    apart = draw(st.sampled_from([256, 2048] if calm else [0, 8, 64, 512]))
    now = 0
    for index in range(draw(st.integers(1, 10))):
        before = draw(st.sampled_from(ends)) if ends and draw(st.integers(0, 2)) == 0 else None
        prompt: tuple[Segment, ...] = ()
        if before is not None:
            ends.remove(before)
            if before.output_name is not None:
                repeated = draw(st.integers(1, before.output_tokens))
                prompt = (*before.prompt, Segment(before.output_name, repeated))
        elif starts and draw(st.booleans()):
            prompt = draw(st.sampled_from(starts)).prompt
        prompt += tuple(Segment(name, length) for name, length in draw(_prompts))
        delay = draw(st.integers(0, apart)) if apart else 0
        now += delay if before is None else 0
        request = Request(
            index,
            f"r{index}",
            (now if before is None else delay) * TICK_S,
            sum(segment.num_tokens for segment in prompt),
            draw(st.integers(1, 40)),
            prompt,
            ("out", index) if named else None,
            draw(st.integers(0, 2)),
        )
        ends.append(request)
        if before is None:
            starts.append(request)
        else:
            chains.append((before.index, request))
    return tuple(starts), tuple(chains)


def _apart(request: Request) -> Request:
    """Nobody arrives at the same moment: between equals vLLM's priority policy may preempt in circles."""
    return request._replace(arrival_s=request.arrival_s + request.index * 2.0**-30)


@st.composite
def _laws(draw: st.DrawFn, calm: bool) -> WindowLaw:
    windows = draw(
        st.sampled_from([(None,), (None, 64), (None, 7), (12,), (5, None, 30)][: 1 if calm else 5])
    )
    return WindowLaw(
        windows,
        base=draw(st.integers(1, 64)),
        per_token=draw(st.integers(0, 4)),
        per_context=tuple(draw(st.integers(0, 2)) for _ in windows),
        num_steps=draw(st.sampled_from([1 << 40, 1, 3])),
    )


def _reservation(draw: st.DrawFn, num_slots: int, max_model_len: int) -> tuple[Reservation, Fit]:
    """A policy, and a fit that can hold the longest reservation."""
    policy: Reservation = draw(st.sampled_from(get_args(Reservation)))
    fit: Fit = draw(st.sampled_from(get_args(Fit)))
    space = build_address_space(fit, num_slots)
    return policy, fit if space.granted(max_model_len) <= space.largest_hole else "first"


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Engines whose pool holds one longest request or little more; ``fixed`` pins settings by name.

    ``calm=True``: the pool holds several, requests come apart, and attention sees everything.
    """
    calm = fixed.pop("calm", False)

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    block_size = pick("block_size", st.sampled_from([1, 2, 3, 4, 8, 16]))
    paged = pick("paged", st.integers(0, 5).map(bool))
    room = 4 if calm else 1
    usable = room * draw(st.integers(max(2, 32 // block_size), max(8, 160 // block_size)))
    longest = usable // room * block_size
    max_model_len = draw(st.integers(longest // 2 + 1, longest))
    chunked = pick("enable_chunked_prefill", st.booleans())
    budget = draw(st.integers(4, 80))
    limits = SchedulerLimits(
        max_num_seqs=pick("max_num_seqs", st.integers(3 if calm else 1, 8)),
        max_num_batched_tokens=budget if chunked else max(budget, max_model_len),
        max_model_len=max_model_len,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=pick(
            "long_prefill_token_threshold", st.one_of(st.just(0), st.integers(1, 40 if calm else 20))
        ),
        priority_policy=pick("priority_policy", st.booleans()),
        watermark_blocks=pick("watermark_blocks", st.integers(0, 2)),
        scheduler_reserve_full_isl=pick("scheduler_reserve_full_isl", st.booleans()),
    )
    starts, chains = draw(_requests(calm))
    if limits.priority_policy:
        starts = tuple(_apart(request) for request in starts)
        chains = tuple((index, _apart(request)) for index, request in chains)
    return Case(
        limits,
        pick("version", st.sampled_from(["0.22", "0.26", "0.33"])),
        None if paged else _reservation(draw, usable * block_size, max_model_len),
        usable + 1,
        block_size,
        pick("caching", st.integers(0, 2).map(bool)),
        pick("pipeline_depth", st.sampled_from([1, 2])),
        pick("law", _laws(calm)),
        starts,
        chains,
    )
