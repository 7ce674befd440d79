"""What a scenario expects of its own result: figures with a tolerance, or limits."""

from __future__ import annotations

from pydantic import Field, model_validator

from servesim.config.record import Record, RuleError

__all__ = ["Expectation"]


class Expectation(Record):
    """One figure of the result, and what it must be; `servesim run --expect` checks it.

    Either a value with a tolerance, or at_least, at_most or both.
    """

    metric: str = Field(min_length=1)
    """Path of a number in the JSON result, such as engine.mean_running or p99_ttft_ms."""
    value: float | None = None
    tolerance: float | None = Field(default=None, ge=0)
    """Most by which the figure may differ from value, in the same unit."""
    tolerance_percent: float | None = Field(default=None, ge=0)
    """The same as a percentage of value."""
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    source: str = ""
    """Where the value comes from."""
    note: str = ""
    """What to know about it, such as the cause of a known difference."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Expectation:
        limits = [name for name in ("at_least", "at_most") if getattr(self, name) is not None]
        tolerances = [name for name in ("tolerance", "tolerance_percent") if getattr(self, name) is not None]
        if self.value is None:
            if tolerances:
                raise RuleError("needs a value", (tolerances[0],), "add value, or give at_least or at_most")
            if not limits:
                raise RuleError(
                    "expects nothing", next_step="add value and tolerance, or at_least, or at_most"
                )
        elif limits:
            raise RuleError("does not go with value", (limits[0],), "remove one of the two")
        elif len(tolerances) != 1:
            problem = "needs one tolerance" if not tolerances else "has two tolerances"
            raise RuleError(problem, ("value",), "give either tolerance or tolerance_percent")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise RuleError("is above at_most", ("at_least",), "give the smaller one as at_least")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value that is accepted; infinite where there is no limit."""
        if self.value is None:
            low = float("-inf") if self.at_least is None else self.at_least
            return low, float("inf") if self.at_most is None else self.at_most
        margin = self.tolerance
        if margin is None:
            assert self.tolerance_percent is not None  # by the validator
            margin = abs(self.value) * self.tolerance_percent / 100
        return self.value - margin, self.value + margin
