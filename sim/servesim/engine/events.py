"""What happened: the log that a simulation leaves, column by column.

A row of ``StepLog`` is a run of identical steps, so that a thousand decode steps cost one row.
All times are simulated seconds since the first arrival's clock started.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from copy import copy
from struct import Struct
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from servesim.kv.base import Account, Usage

__all__ = ["FleetLog", "Log", "RequestLog", "Rows", "StepLog"]


_SEALED_BYTES = 1 << 18


class Rows:
    """Rows of numbers, packed one after another, read as named columns: floats first, then integers."""

    def __init__(self, floats: tuple[str, ...], integers: tuple[str, ...]) -> None:
        self._row = np.dtype([*((name, "<f8") for name in floats), *((name, "<i8") for name in integers)])
        self._bytes = bytearray()
        self._sealed: list[bytes] = []
        self.parts: tuple[int, ...] = ()
        """Rows of each replica, one after another, in the log of a fleet; empty for one engine."""
        self._ready()

    def _ready(self) -> None:
        kinds = "".join("d" if self._row[name].kind == "f" else "q" for name in self._row.names or ())
        # What append does, for who has many rows: write(pack(*row)).
        self.pack, self.write = Struct(f"<{kinds}").pack, self._bytes.extend
        self._columns: dict[str, NDArray[Any]] = {}

    def append(self, *row: float) -> None:
        """Add one row, in the order of the columns."""
        self.write(self.pack(*row))

    def seal(self) -> None:
        """Put the rows so far away if they are many: one long buffer would be copied each time it grows."""
        if len(self._bytes) > _SEALED_BYTES:
            self._sealed.append(bytes(self._bytes))
            self._bytes.clear()

    def where(self, kept: NDArray[np.bool_]) -> Self:
        """A log of those rows alone."""
        part = copy(self)
        part._sealed, part._bytes = [], bytearray(np.concatenate(self._tables())[kept].tobytes())
        part.parts = tuple(int(one.sum()) for one in np.split(kept, np.cumsum(self.parts)[:-1]) if self.parts)
        part._ready()
        return part

    def replaced(self, **columns: NDArray[Any]) -> Self:
        """The same rows with other values in these columns."""
        rows = self.where(np.ones(len(self), dtype=np.bool_))
        table = np.frombuffer(rows._bytes, dtype=self._row)
        for name, values in columns.items():
            table[name] = values
        return rows

    def beside(self, others: Sequence[Self]) -> Self:
        """A log of this replica and of others like it."""
        whole, logs = copy(self), (self, *others)
        whole._sealed = [part for one in logs for part in (*one._sealed, bytes(one._bytes))]
        whole._bytes = bytearray()
        whole.parts = tuple(map(len, logs))
        whole._ready()
        return whole

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("pack", "write", "_columns")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ready()

    def __len__(self) -> int:
        return (sum(map(len, self._sealed)) + len(self._bytes)) // self._row.itemsize

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns by name; made once for as long as no row is added."""
        if not self._columns or len(next(iter(self._columns.values()))) != len(self):
            self._columns = self._read()
        return self._columns

    def _read(self) -> dict[str, NDArray[Any]]:
        columns = {name: np.empty(len(self), self._row[name]) for name in self._row.names or ()}
        begin = 0
        for table in self._tables():  # all columns of one, as long as it is in the processor's cache
            end = begin + len(table)
            for name, column in columns.items():
                column[begin:end] = table[name]
            begin = end
        return columns

    def _tables(self) -> list[NDArray[Any]]:
        return [np.frombuffer(part, dtype=self._row) for part in (*self._sealed, bytes(self._bytes))]


