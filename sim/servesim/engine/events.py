"""What happened: the log that a simulation leaves, column by column.

A row of ``StepLog`` is a run of identical steps, so that a thousand decode steps cost one row.
All times are simulated seconds since the first arrival's clock started.
"""

from __future__ import annotations

from array import array

__all__ = ["Log", "RequestLog", "StepLog"]


_ROWS_AT_A_TIME = 1024


class _Columns:
    """Named columns of equal length, floats first."""

    floats: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._columns: dict[str, array[float] | array[int]] = {
            **{name: array("d") for name in self.floats},
            **{name: array("q") for name in self.integers},
        }
        self._rows: list[tuple[float, ...]] = []  # not in the columns yet: many at a time cost less

    @property
    def columns(self) -> dict[str, array[float] | array[int]]:
        """The columns by name, in the order of the class's lists."""
        self._flush()
        return self._columns

    def append(self, *row: float) -> None:
        """Add one row, in the order of the columns."""
        self._rows.append(row)
        if len(self._rows) >= _ROWS_AT_A_TIME:
            self._flush()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def _flush(self) -> None:
        if self._rows:
            for column, values in zip(self._columns.values(), zip(*self._rows, strict=True), strict=True):
                column.extend(values)
            self._rows.clear()


class StepLog(_Columns):
    """Runs of identical steps; step j of a row takes first_s + j * growth_s, right after step j - 1."""

    floats = (
        "start_s",  # begin of the first step
        "first_s",
        "growth_s",
    )
    integers = (
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
        # KV cache after scheduling the first step, in token slots; the seven classes add up to the pool
        "kv_tokens",  # written (or being written in this step) and still needed, shared slots counted once
        "kv_reserved",  # allocated to a live request, empty, will be filled
        "kv_internal",  # allocated to a live request, will never be filled
        "kv_round_up",  # allocated to a live request beyond what was asked for
        "kv_holes",  # free, in pieces too small to be used
        "kv_cached",  # prefix-cache blocks that no live request uses; reclaimable
        "kv_free",
        "kv_logical",  # as kv_tokens, shared slots counted once per sharer
        # the same for the last step of the row
        "end_kv_tokens",
        "end_kv_reserved",
        "end_kv_internal",
        "end_kv_round_up",
        "end_kv_holes",
        "end_kv_cached",
        "end_kv_free",
        "end_kv_logical",
    )


class RequestLog(_Columns):
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


class Log:
    """Everything a simulation leaves behind."""

    STATUSES = ("finished_stop", "finished_length", "refused", "running", "waiting")
    """finished_length: cut by max_model_len; refused: the prompt fills max_model_len; the last two: the
    simulation ended before them."""

    ADMISSION_FAILURES = ("none", "seats", "memory", "fit", "watermark")
    """seats: max_num_seqs requests run, or a batch that nobody may join; memory: too little is free; fit:
    enough is free, in holes that are too small; watermark: enough is free, but not above the watermark."""

    def __init__(self) -> None:
        self.steps = StepLog()
        self.requests = RequestLog()
        self.itl_gaps_s = array("d")
        """Inter-token latencies that span more than one step (a preemption, a skipped step)."""
        self.counters: dict[str, int] = {}
        """prefix_cache_queries, prefix_cache_hits (tokens), preemptions, evicted_blocks, ..."""
        self.end_s = 0.0
        self.interrupted = False
