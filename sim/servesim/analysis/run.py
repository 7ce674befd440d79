"""One finished simulation with everything that led to it: what analysis and reports start from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servesim.config.engine import EngineConfig
from servesim.config.scenario import Scenario
from servesim.engine.events import Log

if TYPE_CHECKING:
    from servesim.config.profiles import GpuProfile, ModelProfile
    from servesim.cost.memory import MemoryBudget

__all__ = ["Run"]


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal replicas of a fleet whose pools differ."""

    name: str
    serves: str
    replicas: int
    gpus_per_replica: int
    gpu: GpuProfile
    engine: EngineConfig
    """Resolved."""
    memory: MemoryBudget


@dataclass(frozen=True, slots=True)
class Run:
    """A log, and what was simulated to get it; ``scenario.engine`` has every default filled in.

    With ``pools`` the GPU, the engine and the memory are those of the first.
    """

    scenario: Scenario
    gpu: GpuProfile
    model: ModelProfile
    memory: MemoryBudget
    log: Log
    pools: tuple[Pool, ...] = ()

    @property
    def stands_for(self) -> float:
        """Replicas for which each simulated one stands: what one attains is theirs times this."""
        return self.scenario.hardware.replicas / self.scenario.hardware.num_simulated

    @property
    def config_hash(self) -> str:
        """Twelve hex digits that change with any value of the scenario or of a profile.

        The seed is a value of the scenario; what it expects is none. The content of a trace file is not
        covered, only its name.
        """
        parts = {
            name: record.model_dump(mode="json", exclude={"expect"})
            for name, record in (("scenario", self.scenario), ("gpu", self.gpu), ("model", self.model))
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
