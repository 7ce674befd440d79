"""A prepared deployment whose physical scalars can be moved, as a calibration does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from servesim.analysis.fit import Fit
from servesim.analysis.metrics import summarise
from servesim.analysis.run import Run
from servesim.analysis.simulation import Prepared, prepare, run_prepared
from servesim.config.engine_profile import SETTINGS_OF, EngineProfile
from servesim.config.scenario import EngineConfig, OperatorStepTime
from servesim.cost.host import host_profile
from servesim.errors import CalibrationError, Problem

__all__ = ["SCALARS", "Deployment"]

SCALARS = ("gpu_time_factor", "exposed_host_s", "bandwidth_factor", "num_gpu_blocks")
"""What can be fitted, in the order in which it is preferred when two cannot be told apart."""
_WIDE = math.log(5)


class Deployment:
    """A prepared scenario whose scalars can be moved: 0 leaves one where it is, 0.1 raises it by a tenth.

    ``exposed_host_s`` moves by shares of the mean step; the pool only when the scenario does not give it.
    """

    def __init__(self, prepared: Prepared) -> None:
        law = prepared.engine.step_time
        if not isinstance(law, OperatorStepTime):
            problem = Problem(
                "the linear law has no scalars to fit",
                path="engine.step_time.law",
                got="linear",
                next_step="remove engine.step_time from the scenario",
            )
            raise CalibrationError(problem)
        self._prepared, self._law = prepared, law
        host = host_profile(prepared.engine)
        self._host_s = host.residual_s if host.hidden else host.fixed_s
        self._known: dict[tuple[float, ...], Run] = {}
        self.names = [name for name in SCALARS if name != "num_gpu_blocks" or not prepared.memory.overridden]
        self._mean_step_s = summarise(self.run(dict.fromkeys(self.names, 0.0))).load.mean_step_s
        self.limits = {
            "gpu_time_factor": (-_WIDE, _WIDE),
            "exposed_host_s": (-self._host_s / self._mean_step_s - 1e-9, 1.0),
            "bandwidth_factor": (-_WIDE, math.log(1 / self._largest_share())),
            "num_gpu_blocks": (max(-_WIDE, self._smallest_pool()), _WIDE),
        }

    def _smallest_pool(self) -> float:
        """ln of the smallest pool that an engine starts with over this one."""
        memory, engine = self._prepared.memory, self._prepared.engine
        needed = memory.kv_layout.blocks_per_request(engine.max_model_len or 1) + 1
        return math.log((needed + 1) / memory.num_gpu_blocks)

    def _largest_share(self) -> float:
        efficiency = self._prepared.gpu.efficiency
        shares = [law.memory for law in efficiency.gemm.values()]
        return max(shares + [law.memory for law in efficiency.decode_attention.values()])

    def scalars(self, values: dict[str, float]) -> dict[str, Any]:
        """The scalars themselves."""
        law = self._law
        found: dict[str, Any] = {
            "gpu_time_factor": law.gpu_time_factor * math.exp(values["gpu_time_factor"]),
            "bandwidth_factor": law.bandwidth_factor * math.exp(values["bandwidth_factor"]),
            "exposed_host_s": max(0.0, self._host_s),
        }
        if values["exposed_host_s"]:
            moved_s = self._host_s + values["exposed_host_s"] * self._mean_step_s
            found["exposed_host_s"] = max(0.0, moved_s)
        if "num_gpu_blocks" in values:
            blocks = self._prepared.memory.num_gpu_blocks * math.exp(values["num_gpu_blocks"])
            found["num_gpu_blocks"] = max(2, round(blocks))
        return found

    def run(self, values: dict[str, float]) -> Run:
        """The simulation with these values; the last few are remembered."""
        key = tuple(values[name] for name in self.names)
        if key not in self._known:
            if len(self._known) > 4:
                self._known.pop(next(iter(self._known)))
            self._known[key] = run_prepared(self._moved(values))
        return self._known[key]

    def moved_engine(self, values: dict[str, float]) -> EngineConfig:
        """The engine with these values, its pool apart."""
        scalars = {name: value for name, value in self.scalars(values).items() if name != "num_gpu_blocks"}
        return self._prepared.engine.model_copy(update={"step_time": self._law.model_copy(update=scalars)})

    def _moved(self, values: dict[str, float]) -> Prepared:
        blocks = self.scalars(values).get("num_gpu_blocks")
        engine = self.moved_engine(values)
        if not values.get("num_gpu_blocks"):
            return replace(self._prepared, engine=engine)
        scenario = self._prepared.loaded.scenario
        engine = engine.model_copy(update={"num_gpu_blocks_override": blocks})
        loaded = replace(self._prepared.loaded, scenario=scenario.model_copy(update={"engine": engine}))
        return prepare(loaded, self._prepared.workload)

    def refuse_if_nothing(self, fit: Fit) -> None:
        """Raise CalibrationError when no scalar could be told."""
        if not fit.standard_errors:
            raise CalibrationError(
                Problem(f"cannot be told from this run: {self._reason(name, *why)}", path=name)
                for name, why in fit.untold.items()
            )

    def profile(self, fit: Fit, provenance: str, name: str) -> EngineProfile:
        """The fitted scalars, to four digits, as an engine profile."""
        scalars, prepared = self.scalars(fit.values), self._prepared
        told = {key: float(f"{scalars[key]:.4g}") for key in SCALARS if key in fit.standard_errors}
        settings = [setting for scalar in told for setting in SETTINGS_OF.get(scalar, ())]
        blocks = told.pop("num_gpu_blocks", None)
        return EngineProfile(
            name=name,
            provenance=provenance,
            model=prepared.model.name,
            gpu=prepared.gpu.name,
            tensor_parallel_size=prepared.engine.tensor_parallel_size,
            fitted_under={setting: getattr(prepared.engine, setting) for setting in settings},
            num_gpu_blocks=None if blocks is None else round(scalars["num_gpu_blocks"]),
            not_identified={key: self._reason(key, *fit.untold[key]) for key in SCALARS if key in fit.untold},
            **told,
        )

    def _reason(self, name: str, why: str, other: str) -> str:
        if why == "alike":
            return f"moves the same latencies as {other}: record a run whose batches vary more"
        if why == "needless":
            return "the latencies are explained without it: it keeps its uncalibrated value"
        if why == "vague":
            return "its standard error is above 15 %: record a longer run, or one at another load"
        return _STILL[name]


_STILL = {
    "gpu_time_factor": "no latency follows it: the host, not the GPU, sets the pace",
    "exposed_host_s": "no latency follows it: a step is too long for the host to show",
    "bandwidth_factor": "no latency follows it: no step waits for memory",
    "num_gpu_blocks": "no latency follows it: the KV pool never filled",
}
