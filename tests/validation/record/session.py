"""Experiments on one engine: grids of prompts and decodes, the capacity, online traces at shares of it."""

from __future__ import annotations

import os
import time

from record.arrivals import Ask, burst, prompt_ids, same
from record.engine import Clock, Engine, Operators
from record.folder import Folder, Served
from record.machine import machine_speed
from record.plans import Grid, Job, Online

__all__ = ["RunClock", "Session"]


_TIMES = 4  # that a prompt is watched; the first time something is prepared for its length


class RunClock:
    """Seconds of a run: of the wall, or of this thread's CPU time, which others do not stretch.

    While the engine is idle a CPU clock stands still, so ``skip`` moves it to the next arrival.
    """

    def __init__(self, read: Clock, waits: bool) -> None:
        self._read, self._waits = read, waits
        self._zero_s = read()

    @classmethod
    def named(cls, kind: str) -> RunClock:
        """The clock that a plan asks for: ``wall`` or ``cpu``."""
        return cls(time.perf_counter, True) if kind == "wall" else cls(time.thread_time, False)

    def __call__(self) -> float:
        """Seconds since the run began."""
        return self._read() - self._zero_s

    def reset(self) -> None:
        """A run begins."""
        self._zero_s = self._read()

    def skip(self, seconds: float) -> None:
        """Nothing happens for so long."""
        if self._waits:
            time.sleep(min(seconds, 0.05))
        else:
            self._zero_s -= seconds + 1e-9  # no rounding may leave it just before the arrival


