"""Progress of a simulation, or of many, on stderr, once it has taken two seconds."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress"]

_PATIENCE_S = 2.0
_LINES_EVERY_S = 10.0


class Progress:
    """A bar with the time left; silent where stderr is not a terminal, but for a line every ten seconds."""

    def __init__(self, name: str, what: str = "requests", every: int = 64) -> None:
        """``what`` is counted; ``every``: how many of them between two looks at the clock."""
        self._name, self._what, self._every = name, what, every
        self._begin = self._said = self._last = self._round = time.monotonic()
        self._ended, self._before = math.inf, 0
        self._bar: Bar | None = None

    def update(self, ended: int, total: int, now_s: float = 0.0) -> None:
        """How many have ended out of all, no more than before in a new round; ``now_s`` is simulated time."""
        if ended % self._every:
            return
        now = time.monotonic()
        if ended <= self._ended:  # a round begins; those that a sweep found in its folder took no time
            self._round, self._before = self._last, ended - self._every
            if self._bar is not None:
                self._bar.reset(self._bar.tasks[0].id, total=total)
        self._ended, self._last = ended, now
        if now - self._begin < _PATIENCE_S:
            return
        if not sys.stderr.isatty():
            if now - self._said >= _LINES_EVERY_S:
                self._said = now
                left_s = (now - self._round) / (ended - self._before) * (total - ended)
                line = f"{self._name}: {ended:,} of {total:,} {self._what}, {left_s:.0f} s left"
                print(line, file=sys.stderr, flush=True)
            return
        if self._bar is None:
            # Heavy, and needed by few: most runs end before they lose anybody's patience.
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn(f"{{task.completed:,.0f}} of {{task.total:,.0f}} {self._what}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._name, total=total)
        self._bar.update(self._bar.tasks[0].id, completed=ended, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
