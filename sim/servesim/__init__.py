"""servesim: a simulator of LLM inference serving.

>>> import servesim
>>> result = servesim.simulate("azure-conv-h100")
>>> print(result)
>>> result.requests            # a DataFrame, one row per request
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from servesim.api import (
        Capacity,
        Comparison,
        Explained,
        FleetPlan,
        PairedReplications,
        Replicated,
        Result,
        SensitivityStudy,
        Sweep,
        calibrate,
        capacity,
        check,
        compare,
        explain,
        load,
        plan,
        replicate,
        replicate_compared,
        sensitivity,
        simulate,
        sweep,
        trace,
        validate,
    )
    from servesim.errors import ServesimError

__all__ = [
    "Capacity",
    "Comparison",
    "Explained",
    "FleetPlan",
    "PairedReplications",
    "Replicated",
    "Result",
    "SensitivityStudy",
    "ServesimError",
    "Sweep",
    "calibrate",
    "capacity",
    "check",
    "compare",
    "explain",
    "load",
    "plan",
    "replicate",
    "replicate_compared",
    "sensitivity",
    "simulate",
    "sweep",
    "trace",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that importing servesim costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'servesim' has no attribute '{name}'")
    from servesim import api, errors

    return getattr(errors if name == "ServesimError" else api, name)


def __dir__() -> list[str]:
    return __all__
