"""Engine profiles: what a calibration has found out about one deployment, in a file for scenarios to name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from servesim.config.load import LoadedScenario, parse, read_yaml
from servesim.config.problems import locate
from servesim.config.record import Record
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.errors import ConfigError, Problem

__all__ = ["SETTINGS_OF", "EngineProfile", "load_engine_profile", "profiled_engine"]

Setting = Literal[
    "async_scheduling",
    "gpu_memory_utilization",
    "kv_cache_dtype",
    "quantization",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
]
SETTINGS_OF: dict[str, tuple[Setting, ...]] = {
    "exposed_host_s": ("async_scheduling",),
    "num_gpu_blocks": (
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "quantization",
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
    ),
}
"""Settings under which a fitted scalar means what it meant: exposed host time is another thing without
async_scheduling, and the pool is what the others leave."""

_Misfit = tuple[tuple[str, ...], Problem]
_SCALARS = ("gpu_time_factor", "bandwidth_factor", "exposed_host_s", "num_gpu_blocks")


class EngineProfile(Record):
    """Scalars fitted to one server; what is left out keeps its uncalibrated value."""

    name: str = Field(min_length=1)
    provenance: str = Field(min_length=1)
    """Which measurements it was fitted to, and on what part of them."""
    model: str | None = None
    """Refuse to serve another model; remove the line to carry the profile over at your own risk."""
    gpu: str | None = None
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    fitted_under: dict[Setting, bool | int | float | str] = Field(default_factory=dict)
    """Settings of the server that scalars of this profile hang on; under others they are refused."""
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


def profiled_engine(loaded: LoadedScenario, engine: EngineConfig) -> EngineConfig:
    """The scenario's resolved engine with the values of the profile it names; what it says itself wins.

    Raises ConfigError when the profile belongs to another deployment, other settings or another law.
    """
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
    own_pool = engine.num_gpu_blocks_override is not None or engine.kv_cache_memory_bytes is not None
    said = law.model_fields_set | ({"num_gpu_blocks"} if own_pool else set())
    found = profile.model_dump(include=set(_SCALARS), exclude_none=True)
    values = {key: value for key, value in found.items() if key not in said}
    problems = [*_another_deployment(loaded, profile), *_other_settings(engine, profile, values)]
    if problems:
        raise ConfigError(locate(problem, tree, path_of, str(path)) for path_of, problem in problems)
    blocks = values.pop("num_gpu_blocks", engine.num_gpu_blocks_override)
    update = {"step_time": law.model_copy(update=values), "num_gpu_blocks_override": blocks}
    return engine.model_copy(update=update)


def _another_deployment(loaded: LoadedScenario, profile: EngineProfile) -> Iterator[_Misfit]:
    scenario = loaded.scenario
    served = {
        "model": Path(scenario.model).name.removesuffix(".yaml"),
        "gpu": Path(scenario.hardware.gpu).name.removesuffix(".yaml"),
        "tensor_parallel_size": scenario.engine.tensor_parallel_size,
    }
    step = "calibrate on this deployment, or remove the line to carry the profile over"
    for key, mine in served.items():
        yield from _misfit((key,), getattr(profile, key), mine, step)


def _other_settings(
    engine: EngineConfig, profile: EngineProfile, scalars: Iterable[str]
) -> Iterator[_Misfit]:
    for scalar in scalars:
        step = f"calibrate under this setting, or remove {scalar} from the profile"
        for key in SETTINGS_OF.get(scalar, ()):
            yield from _misfit(
                ("fitted_under", key), profile.fitted_under.get(key), getattr(engine, key), step
            )


def _misfit(path: tuple[str, ...], fitted: object, mine: object, step: str) -> Iterator[_Misfit]:
    if fitted is not None and fitted != mine:
        problem = f"was fitted with {path[-1]} {fitted}"
        yield path, Problem(problem, got=f"a scenario with {mine}", next_step=step)
