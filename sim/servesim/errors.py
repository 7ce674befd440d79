"""The exception tree and the one message format.

    ServesimError
    ├── ConfigError            a scenario, profile or override that cannot be used (all its problems at once)
    ├── TraceError             a trace file that is missing or has a malformed row
    ├── MemoryDoesNotFitError  the model leaves no room for a KV cache on this hardware
    ├── CalibrationError       measurements that cannot tell what is asked of them
    ├── StudyError             a study of many runs that cannot be begun, resumed or finished
    └── OutputError            a place where results cannot be written

Every message reads ``file:line:col  path  problem  got X  allowed or did you mean  -> next step``;
parts that do not apply are left out.  The command line prints it and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

__all__ = [
    "CalibrationError",
    "ConfigError",
    "MemoryDoesNotFitError",
    "OutputError",
    "Problem",
    "ServesimError",
    "StudyError",
    "TraceError",
    "blamed_on",
    "did_you_mean",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it."""

    problem: str
    file: str = ""
    line: int = 0
    column: int = 0
    path: str = ""
    got: str = ""
    hint: str = ""
    next_step: str = ""

    def __str__(self) -> str:
        place = self.file
        got = self.got.replace("\n", "\\n").replace("\r", "\\r")  # one problem, one line
        if self.line:
            place += f":{self.line}" + (f":{self.column}" if self.column else "")
        parts = [place, self.path, self.problem, f"got {got}" if got else "", self.hint]
        text = "  ".join(part for part in parts if part)
        return f"{text}  -> {self.next_step}" if self.next_step else text


class ServesimError(Exception):
    """A mistake that its user can mend; carries every problem found, one line each."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)  # from which pickle makes it anew, coming from another process

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class ConfigError(ServesimError):
    """A scenario, profile or override that cannot be used."""


class TraceError(ServesimError):
    """A trace file that is missing or has a malformed row."""


class MemoryDoesNotFitError(ServesimError):
    """The model leaves no room for a KV cache on this hardware."""


class CalibrationError(ServesimError):
    """Measurements that cannot tell what is asked of them."""


class StudyError(ServesimError):
    """A study of many runs (replications, sweep, sensitivity) that cannot be begun, resumed or finished."""


class OutputError(ServesimError):
    """A place where results cannot be written."""


@contextmanager
def blamed_on(options: Mapping[str, str]) -> Iterator[None]:
    """Name the option by which a value was set, by the value's path, in problems that would name --set."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([_blamed(problem, options) for problem in error.problems]) from error


def _blamed(problem: Problem, options: Mapping[str, str]) -> Problem:
    at = next((path for path in options if f"{problem.path}.".startswith(f"{path}.")), None)
    on_command_line = problem.file.startswith("--")
    return problem if at is None or not on_command_line else replace(problem, file=options[at])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known words that go on like it, are close to it or hold it, else all; case does not count."""
    lower, asked = {name.lower(): name for name in sorted(known)}, word.lower()
    longer = [name for each, name in lower.items() if asked and each.startswith(asked)]
    close = [lower[each] for each in difflib.get_close_matches(asked, lower, n=1, cutoff=0.6)]
    holding = [name for each, name in lower.items() if len(asked) >= 3 and asked in each]
    meant = longer or close or holding
    return f"did you mean {' or '.join(meant)}?" if meant else f"allowed: {', '.join(lower.values())}"
