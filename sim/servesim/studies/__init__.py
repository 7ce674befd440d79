"""Studies of many runs, for notebooks and commands; a module for each."""

from __future__ import annotations

from servesim.studies.capacities import Capacity, capacity
from servesim.studies.explanations import Explained, explain
from servesim.studies.plans import FleetPlan, plan
from servesim.studies.replications import PairedReplications, Replicated, replicate, replicate_compared
from servesim.studies.sensitivities import SensitivityStudy, sensitivity
from servesim.studies.sweeps import Sweep, sweep

__all__ = [
    "Capacity",
    "Explained",
    "FleetPlan",
    "PairedReplications",
    "Replicated",
    "SensitivityStudy",
    "Sweep",
    "capacity",
    "explain",
    "plan",
    "replicate",
    "replicate_compared",
    "sensitivity",
    "sweep",
]