class Session:
    """One engine, one folder: runs are made and written one after another, until the time is over."""

    def __init__(self, engine: Engine, clock: RunClock, folder: Folder, job: Job, deadline: float) -> None:
        self._engine, self._clock, self._folder = engine, clock, folder
        self._job, self._deadline = job, deadline
        self._process = 1 + max((int(run["process"]) for run in folder.runs()), default=0)

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._deadline - time.time()

    def warm_up(self) -> None:
        """Whatever an engine does only once: compile, allocate, fill caches.

        Counts of tokens that no plan has, since what is prepared for a count is prepared once.
        """
        for size in (61, 13):
            self._serve("warm-up", same(4, size, 8))
        settings = self._job.settings
        most = min(settings.get("max_num_batched_tokens", 2048), settings["max_model_len"])
        self._serve("warm-up", same(1, most - 5, 2))

    def grid(self, grid: Grid, repeat: int) -> None:
        """One prompt at a time, long ones in chunks; then batches that decode together."""
        for length in grid.lengths:
            self._run(f"prefill-{length}", "grid", "", repeat, same(1, length, 2))
        for context, batch in self._decodes(grid):
            self._run(f"decode-{batch}x{context}", "grid", "", repeat, same(batch, context, grid.steps))

    def _decodes(self, grid: Grid) -> list[tuple[int, int]]:
        most = self._job.settings.get("max_num_seqs", 1024)
        pairs = [(context, batch) for context in grid.contexts for batch in grid.batches if batch <= most]
        return [(context, batch) for context, batch in pairs if context * batch <= grid.most_tokens]

    def operators(self, grid: Grid) -> None:
        """Times of single operators in the same grid, where the engine can tell them (on a CPU)."""
        watched = self._engine.watch_operators()
        if watched is None:
            return
        plain_s = self._least_step_s()
        with watched:
            watched.correct(self._least_step_s(), plain_s)
            for times_before in range(_TIMES):  # of all in turn: a server's steps differ from the last ones
                watched.is_new = times_before == 0
                for length in grid.operator_lengths:
                    watched.batch = (1, length, False)
                    self._serve("operators", same(1, length, 1))
                    self._engine.forget()
            watched.is_new = False
            for context, batch in self._decodes(grid):
                self._watch_decodes(watched, batch, context, grid.steps)
        self._folder.add_kernels(watched.rows())

    def _least_step_s(self) -> float:
        """Of a request that decodes alone."""
        self._serve("alone", same(1, 29, 60))
        self._engine.forget()
        return min(row.end_s - row.start_s for row in self._engine.steps[1:])

    def _watch_decodes(self, watched: Operators, batch: int, context: int, steps: int) -> None:
        """Only steps in which all of a batch decode are looked at."""
        asks = same(batch, context, steps)
        for index, ask in enumerate(asks):
            self._engine.add(index, prompt_ids("operators", index, ask, self._job.vocab), ask.output_tokens)
        while self._engine.busy():
            row = self._engine.steps[-1] if self._engine.steps else None
            decoding = row is not None and len(row.scheduled) == batch and row.running == batch
            started = row is not None and all(before >= context for _, _, before in row.scheduled)
            watched.on = bool(decoding and started)
            watched.batch = (batch, context + steps // 2, True)
            self._engine.step()
            row = self._engine.steps[-1]
            watched.stepped(row.end_s - row.start_s)
        watched.on = True
        self._engine.forget()

    def online(self, online: Online, repeat: int) -> None:
        """A burst, which shows the capacity, then Poisson arrivals at shares of it."""
        group = online.capacity_of
        if not group:
            group = f"{self._job.prefix}{online.tag}-burst"
            self._run(f"{online.tag}-burst", "burst", "", repeat, burst(online.asks(1.0, seed=online.seed)))
        bursts = [run for run in self._folder.runs() if run["group"] == group]
        if not bursts:
            return
        # Of the first burst, so that all repeats get the same arrivals.
        capacity = int(bursts[0]["requests"]) / float(bursts[0]["duration_s"])
        for share in online.shares:
            load, rate = f"{round(100 * share)} %", capacity * share
            asks = online.asks(rate, seed=online.seed + round(100 * share))
            self._run(f"{online.tag}-{round(100 * share)}", load, f"{rate:.4g}", repeat, asks)

    def _run(self, group: str, load: str, rate: str, repeat: int, asks: list[Ask]) -> None:
        """Serve and write one run, unless it is there already or the time is over."""
        if self._job.prefix:
            group, load = f"{self._job.prefix}{group}", f"{load}, {self._job.prefix.rstrip('-')}"
        name = f"{group}-r{repeat + 1}"
        if self.left_s() < 5 or any(run["run"] == name for run in self._folder.runs()):
            return
        self._engine.forget()
        before, speed = os.getloadavg()[0], machine_speed()
        begin_s = time.perf_counter()
        served = self._serve(group, asks)
        wall_s = time.perf_counter() - begin_s
        if served is None:
            return
        steps, self._engine.steps = self._engine.steps, []
        first = steps[0].call
        for row in steps:
            row.call -= first
        ends = [one.finish_s for one in served]
        run: dict[str, object] = {
            "run": name, "group": group, "load": load, "rate": rate, "repeat": repeat + 1,
            "process": self._process,
            "set": ";".join(self._job.overrides), "part": "fit" if load == "grid" else "judge",
            "requests": len(served), "steps": len(steps),
            "duration_s": f"{max(ends) - asks[0].arrival_s:.4f}",
            "wall_s": f"{wall_s:.2f}", "load_average": f"{max(before, os.getloadavg()[0]):.2f}",
            "copy_ms": f"{speed.copy_ms:.2f}", "hash_ms": f"{speed.hash_ms:.3f}",
        }  # fmt: skip
        self._folder.add_run(run, served, steps)

    def _serve(self, name: str, asks: list[Ask]) -> list[Served] | None:
        """Hand every request in when it is due and step until all are done; None when the time ran out."""
        engine, clock, count = self._engine, self._clock, len(asks)
        prompts = [prompt_ids(name, index, ask, self._job.vocab) for index, ask in enumerate(asks)]
        first_s, finish_s, step_of = [-1.0] * count, [-1.0] * count, [0] * count
        engine.steps, done, sent = [], 0, 0
        clock.reset()
        calls = engine.calls
        while done < count:
            if self.left_s() < 0:
                return None
            now_s = clock()
            while sent < count and asks[sent].arrival_s <= now_s:
                step_of[sent] = engine.calls - calls
                engine.add(sent, prompts[sent], asks[sent].output_tokens)
                sent += 1
            if not engine.busy():
                clock.skip(max(0.0, asks[sent].arrival_s - clock()))
                continue
            for output in engine.step():
                end_s = clock()
                if output.tokens and first_s[output.request] < 0:
                    first_s[output.request] = end_s
                if output.finished:
                    finish_s[output.request], done = end_s, done + 1
        while engine.busy():
            engine.step()
        preempted = [request for row in engine.steps for request in row.preempted]
        return [
            Served(ask, step_of[index], first_s[index], finish_s[index], preempted.count(index))
            for index, ask in enumerate(asks)
        ]