class StepLog(Rows):
    """Runs of identical steps; step j of a row takes first_s + j * growth_s, right after step j - 1.

    A row without steps says what is held from then on until the next row: KV caches on their way between
    replicas.

    A row is appended with what the KV manager counts after scheduling its first and its last step
    (computed tokens, final waste, levels); the columns tell the classes of the pool that ``account`` makes of
    them. Without an account the classes themselves are appended, as Usage orders them.
    """

    floats = (
        "start_s",  # begin of the first step
        "first_s",
        "growth_s",
    )
    counts = (
        "steps",  # steps in the row
        "decodes",  # sequences that decode, per step
        "prefills",  # sequences that prefill a chunk, per step
        "prefill_tokens",  # prompt tokens computed, per step
        "context_tokens",  # KV tokens attended by the decodes in the first step (full attention)
        "outputs",  # tokens yielded, per step
        "itl_samples",  # of those, how many follow a token of the same request in the step before
        "running",  # requests, after scheduling
        "waiting",
        "preemptions",  # in the first step
        "admission_failure",  # why the head of the queue waits in the first step: Log.ADMISSION_FAILURES
    )
    # KV cache after scheduling the first step, in token slots; all but kv_logical add up to the pool.
    # The same with end_ before it: after scheduling the last step of the row.
    classes = tuple(f"kv_{name}" for name in Usage._fields)
    _class_columns = (*classes, *(f"end_{name}" for name in classes))
    integers = (*counts, *_class_columns)

    def __init__(self, account: Account | None = None, num_levels: int = 0) -> None:
        self._account = account
        self._num_levels = 2 + num_levels if account else len(Usage._fields)
        levels = tuple(f"level_{i}" for i in range(2 * self._num_levels))
        super().__init__(self.floats, (*self.counts, *levels))

    def without_account(self) -> StepLog:
        """The same rows with the classes of the pool instead of the KV manager's counts."""
        plain, columns = StepLog(), self.columns
        plain.write(bytes(len(self) * plain._row.itemsize))
        levels = {f"level_{i}": columns[name] for i, name in enumerate(self._class_columns)}
        return plain.replaced(**{name: columns[name] for name in (*self.floats, *self.counts)}, **levels)

    def _read(self) -> dict[str, NDArray[Any]]:
        columns = super()._read()
        levels: list[Any] = [columns.pop(f"level_{i}") for i in range(2 * self._num_levels)]
        for prefix, ends in (("kv", levels[: self._num_levels]), ("end_kv", levels[self._num_levels :])):
            usage = Usage(*ends) if self._account is None else self._account.usage(*ends)
            columns |= {f"{prefix}_{name}": values for name, values in usage._asdict().items()}
        return columns


class RequestLog(Rows):
    """One row per request that arrived, in order of its end; NaN marks a time that was not reached."""

    floats = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
    integers = (
        "index",  # Request.index
        "prompt_tokens",
        "output_tokens",  # asked for
        "generated_tokens",  # yielded
        "cached_tokens",  # prefix-cache hit at the first admission
        "preemptions",
        "status",  # Log.STATUSES
    )

    def __init__(self) -> None:
        super().__init__(self.floats, self.integers)


class FleetLog:
    """What happened to the replicas of a fleet, and to requests on their way between them."""

    def __init__(self) -> None:
        self.failures = Rows(("failed_s", "back_s"), ("replica",))
        """NaN: never back."""
        self.aborts = Rows(("at_s",), ("index", "replica", "generated_tokens"))
        """Requests that a failing replica did not finish, with the tokens that it had yielded; they were sent
        to another one, or lost."""
        self.spans = Rows(("ordered_s", "ready_s", "gone_s"), ("replica",))
        """When replicas of an autoscaler were paid for and served; NaN: after the end."""
        self.transfers = Rows(
            ("prefilled_s", "asked_s", "begun_s", "done_s"), ("index", "source", "target", "num_tokens")
        )
        """KV caches of prompts: computed by replica ``source``, blocks found for them by ``target``
        (``asked_s``), on the link from ``begun_s`` on."""


class Log:
    """Everything a simulation leaves behind; ``account`` and ``num_levels`` are the KV manager's."""

    STATUSES = ("finished_stop", "finished_length", "refused", "running", "waiting", "lost")
    """finished_length: cut by max_model_len; refused: the prompt fills max_model_len; running, waiting: the
    simulation ended before them; lost: its replica failed."""

    ADMISSION_FAILURES = ("none", "seats", "memory", "fit", "watermark")
    """seats: max_num_seqs requests run, or a batch that nobody may join; memory: too little is free; fit:
    enough is free, in holes that are too small; watermark: enough is free, but not above the watermark."""

    def __init__(self, account: Account | None = None, num_levels: int = 0) -> None:
        self.steps = StepLog(account, num_levels)
        self.requests = RequestLog()
        self.itl_gaps_s = array("d")
        """Inter-token latencies that span more than one step (a preemption, a skipped step)."""
        self.counters: dict[str, int] = {}
        """prefix_cache_queries, prefix_cache_hits (tokens), preemptions, evicted_blocks, ..."""
        self.end_s = 0.0
        self.interrupted = False
        self.fleet: FleetLog | None = None
        """What happened to replicas, where that is described."""

    @classmethod
    def of_fleet(cls, logs: Sequence[Log], fleet: FleetLog | None = None, *, alike: bool = True) -> Log:
        """The log of several replicas: their rows one after another, their counters added up.

        ``alike``: their KV pools are equal.
        """
        whole, (first, *others) = cls(), logs
        steps = [log.steps if alike else log.steps.without_account() for log in logs]
        whole.steps = steps[0].beside(steps[1:])
        whole.requests = first.requests.beside([one.requests for one in others])
        counters = Counter[str]()
        for log in logs:
            whole.itl_gaps_s.extend(log.itl_gaps_s)
            counters.update(log.counters)
        whole.counters = dict(counters)
        whole.fleet = fleet
        whole.end_s = max(log.end_s for log in logs)
        whole.interrupted = any(log.interrupted for log in logs)
        return whole
