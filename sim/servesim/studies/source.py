"""What every study takes and refuses."""

from __future__ import annotations

from pathlib import Path

from servesim.config.load import LoadedScenario
from servesim.errors import ConfigError, Problem

__all__ = ["Source", "refuse_single"]

Source = LoadedScenario | str | Path


def refuse_single(replications: int) -> None:
    """One replication has no interval."""
    if replications < 2:
        step = "ask for two or more, ten as a rule"
        raise ConfigError(Problem("an interval needs replications", got=str(replications), next_step=step))
