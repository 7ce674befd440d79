"""Where hardware, models, scenarios and traces are looked for.

A path is taken relative to the scenario's folder, then to the current one.  A bare name is looked for in
the scenario's folder, in ./hardware or ./scenarios of the current folder, then among what servesim ships.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from servesim.errors import ConfigError, Problem, TraceError, did_you_mean

__all__ = ["find_data", "list_data", "shipped"]

_PACKAGE = Path(__file__).resolve().parent.parent


class _Kind(NamedTuple):
    folder: str
    noun: str
    suffixes: tuple[str, ...] = (".yaml", ".yml")


_KINDS = {
    "gpus": _Kind("hardware/gpus", "GPU"),
    "links": _Kind("hardware/links", "link"),
    "models": _Kind("hardware/models", "model"),
    "scenarios": _Kind("scenarios", "scenario"),
    "profiles": _Kind("profiles", "engine profile"),
    "traces": _Kind("scenarios/traces", "trace", (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")),
}


def shipped(folder: str) -> Path:
    """A folder of data that servesim ships: inside the wheel's package, else at the checkout's top level."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parents[1] / folder


def find_data(kind: str, name: str, base: Path | Sequence[Path] | None = None) -> Path:
    """The file that ``name`` (a bare name or a path) means.

    ``base``: folder of the scenario that says it, or several (its own, then those it extends).
    Raises ConfigError (TraceError for a trace) with the nearest known name when there is none.
    """
    if not name.strip():
        empty = Problem(f"the name of a {_KINDS[kind].noun} is empty", next_step="give a name or a path")
        raise ConfigError(empty)
    bases = [base] if isinstance(base, Path) else list(base or ())
    folders: list[Path] = []
    for candidate in _candidates(_KINDS[kind], name, bases):
        if os.path.isdir(candidate):
            folders.append(candidate)
        elif os.path.exists(candidate):
            return candidate
    raise (TraceError if kind == "traces" else ConfigError)(_not_found(kind, name, folders))


def list_data(kind: str) -> list[str]:
    """Names that can be used in a scenario: those of the current folder and those shipped, sorted."""
    suffixes = _KINDS[kind].suffixes
    names: set[str] = set()
    for folder in (Path(_KINDS[kind].folder), shipped(_KINDS[kind].folder)):
        for path in folder.glob("*") if folder.is_dir() else ():
            ending = next((end for end in suffixes if path.name.endswith(end)), None)
            if ending and path.is_file():
                names.add(path.name if kind == "traces" else path.name.removesuffix(ending))
    return sorted(names)


def _candidates(kind: _Kind, name: str, bases: Sequence[Path]) -> Iterator[Path]:
    """Every place to look at, first to last."""
    is_path, is_trace = "/" in name or os.sep in name, kind.noun == "trace"
    if is_path or is_trace or name.endswith(kind.suffixes):
        path = Path(name).expanduser() if name.startswith("~/") else Path(name)
        yield from (base / path for base in bases)
        yield path
        if is_trace:  # traces/x.csv.gz, as a scenario of another folder says it
            yield from (Path("scenarios") / path, shipped("scenarios") / path)
    if not is_path:
        names = [name] if name.endswith(kind.suffixes) else [name + suffix for suffix in kind.suffixes]
        folders = [*(base / kind.folder for base in bases), Path(kind.folder), shipped(kind.folder)]
        # A scenario's own folder may hold a scenario called like a model, so it comes last for the others.
        folders = [*bases, *folders] if kind.noun == "scenario" else [*folders, *bases]
        yield from (folder / file for folder in folders for file in names)


def _not_found(kind: str, name: str, folders: Sequence[Path]) -> Problem:
    noun = _KINDS[kind].noun
    if folders:
        step = "give a file in it"
        return Problem(f"a {noun} must be a file, not a folder", got=f'"{folders[0]}"', next_step=step)
    check = f"check the path, or take a name that `servesim list {kind}` prints"
    if kind != "traces" and ("/" in name or os.sep in name):
        return Problem(f"no such {noun} file", got=f'"{name}"', next_step=check)
    known = list_data(kind)
    word = name.rsplit("/", 1)[-1] if kind == "traces" else Path(name).name.removesuffix(".yaml")
    step = "put it beside the scenario, or give its path"
    if kind != "traces":
        step = f"see `servesim list {kind}`, or give the path of a file"
    hint = did_you_mean(word, known) if known else ""
    if kind != "traces" and name.endswith(_KINDS[kind].suffixes) and hint.startswith("allowed"):
        hint, step = "", check  # a file of the user's, and no name
    return Problem(f"no such {noun}", got=f'"{name}"', hint=hint, next_step=step)
