"""A plan on its way through the GPU."""

from __future__ import annotations

from servesim.engine.state import Plan

__all__ = ["Flight", "duration_s", "steps_until"]


class Flight:
    """A plan's pace, and the log row that its steps have filled so far.

    Step j from now takes ``first_s + j * growth_s``, for ``num_steps`` steps.
    """

    __slots__ = (
        "begun_s",
        "done",
        "end_levels",
        "first_s",
        "growth_s",
        "levels",
        "num_steps",
        "plan",
        "row_first_s",
    )

    levels: tuple[int, ...]
    end_levels: tuple[int, ...]

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.first_s = self.growth_s = 0.0
        self.num_steps = 1
        self.done = 0  # steps of the row that have ended; it began at begun_s with row_first_s
        self.begun_s = self.row_first_s = 0.0

    def begin(self, now_s: float, levels: tuple[int, ...]) -> None:
        """A new row of the log."""
        self.done, self.begun_s, self.row_first_s = 0, now_s, self.first_s
        self.levels = self.end_levels = levels

    def duration_s(self, steps: int) -> float:
        """Seconds of the next ``steps`` steps."""
        return duration_s(steps, self.first_s, self.growth_s)

    def steps_until(self, elapsed_s: float) -> int:
        """Steps that have begun by then, at least one; a step that ends just then has no successor yet."""
        return steps_until(elapsed_s, self.first_s, self.growth_s)

    def leave_behind(self, steps: int) -> None:
        """Count steps as done and move the pace on."""
        self.first_s += steps * self.growth_s
        self.num_steps -= steps
        self.done += steps


def steps_until(elapsed_s: float, first_s: float, growth_s: float) -> int:
    """Steps that have begun by then, at least one; step j takes ``first_s + j * growth_s``."""
    if growth_s > 0:  # the root of n * first + n (n - 1) / 2 * growth = elapsed
        half = first_s - 0.5 * growth_s
        steps = int(2 * elapsed_s / (half + (half * half + 2 * growth_s * elapsed_s) ** 0.5))
    else:
        steps = int(elapsed_s / first_s)
    half_growth_s = 0.5 * growth_s
    while steps > 1 and (steps - 1) * (first_s + (steps - 2) * half_growth_s) >= elapsed_s:
        steps -= 1
    steps = steps or 1
    while steps * (first_s + (steps - 1) * half_growth_s) < elapsed_s:
        steps += 1
    return steps


def duration_s(steps: int, first_s: float, growth_s: float) -> float:
    """Seconds of so many steps, of which step j takes ``first_s + j * growth_s``."""
    return steps * (first_s + (steps - 1) * (0.5 * growth_s))
