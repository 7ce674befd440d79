"""The log as tables: requests, steps, KV classes; pandas is imported when the first one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from servesim.analysis.fleet_use import aborts_of
from servesim.analysis.metrics import request_times
from servesim.analysis.timeline import KV_CLASSES
from servesim.engine.events import FleetLog, Log, StepLog

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["kv_frame", "requests_frame", "steps_frame", "to_csv"]

_STEP_COLUMNS = (
    "steps",
    "decodes",
    "prefills",
    "prefill_tokens",
    "context_tokens",
    "outputs",
    "running",
    "waiting",
    "preemptions",
)


def requests_frame(log: Log) -> pd.DataFrame:
    """One row per request, by index: what it asked for, its times and latencies in seconds, its status.

    Of a fleet to which something happens also ``aborts``, how often it was in flight on a replica that
    failed, and, where another replica computed the prompt, which one and when its KV cache came:
    ``transfer_s`` is all the time between the two replicas. ``replica`` is the last.
    """
    import pandas as pd

    column, times = log.requests.columns, request_times(log)
    frame = pd.DataFrame(
        {
            **{name: np.array(column[name]) for name in ("index", "prompt_tokens", "output_tokens")},
            **{name: np.array(column[name]) for name in ("generated_tokens", "cached_tokens", "preemptions")},
            "status": np.array(Log.STATUSES, dtype=object)[np.array(column["status"], dtype=np.int64)],
            **{name: np.array(column[name]) for name in log.requests.floats},
            "queue_s": times.queue_s,
            "ttft_s": times.ttft_s,
            "tpot_s": times.tpot_s,
            "e2e_s": times.e2e_s,
        }
    )
    if log.fleet is not None:
        frame.insert(6, "aborts", aborts_of(log.fleet, np.array(column["index"])))
        if len(log.fleet.transfers):
            frame = _with_transfers(frame, log.fleet)
    _name_replicas(frame, log.requests.parts)
    return frame.sort_values("index", kind="stable", ignore_index=True)


def _with_transfers(frame: pd.DataFrame, fleet: FleetLog) -> pd.DataFrame:
    """Where and when the prompt was computed, when blocks were found for it, when it was on the link."""
    transfers = fleet.transfers.columns
    names = {"source": "prefill_replica", "prefilled_s": "prefilled_s", "asked_s": "blocks_s"}
    names |= {"begun_s": "transfer_begun_s", "done_s": "transfer_done_s"}
    order = np.argsort(transfers["index"])
    place = np.searchsorted(transfers["index"][order], frame["index"]).clip(max=len(order) - 1)
    row = order[place]
    known = transfers["index"][row] == frame["index"]
    for name, title in names.items():
        frame[title] = np.where(known, transfers[name][row], np.nan)
    frame["transfer_s"] = frame["transfer_done_s"] - frame["prefilled_s"]
    return frame


def steps_frame(log: Log) -> pd.DataFrame:
    """One row per run of identical steps.

    Counts are per step; ``context_tokens`` and ``preemptions`` are those of the first step. Step j of a
    row takes ``first_s + j * growth_s``; ``end_s`` is where the last step ends.
    """
    import pandas as pd

    column = {name: np.array(values) for name, values in log.steps.columns.items()}
    frame = pd.DataFrame(
        {
            "start_s": column["start_s"],
            "end_s": _end_s(log.steps),
            "first_s": column["first_s"],
            "growth_s": column["growth_s"],
            **{name: column[name] for name in _STEP_COLUMNS},
        }
    )
    _name_replicas(frame, log.steps.parts)
    return frame


def kv_frame(log: Log) -> pd.DataFrame:
    """The KV pool by class, in token slots, at the first and at the last step of every row of steps.

    tokens + reserved + internal + round_up + holes + cached + free is the pool, in both.
    """
    import pandas as pd

    column = log.steps.columns
    names = (*KV_CLASSES, "logical")
    frame = pd.DataFrame(
        {
            "start_s": np.array(column["start_s"]),
            "end_s": _end_s(log.steps),
            **{name: np.array(column[f"kv_{name}"]) for name in names},
            **{f"end_{name}": np.array(column[f"end_kv_{name}"]) for name in names},
        }
    )
    _name_replicas(frame, log.steps.parts)
    return frame


def to_csv(frame: pd.DataFrame) -> str:
    """CSV text, the same bytes for the same frame: LF line ends, 12 significant digits, empty for NaN."""
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.12g")


def _name_replicas(frame: pd.DataFrame, parts: tuple[int, ...]) -> None:
    """Put the replica into the rows of a fleet, counted from 0."""
    if parts:
        frame.insert(0, "replica", np.repeat(np.arange(len(parts)), parts))


def _end_s(steps: StepLog) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    column = {name: np.array(steps.columns[name]) for name in ("start_s", "first_s", "growth_s", "steps")}
    count = column["steps"]
    return np.asarray(column["start_s"] + count * (column["first_s"] + (count - 1) * column["growth_s"] / 2))
