"""The command that says how much traffic a scenario takes."""

from __future__ import annotations

from servesim.cli.shared import (
    AsJson,
    Jobs,
    Limits,
    Out,
    Overrides,
    Scenario,
    Seed,
    app,
    load_with_limits,
    output,
    overrides,
    progress_of,
    show_result,
)

__all__ = ["capacity"]


@app.command()
def capacity(
    scenario: Scenario,
    slo: Limits = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    jobs: Jobs = None,
) -> None:
    """Find how much of its traffic a scenario can take within the SLO, and what breaks first."""
    from servesim import api

    loaded, _ = load_with_limits(scenario, overrides(set_, seed), slo)
    name = loaded.scenario.name
    with output(out, f"{name}-capacity", wanted=out is not None or not json) as write:
        with progress_of(name, "trials of this rate", 1) as progress:
            result = api.capacity(loaded, jobs=jobs, on_trial=progress)
        show_result(result, json)
        write(result)
