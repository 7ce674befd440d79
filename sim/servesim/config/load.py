"""Files in, records out: `extends`, overrides, and every problem of a file at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from servesim.config.fields import merge, spot
from servesim.config.files import find_data, list_data, shipped
from servesim.config.problems import locate, problems_of, switches_for_numbers
from servesim.config.record import Record
from servesim.config.scenario import Scenario
from servesim.config.schema import scenario_schema, schema_text
from servesim.config.tree import LocatedDict, Place, TreePath, place_of, shown
from servesim.config.workload import WorkloadConfig
from servesim.config.yaml_file import read_value, read_yaml
from servesim.errors import ConfigError, Problem, ServesimError

__all__ = [
    "LoadedScenario",
    "find_data",
    "list_data",
    "load_scenario",
    "loaded_scenario",
    "parse",
    "read_yaml",
    "scenario_schema",
    "schema_text",
    "shipped",
]

R = TypeVar("R", bound=Record)


def parse(record_type: type[R], tree: Any, file: str | Path = "") -> R:
    """The record that a tree describes.

    A field that takes text gets a number as it was written (``version: 0.30``).  ``file`` is named in
    messages about values that have no place of their own.  Raises ConfigError with every problem found.
    """
    problems = list(switches_for_numbers(record_type, tree, str(file)))
    try:
        record = _validated(record_type, tree)
    except ValidationError as error:
        told = {problem.path for problem in problems}
        found = problems_of(error, record_type, tree, str(file))
        problems += (problem for problem in found if problem.path not in told)
    if problems:
        raise ConfigError(_by_line(problems))
    return record


def _by_line(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (problem.file, problem.line, problem.column))


def _validated(record_type: type[R], tree: Any) -> R:
    try:
        return record_type.model_validate(tree)
    except ValidationError as error:
        reread = copy.deepcopy(tree)
        textual = [one["loc"] for one in error.errors() if one["type"] in ("string_type", "literal_error")]
        mended = [_as_written(reread, spot(record_type, tree, location).path) for location in textual]
        if not any(mended):
            raise
    return record_type.model_validate(reread)


def _as_written(tree: Any, path: TreePath) -> bool:
    """Put the written text of a number, true or false in the place of its value; whether there is one."""
    place, found = place_of(tree, path)
    if place is None or not found or not place.text:
        return False
    *sections, last = path
    for key in sections:
        tree = tree[key]
    if tree[last] is not None:
        tree[last] = place.text
    return tree[last] is not None


@dataclass(frozen=True, slots=True)
class LoadedScenario:
    """A scenario, and the files it was read from."""

    scenario: Scenario
    file: Path
    folders: tuple[Path, ...]
    """The folder of its file, then those of the files it extends."""
    redraws: bool = False
    """The rows of its trace of lengths, if it has one, are drawn again by the seed."""

    @property
    def folder(self) -> Path:
        """Where its own relative paths start."""
        return self.folders[0]

    def find(self, kind: str, name: str) -> Path:
        """The file that a name in this scenario means (see find_data)."""
        return find_data(kind, name, self.folders)

    def with_workload(self, workload: WorkloadConfig) -> LoadedScenario:
        """The same scenario under another workload."""
        return replace(self, scenario=self.scenario.model_copy(update={"workload": workload}))

    def named_files(self) -> list[Path]:
        """The files that it names: GPU, models, engine profile, traces."""
        tree = self.scenario.model_dump()
        named = ((_at(tree, path), kind) for path, kind in _names_in(tree))
        return [self.find(kind, name) for name, kind in named if isinstance(name, str)]


_NAMES: tuple[tuple[TreePath, str], ...] = (  # values that name a file; * is any key
    (("hardware", "gpu"), "gpus"),
    (("model",), "models"),
    (("engine", "profile"), "profiles"),
    (("engine", "speculative", "draft_model"), "models"),
    (("engine", "speculative", "acceptance", "file"), "traces"),
    (("fleet", "kv_link"), "links"),
    (("fleet", "pools", "*", "gpu"), "gpus"),
    (("fleet", "pools", "*", "engine", "profile"), "profiles"),
    (("workload", "trace", "file"), "traces"),
    (("workload", "prompt_tokens", "file"), "traces"),
    (("workload", "output_tokens", "file"), "traces"),
)


def load_scenario(path_or_name: str | Path, overrides: Sequence[str] = ()) -> LoadedScenario:
    """The scenario of a file or a shipped name, with what it `extends` and the overrides put on top.

    ``overrides``: texts like ``engine.block_size=32``.  Raises ConfigError with every problem found.
    """
    file = find_data("scenarios", str(path_or_name))
    tree, files = _extended(file, ())
    if overrides:
        tree = merge(tree, _override_tree(overrides), Scenario)
    folders = tuple(dict.fromkeys(each.parent for each in files))
    problems = list(_unknown_names(tree, folders, str(file)))
    try:
        scenario = parse(Scenario, tree, file)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(_by_line(problems))
    return LoadedScenario(scenario, file, folders)


def loaded_scenario(source: LoadedScenario | str | Path, overrides: Sequence[str]) -> LoadedScenario:
    """The scenario; raises ConfigError where one that is loaded already is given overrides."""
    if not isinstance(source, LoadedScenario):
        return load_scenario(source, overrides)
    if overrides:
        problem = Problem(
            "a scenario that is loaded already takes no overrides",
            file=str(source.file),
            got=", ".join(overrides),
            next_step="give them to servesim.load",
        )
        raise ConfigError(problem)
    return source


def _extended(file: Path, below: tuple[Path, ...]) -> tuple[LocatedDict, tuple[Path, ...]]:
    """The tree of ``file`` on top of what it extends, and all the files read; ``below`` extend this one."""
    tree = read_yaml(file)
    if "extends" not in tree:
        return tree, (file,)
    name = tree["extends"]
    if not isinstance(name, str):
        wrong = Problem("must be the name or path of one scenario", got=shown(name))
        raise ConfigError(locate(wrong, tree, ("extends",), str(file)))
    try:
        parent = find_data("scenarios", name, file.parent)
    except ConfigError as error:
        raise ConfigError([locate(one, tree, ("extends",), str(file)) for one in error.problems]) from None
    chain = (*below, file)
    if parent.resolve() in [each.resolve() for each in chain]:
        circle = " -> ".join(each.name for each in (*chain, parent))
        wrong = Problem(
            f"scenarios extend one another in a circle: {circle}", next_step="remove one `extends:`"
        )
        raise ConfigError(locate(wrong, tree, ("extends",), str(file)))
    base, files = _extended(parent, chain)
    own = tree.copy()
    own.drop("extends")
    return merge(base, own, Scenario), (file, *files)


def _override_tree(overrides: Sequence[str]) -> LocatedDict:
    """What all the overrides say, as one tree; a later one wins."""
    tree = LocatedDict()
    place = Place("--set")
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            step = "write section.key=value, such as engine.block_size=32"
            wrong = Problem("an override must be path=value", "--set", got=shown(override), next_step=step)
            raise ConfigError(wrong)
        try:
            value, written = read_value(text.strip(), place.file)
        except ConfigError as error:
            found = Problem(error.problems[0].problem, next_step=error.problems[0].next_step)
            told = replace(found, file=place.file, path=path.strip(), got=shown(text))
            raise ConfigError(told) from None
        section = tree
        for key in keys[:-1]:
            if not isinstance(section.get(key), LocatedDict):
                section.put(key, LocatedDict(), place)
            section = section[key]
        section.put(keys[-1], value, replace(place, text=written))
    return tree


def _unknown_names(tree: LocatedDict, folders: Sequence[Path], file: str) -> list[Problem]:
    """Names of hardware, models and traces that lead to no file."""
    problems: list[Problem] = []
    for path, kind in _names_in(tree):
        node = _at(tree, path)
        if isinstance(node, str):
            try:
                find_data(kind, node, folders)
            except ServesimError as error:
                problems += (locate(one, tree, path, file) for one in error.problems)
    return problems


def _names_in(tree: Any) -> Iterator[tuple[TreePath, str]]:
    for path, kind in _NAMES:
        if "*" not in path:
            yield path, kind
            continue
        place = path.index("*")
        section = _at(tree, path[:place])
        for key in section if isinstance(section, dict) else ():
            yield (*path[:place], key, *path[place + 1 :]), kind


def _at(tree: Any, path: TreePath) -> Any:
    """What stands at ``path``; None when nothing does."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
