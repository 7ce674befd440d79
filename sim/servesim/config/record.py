"""The base of everything that is read from a file: frozen, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Record", "RuleError"]


class Record(BaseModel):
    """A frozen section of a file; an attribute's docstring is its text in the JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class RuleError(ValueError):
    """Raised by a record's validator: values that are right one by one but not together.

    ``path`` leads from the record to the value to point at; ``next_step`` says how to mend it.
    """

    def __init__(self, problem: str, path: tuple[str, ...] = (), next_step: str = "") -> None:
        super().__init__(problem)
        self.path = path
        self.next_step = next_step
