"""What every error keeps, wherever it was raised."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

from servesim import errors
from servesim.errors import Problem, ServesimError

PROBLEMS = (
    Problem("unknown key", "a.yaml", 3, 5, "engine.blok_size", hint="did you mean block_size?"),
    Problem("is missing", path="model", next_step="add model: at the top level"),
)


def kinds(of: type[ServesimError]) -> Iterator[type[ServesimError]]:
    yield of
    for below in of.__subclasses__():
        yield from kinds(below)


def test_the_tree_is_all_that_the_module_offers() -> None:
    assert {kind.__name__ for kind in kinds(ServesimError)} <= set(errors.__all__)


@pytest.mark.parametrize("kind", list(kinds(ServesimError)))
@pytest.mark.parametrize("problems", [PROBLEMS, PROBLEMS[0]])
def test_an_error_is_the_same_on_the_other_side_of_a_pipe(kind, problems) -> None:
    error = kind(problems)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert again.problems == error.problems
        assert str(again) == str(error) == "\n".join(str(problem) for problem in error.problems)
