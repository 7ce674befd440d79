"""A calibration as text, and as the engine-profile file that a scenario can name."""

from __future__ import annotations

import json

from servesim.analysis.calibrate import Calibration
from servesim.analysis.figures import METRICS

__all__ = ["calibration_text", "calibrations_json", "profile_yaml"]

_SCALARS = ("gpu_time_factor", "bandwidth_factor", "exposed_host_s", "num_gpu_blocks")


def profile_yaml(calibration: Calibration) -> str:
    """The engine profile as YAML; floats to four digits, texts quoted."""
    profile = calibration.profile
    lines = ["# Written by `servesim calibrate`. Name it in a scenario: engine: {profile: this-file.yaml}"]
    for key in ("name", "provenance", "model", "gpu", "tensor_parallel_size", *_SCALARS):
        value = getattr(profile, key)
        if value is not None:
            lines.append(f"{key}: {json.dumps(value)}")
    for key in ("fitted_under", "not_identified", "held_out_error"):
        section = getattr(profile, key)
        if section:
            lines.append(f"{key}:")
            lines += [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in section.items()]
    return "\n".join(lines) + "\n"


def calibration_text(calibration: Calibration) -> str:
    """The scalars with their errors, those that cannot be told with the reason, and the held-out figures."""
    profile = calibration.profile
    lines = [f"{profile.name}: fitted to {profile.provenance}"]
    for name in _SCALARS:
        value = getattr(profile, name)
        if value is not None:
            error = calibration.standard_errors[name]
            share = "of a mean step" if name == "exposed_host_s" else "of it"
            lines.append(f"  {name:<18}{value:<12g} standard error {error:.1%} {share}")
    lines += [f"  {name:<18}not fitted   {reason}" for name, reason in profile.not_identified.items()]
    lines.append(f"Held out ({calibration.judged_on}), ln(simulated / real):")
    lines.append(f"  {'':<26}{'before':>8}{'after':>8}")
    for metric, before in calibration.before.items():
        label = METRICS[metric].label if metric in METRICS else metric
        lines.append(f"  {label:<26}{before + 0.0:>+8.3f}{calibration.after[metric] + 0.0:>+8.3f}")
    return "\n".join(lines) + "\n"


def calibrations_json(calibrations: dict[str, Calibration]) -> str:
    """Profiles by file name, with the standard errors and the errors before and after, as one object."""
    plain = {
        file: {
            "profile": one.profile.model_dump(mode="json", exclude_none=True),
            "standard_errors": one.standard_errors,
            "judged_on": one.judged_on,
            "before": one.before,
            "after": one.after,
        }
        for file, one in calibrations.items()
    }
    return json.dumps(plain, indent=2) + "\n"
