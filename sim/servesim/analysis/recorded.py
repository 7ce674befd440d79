"""Recorded runs of real servers: folders of data that become simulations without any code.

A folder holds `meta.json` (provenance), `scenario.yaml` (what was served, as a scenario of its own) and
one of three: `requests.csv` (one run, a row per request); `results.csv` (a row per run: overrides of a
scenario, then measured figures by name); `runs.csv` (runs whose requests and steps are in other tables: see
analysis.stepwise). Format: reports/validation/README.md.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from servesim.analysis.figures import METRICS, OF_RESULTS
from servesim.analysis.measured import MeasuredRequests, read_measured
from servesim.analysis.stepwise import StepwiseRun, read_stepwise
from servesim.config.files import shipped
from servesim.config.load import LoadedScenario, load_scenario, parse
from servesim.config.record import Record
from servesim.errors import ConfigError, Problem, ServesimError, did_you_mean

__all__ = [
    "ENGINE_PROFILE",
    "RecordedFolder",
    "RecordedRow",
    "RecordedRun",
    "RecordedSteps",
    "failure",
    "find_folders",
    "read_folder",
]

ENGINE_PROFILE = "engine-profile.yaml"
"""The calibration of a recorded run, fitted on the first half of its requests."""


class Meta(Record):
    """Where a recording comes from."""

    title: str
    engine: str
    recorded: str
    """Date, month or year."""
    source: str
    license: str
    calibration: str
    """What was used to fit what, so that no figure is judged on what it was fitted to."""
    notes: str = ""
    profile: str = ""
    """Engine profile that judges this recording, when it is another recording's: its path from the folder."""
    machine: dict[str, Any] = Field(default_factory=dict)
    """What it ran on and how, for readers."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run, request by request."""

    loaded: LoadedScenario
    requests: MeasuredRequests
    memory: dict[str, float]
    """What the server said about its memory, by the names of analysis.figures; empty when it was not kept."""
    profile: Path | None
    """Engine profile fitted on the first half of the requests, if there is one."""


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """The figures of one run."""

    name: str
    scenario: Path
    overrides: tuple[str, ...]
    measured: dict[str, float]
    profile: Path | None
    """Engine profile fitted on the rows whose part is ``fit``; no such file where they could not tell it."""
    judged: bool
    """False for a row that a profile was fitted to."""

    def load(self) -> LoadedScenario:
        """Its scenario; raises ServesimError when it asks for what the simulator does not have."""
        return load_scenario(self.scenario, self.overrides)


@dataclass(frozen=True, slots=True)
class RecordedSteps:
    """Runs of one deployment with every step of the engine."""

    runs: tuple[StepwiseRun, ...]
    memory: dict[str, float]
    """As of RecordedRun."""
    profile: Path | None
    """Engine profile that judges them, if there is one."""
    fitted_here: bool
    """Whether that profile was fitted to runs of this folder."""


@dataclass(frozen=True, slots=True)
class RecordedFolder:
    """Everything recorded in one folder: one run, a table of runs, or runs with their steps."""

    name: str
    meta: Meta
    run: RecordedRun | None
    rows: tuple[RecordedRow, ...]
    stepwise: RecordedSteps | None = None

    @property
    def num_replays(self) -> int:
        """Runs that validating it simulates, calibrated ones not counted."""
        groups = {one.group for one in self.stepwise.runs} if self.stepwise else ()
        return max(1, len(self.rows), len(groups))


def find_folders(paths: Sequence[Path] = ()) -> list[Path]:
    """Folders of recorded runs: ``paths`` and those right below them; without any the shipped ones.

    Raises ConfigError for a path that holds none.
    """
    found: list[Path] = []
    for path in paths or (shipped("reports/validation") / "runs",):
        below = sorted(each.parent for each in path.glob("*/meta.json"))
        if not (path / "meta.json").is_file() and not below:
            wrong = Problem(
                "holds no recorded run",
                file=str(path),
                next_step="give a folder with a meta.json, or one whose folders have it",
            )
            raise ConfigError(wrong)
        found += [path] if (path / "meta.json").is_file() else below
    return found


def read_folder(folder: Path) -> RecordedFolder:
    """What a folder holds; raises ServesimError with its file when something is missing or wrong."""
    meta = parse(Meta, _json(folder / "meta.json"), folder / "meta.json")
    name = folder.resolve().name
    if (folder / "results.csv").is_file():
        return RecordedFolder(name, meta, None, tuple(_rows(folder)))
    profile, memory = folder / (meta.profile or ENGINE_PROFILE), folder / "memory.json"
    said = _numbers(memory) if memory.is_file() else {}
    known = profile if profile.is_file() else None
    if (folder / "runs.csv").is_file():
        steps = RecordedSteps(read_stepwise(folder), said, known, not meta.profile)
        return RecordedFolder(name, meta, None, (), steps)
    loaded = load_scenario(folder / "scenario.yaml")
    run = RecordedRun(loaded, read_measured(folder / "requests.csv"), said, known)
    return RecordedFolder(name, meta, run, ())


def _numbers(path: Path) -> dict[str, float]:
    """The figures of a JSON object that have a meaning here; others are kept for readers."""
    values = _json(path)
    if not isinstance(values, dict):
        raise ConfigError(Problem("must be an object of numbers", file=str(path)))
    known = [key for key in values if key in METRICS and METRICS[key].of_memory]
    try:
        return {key: _above_0(key, values[key]) for key in known}
    except (ValueError, TypeError) as error:
        raise ConfigError(Problem("must be an object of numbers", file=str(path), got=str(error))) from None


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("cannot be read as JSON", file=str(path), got=str(error))) from None


def _rows(folder: Path) -> list[RecordedRow]:
    path, rows = folder / "results.csv", []
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        problems = [_unknown(path, name) for name in table.fieldnames or () if name not in _COLUMNS]
        for line, cells in enumerate(() if problems else table, start=2):
            try:
                rows.append(_row(folder, cells))
            except (KeyError, ValueError, TypeError) as error:
                problems.append(Problem("is not a row of results", file=str(path), line=line, got=str(error)))
    if problems:
        raise ConfigError(problems)
    return rows


_SETTINGS = ("row", "scenario", "set", "profile", "part")
_COLUMNS = (*_SETTINGS, *OF_RESULTS)


def _unknown(path: Path, column: str) -> Problem:
    return Problem(
        "no figure that a run is judged by",
        file=str(path),
        line=1,
        got=column,
        hint=did_you_mean(column, OF_RESULTS),
        next_step="remove the column, or see reports/validation/README.md for the names",
    )


def _row(folder: Path, cells: dict[str, str]) -> RecordedRow:
    if None in cells or None in cells.values():
        raise ValueError("not as many cells as the head has")
    profile = cells.get("profile")
    return RecordedRow(
        name=cells["row"],
        scenario=folder / (cells.get("scenario") or "scenario.yaml"),
        overrides=tuple(text for text in cells["set"].split(";") if text),
        measured={key: _above_0(key, text) for key, text in cells.items() if key not in _SETTINGS and text},
        profile=folder / profile if profile else None,
        judged=cells.get("part") != "fit",
    )


def _above_0(name: str, given: Any) -> float:
    value = float(given)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} {given}: an error is told of numbers above 0, leave others empty")
    return value


def failure(error: ServesimError) -> str:
    """Why a recorded run cannot be simulated, on one line."""
    problem = error.problems[0]
    return " ".join(part for part in (problem.path, problem.problem) if part)
