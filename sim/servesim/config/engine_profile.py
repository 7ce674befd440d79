"""Engine profiles: what a calibration has found out about one deployment, in a file for scenarios to name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from servesim.config.load import LoadedScenario, parse, read_yaml
from servesim.config.problems import locate
from servesim.config.record import Record
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.errors import ConfigError, Problem

__all__ = ["EngineProfile", "load_engine_profile", "profiled_engine"]


class EngineProfile(Record):
    """Scalars fitted to one server; what is left out keeps its uncalibrated value."""

    name: str = Field(min_length=1)
    provenance: str = Field(min_length=1)
    """Which measurements it was fitted to, and on what part of them."""
    model: str | None = None
    """Refuse to serve another model; remove the line to carry the profile over at your own risk."""
    gpu: str | None = None
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    gpu_time_factor: float | None = Field(default=None, ge=0.1, le=10)
    bandwidth_factor: float | None = Field(default=None, ge=0.1, le=10)
    exposed_host_s: float | None = Field(default=None, ge=0, le=10)
    num_gpu_blocks: int | None = Field(default=None, ge=2)
    not_identified: dict[str, str] = Field(default_factory=dict)
    """Scalars that the measurements could not tell, and why."""
    held_out_error: dict[str, float] = Field(default_factory=dict)
    """ln(simulated / real) of each metric on the measurements that were kept out of the fit."""


def load_engine_profile(path: Path) -> EngineProfile:
    """The profile of a file; raises ConfigError with every problem found."""
    return parse(EngineProfile, read_yaml(path), path)


def profiled_engine(loaded: LoadedScenario) -> EngineConfig:
    """The scenario's engine with the values of the profile it names; what the scenario says itself wins.

    Raises ConfigError when the profile belongs to another deployment or to another law.
    """
    engine = loaded.scenario.engine
    if engine.profile is None:
        return engine
    path = loaded.find("profiles", engine.profile)
    tree = read_yaml(path)
    profile = parse(EngineProfile, tree, path)
    law = engine.step_time
    if not isinstance(law, OperatorStepTime):
        raise ConfigError(
            Problem(
                "an engine profile needs the law of operators",
                path="engine.profile",
                got="step_time.law linear",
                next_step="remove engine.profile, or engine.step_time",
            )
        )
    _refuse_another_deployment(loaded, profile, lambda key, problem: locate(problem, tree, (key,), str(path)))
    found = profile.model_dump(include={"gpu_time_factor", "bandwidth_factor", "exposed_host_s"})
    values = {
        key: value for key, value in found.items() if value is not None and key not in law.model_fields_set
    }
    update: dict[str, Any] = {"step_time": law.model_copy(update=values)}
    own_pool = engine.num_gpu_blocks_override is not None or engine.kv_cache_memory_bytes is not None
    if profile.num_gpu_blocks is not None and not own_pool:
        update["num_gpu_blocks_override"] = profile.num_gpu_blocks
    return engine.model_copy(update=update)


def _refuse_another_deployment(
    loaded: LoadedScenario, profile: EngineProfile, at: Callable[[str, Problem], Problem]
) -> None:
    scenario = loaded.scenario
    served = {
        "model": Path(scenario.model).name.removesuffix(".yaml"),
        "gpu": Path(scenario.hardware.gpu).name.removesuffix(".yaml"),
        "tensor_parallel_size": scenario.engine.tensor_parallel_size,
    }
    fitted = {key: getattr(profile, key) for key in served}
    problems = [
        at(
            key,
            Problem(
                f"was fitted with {key} {fitted[key]}",
                got=f"a scenario with {served[key]}",
                next_step="calibrate on this deployment, or remove the line to carry the profile over",
            ),
        )
        for key in served
        if fitted[key] is not None and fitted[key] != served[key]
    ]
    if problems:
        raise ConfigError(problems)
