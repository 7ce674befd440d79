"""The folder of a recording, written run by run: a recorder that is stopped loses only its last run."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from record.arrivals import Ask
from record.engine import StepRow

__all__ = ["KERNEL_COLUMNS", "Folder", "Served"]

RUN_COLUMNS = (
    "run", "group", "load", "rate", "repeat", "process", "set", "part", "requests", "steps", "duration_s",
    "wall_s", "load_average", "copy_ms", "hash_ms",
)  # fmt: skip
REQUEST_COLUMNS = (
    "run", "request", "arrival_s", "arrival_step", "prompt_tokens", "output_tokens", "prefix_group",
    "prefix_tokens", "first_token_s", "finish_s", "preemptions",
)  # fmt: skip
STEP_COLUMNS = (
    "run", "call", "start_s", "schedule_s", "output_s", "end_s", "wall_s", "cpu_s", "scheduled", "preempted",
    "drafts", "accepted", "running", "waiting", "free_blocks", "evicted", "finished", "free_after",
)  # fmt: skip
KERNEL_COLUMNS = (
    "gpu", "backend", "backend_version", "op", "dtype", "kv_dtype", "m", "n", "k", "batch", "seq", "heads",
    "kv_heads", "head_dim", "num_gpus", "elements", "num_experts", "experts_per_token", "routing", "kernel",
    "latency_us",
)  # fmt: skip
_COLUMNS = {
    "runs.csv": RUN_COLUMNS, "requests.csv": REQUEST_COLUMNS, "steps.csv": STEP_COLUMNS,
    "kernels.csv": KERNEL_COLUMNS,
}  # fmt: skip
_COMPRESSED = ("requests.csv", "steps.csv")


class Served(NamedTuple):
    """A request and what became of it; times from the begin of its run, -1 for what never came."""

    ask: Ask
    arrival_step: int
    first_token_s: float
    finish_s: float
    preemptions: int


class Folder:
    """Files of one recording; what is there already is kept and added to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def runs(self) -> list[dict[str, str]]:
        """The runs so far."""
        path = self.path / "runs.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def has(self, name: str) -> bool:
        """Whether a file is there already."""
        return (self.path / name).exists()

    def write_once(self, name: str, text: str) -> None:
        """A file that the first job writes."""
        path = self.path / name
        if not self.has(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file that the first job writes."""
        self.write_once(name, json.dumps(content, indent=1) + "\n")

    def add_kernels(self, rows: Iterable[Sequence[object]]) -> None:
        """Times of single operators."""
        self._append("kernels.csv", rows)

    def add_run(self, run: dict[str, object], served: Sequence[Served], steps: Sequence[StepRow]) -> None:
        """One run; its line in runs.csv comes last and says that it is complete."""
        name = run["run"]
        self._append("requests.csv", ([name, *_request(index, one)] for index, one in enumerate(served)))
        self._append("steps.csv", ([name, *_step(row)] for row in steps))
        self._append("runs.csv", [[run[column] for column in RUN_COLUMNS]])

    def merge_kernels(self) -> None:
        """Of an operator that was timed several times the median stays."""
        path = self.path / "kernels.csv"
        if not path.exists():
            return
        with path.open(encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        times: dict[tuple[str, ...], list[float]] = {}
        for *operator, latency_us in rows:
            times.setdefault(tuple(operator), []).append(float(latency_us))
        path.unlink()
        self.add_kernels([*operator, f"{median(each):.2f}"] for operator, each in times.items())

    def compress(self) -> None:
        """Zip the large tables, byte by byte the same for the same content."""
        for name in _COMPRESSED:
            path = self.path / name
            if path.exists():
                (self.path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
                path.unlink()

    def expand(self) -> None:
        """The opposite, to add runs to a recording that was finished."""
        for name in _COMPRESSED:
            path = self.path / f"{name}.gz"
            if path.exists():
                (self.path / name).write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()

    def _append(self, name: str, rows: Iterable[Sequence[object]]) -> None:
        path = self.path / name
        new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(_COLUMNS[name])
            writer.writerows(rows)


def _request(index: int, one: Served) -> list[object]:
    ask = one.ask
    return [
        index, _seconds(ask.arrival_s), one.arrival_step, ask.prompt_tokens, ask.output_tokens,
        ask.prefix_group if ask.prefix_tokens else "", ask.prefix_tokens or "", _seconds(one.first_token_s),
        _seconds(one.finish_s), one.preemptions,
    ]  # fmt: skip


def _step(row: StepRow) -> list[object]:
    return [
        row.call,
        *map(_seconds, (row.start_s, row.schedule_s, row.output_s, row.end_s, row.wall_s, row.cpu_s)),
        " ".join(f"{request}:{tokens}@{before}" for request, tokens, before in row.scheduled),
        " ".join(map(str, row.preempted)),
        _counts(row.drafts), _counts(row.accepted),
        row.running, row.waiting, row.free_blocks, row.evicted, " ".join(map(str, row.finished)),
        row.free_after,
    ]  # fmt: skip


def _counts(values: dict[int, int]) -> str:
    return " ".join(f"{request}:{count}" for request, count in values.items())


def _seconds(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")
