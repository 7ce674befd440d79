"""The command that says how much traffic a scenario takes."""

from __future__ import annotations

from typing import Annotated

import typer

from servesim.cli.shared import (
    AsJson,
    Jobs,
    Out,
    Overrides,
    Scenario,
    Seed,
    app,
    output,
    overrides,
    progress_of,
    show_result,
)
from servesim.errors import blamed_on

__all__ = ["capacity"]


@app.command()
def capacity(
    scenario: Scenario,
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=SECONDS", help="A limit, such as ttft_p99_s=0.5; may be repeated."),
    ] = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    jobs: Jobs = None,
) -> None:
    """Find how much of its traffic a scenario can take within the SLO, and what breaks first."""
    from servesim import api, studies

    changes = [*overrides(set_, seed), *(f"slo.{text}" for text in slo or ())]
    with blamed_on({"slo": "--slo"} if slo else {}):
        loaded = api.load(scenario, changes)
    name = loaded.scenario.name
    with output(out, f"{name}-capacity", wanted=out is not None or not json) as write:
        with progress_of(name, "trials of this rate", 1) as progress:
            result = studies.capacity(loaded, jobs=jobs, on_trial=progress)
        show_result(result, json)
        write(result)
