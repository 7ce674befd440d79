"""The base of everything that is read from a file: frozen, and closed to unknown keys."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise
from textwrap import dedent

from pydantic import BaseModel, ConfigDict

__all__ = ["Record", "RuleError", "attribute_texts"]


class Record(BaseModel):
    """A frozen section of a file; an attribute's docstring is its text in the JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
    )


@cache
def attribute_texts(record_type: type[BaseModel]) -> dict[str, str]:
    """The docstrings of a record's attributes, by name.

    Pydantic can read them, too, but does so for every record of a program whenever it starts.
    """
    texts: dict[str, str] = {}
    for parent in reversed(record_type.__mro__):
        if not issubclass(parent, Record) or parent is Record:
            continue
        [definition] = ast.parse(dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for one, after in pairwise(definition.body):
            match one, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = inspect.cleandoc(text)
    return texts


class RuleError(ValueError):
    """Raised by a record's validator: values that are right one by one but not together.

    ``path`` leads from the record to the value to point at; ``next_step`` says how to mend it.
    """

    def __init__(self, problem: str, path: tuple[str | int, ...] = (), next_step: str = "") -> None:
        super().__init__(problem)
        self.path = path
        self.next_step = next_step
