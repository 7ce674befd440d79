"""From the replica that computed a prompt to the one that generates the output, over a link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import simpy

from servesim.engine.disaggregation import DecodeScheduler, PrefillScheduler
from servesim.engine.events import FleetLog, Log
from servesim.engine.loop import Engine, Process
from servesim.engine.router import Members, Route
from servesim.engine.scheduler import Scheduler
from servesim.workload.request import Request

__all__ = ["Handover", "KvPort"]


class KvPort(NamedTuple):
    """What a replica can send or receive over the link, and what it needs there."""

    bytes_per_s: float
    token_bytes: float
    """KV bytes of one token in all layers, on all its GPUs."""


class _End(NamedTuple):
    """One end of the link: a replica whose port serves one transfer at a time, in the order of requests."""

    scheduler: Scheduler
    engine: Engine
    port: simpy.Resource


class Handover:
    """Hands requests over whose prompts are computed; ``route`` names who of the ``members`` goes on.

    A KV cache takes ``latency_s`` on the link, and then the time of its bytes, as many as the replica that
    pulls it needs.
    """

    route: Route

    def __init__(
        self,
        env: simpy.Environment,
        latency_s: float,
        ports: Sequence[KvPort],
        log: FleetLog,
        members: Members,
    ) -> None:
        self._env, self._latency_s, self._ports, self._log = env, latency_s, ports, log
        self.members = members
        self._ends: dict[int, _End] = {}
        self._whole: dict[int, Request] = {}  # as the client sent it, by index
        self._prefilled: dict[int, tuple[int, float]] = {}  # by which replica, and when

    def add(self, number: int, scheduler: Scheduler, engine: Engine) -> None:
        """A replica begins to serve."""
        self._ends[number] = _End(scheduler, engine, simpy.Resource(self._env))
        if isinstance(scheduler, DecodeScheduler):
            self.members.join(number, scheduler)
            scheduler.on_pull = lambda request, tokens: self._start(number, request, tokens)

    def prompt_of(self, request: Request) -> Request:
        """What the prefilling replica is asked for: one token, of which nobody makes use."""
        self._whole[request.index] = request
        return request._replace(output_tokens=1, output_name=None)

    def ends_at(
        self, number: int, ended: Callable[[Request, float], None]
    ) -> Callable[[Request, float], None]:
        """What to do when a prefilling replica is done with a request; ``ended`` is for refused ones."""

        def prefilled(request: Request, now_s: float) -> None:
            whole = self._whole[request.index]
            if request.prompt_tokens >= self._ends[number].scheduler.limits.max_model_len:
                ended(whole, now_s)
            else:
                self._prefilled[request.index] = (number, now_s)
                self._env.process(self._go_on(whole, now_s))

        return prefilled

    def _go_on(self, request: Request, now_s: float) -> Process:
        """The router sends a request to a decoding replica."""
        yield self._env.timeout(max(0.0, now_s - self._env.now))
        target = self._ends[self.route(request)]
        source = self._ends[self._prefilled[request.index][0]].scheduler
        assert isinstance(source, PrefillScheduler) and isinstance(target.scheduler, DecodeScheduler)  # noqa: PT018
        if not source.has_kept(request.index):
            target.scheduler.computes.add(request.index)
        target.engine.submit(request)

    def _start(self, number: int, request: Request, num_tokens: int) -> None:
        self._env.process(self._pull(number, request, num_tokens, self._ends[number].engine.now_s))

    def _pull(self, number: int, request: Request, num_tokens: int, asked_s: float) -> Process:
        """Blocks are there: wait for both ports, then for the bytes."""
        env, index = self._env, request.index
        yield env.timeout(max(0.0, asked_s - env.now))
        source_number, prefilled_s = self._prefilled[index]
        source, target = self._ends[source_number], self._ends[number]
        bytes_per_s = min(self._ports[source_number].bytes_per_s, self._ports[number].bytes_per_s)
        bytes_s = num_tokens * self._ports[number].token_bytes / bytes_per_s
        with target.port.request() as inbound:
            yield inbound
            with source.port.request() as outbound:
                yield outbound
                begun_s = env.now
                yield env.timeout(self._latency_s + bytes_s)
        self._log.transfers.append(
            prefilled_s, asked_s, begun_s, env.now, index, source_number, number, num_tokens
        )
        assert isinstance(source.scheduler, PrefillScheduler)
        assert isinstance(target.scheduler, DecodeScheduler)
        source.scheduler.release(index)
        target.scheduler.received(index)
        source.engine.wake()
        target.engine.wake()

    def join(self, logs: Sequence[Log]) -> None:
        """Make one row of a request's two, in the log of the replica that decoded it.

        It keeps when the prompt was first scheduled and how much of it was found in the cache there. Tokens
        of prefilling replicas reach no client: they are no outputs.
        """
        first = [logs[n] for n, end in self._ends.items() if isinstance(end.scheduler, PrefillScheduler)]
        column = {
            name: np.concatenate([log.requests.columns[name] for log in first])
            for name in ("index", "scheduled_s", "cached_tokens", "preemptions")
        }
        order = np.argsort(column["index"])
        for log in logs:
            requests = log.requests
            if log in first:
                kept = ~np.isin(requests.columns["index"], list(self._prefilled))
                log.requests = requests.where(kept)
                whole = [self._whole[index].output_tokens for index in log.requests.columns["index"].tolist()]
                log.requests = log.requests.replaced(output_tokens=np.array(whole, dtype=np.int64))
                zeros = np.zeros(len(log.steps), dtype=np.int64)
                log.steps = log.steps.replaced(outputs=zeros, itl_samples=zeros)
                continue
            mine = order[np.searchsorted(column["index"][order], requests.columns["index"])]
            log.requests = requests.replaced(
                scheduled_s=column["scheduled_s"][mine],
                cached_tokens=column["cached_tokens"][mine],
                preemptions=requests.columns["preemptions"] + column["preemptions"][mine],
            )
