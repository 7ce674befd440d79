"""The command that plans a fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from servesim.cli.shared import (
    AsJson,
    Jobs,
    Limits,
    Out,
    Overrides,
    Prices,
    Scenario,
    Seed,
    app,
    load_with_limits,
    output,
    overrides,
    prices_of,
    progress_of,
    show_result,
)
from servesim.errors import blamed_on

__all__ = ["plan"]


@app.command()
def plan(
    scenario: Scenario,
    rate: Annotated[float, typer.Option(min=1e-6, help="Requests per second that the fleet must serve.")],
    gpus: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="Kinds of GPU; the scenario's when not given.")
    ] = None,
    tensor_parallel: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="GPUs of a replica; the scenario's when not given."),
    ] = None,
    slo: Limits = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V,...", help="An engine setting to try values of; may be repeated."),
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0, metavar="USD", help="Most dollars per hour.")] = None,
    price: Prices = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    jobs: Jobs = None,
) -> None:
    """Find how many of which GPU serve a rate within the SLO, at what price, and what breaks first."""
    from servesim import api

    loaded, changes = load_with_limits(scenario, overrides(set_, seed), slo)
    name = loaded.scenario.name
    axes = [
        f"hardware.gpu={gpus or loaded.scenario.hardware.gpu}",
        f"engine.tensor_parallel_size={tensor_parallel or loaded.scenario.engine.tensor_parallel_size}",
        *(vary or ()),
    ]
    options = {
        "hardware.gpu": ("--gpus", gpus),
        "engine.tensor_parallel_size": ("--tensor-parallel", tensor_parallel),
    }
    given = {path: option for path, (option, values) in options.items() if values}
    with output(out, f"{name}-plan", wanted=out is not None or not json) as write:
        with progress_of(name, "trials of this round", 1) as progress, blamed_on(given):
            result = api.plan(
                scenario,
                rate,
                axes,
                overrides=changes,
                budget_usd_per_hour=budget,
                prices_usd_per_hour=prices_of(price, loaded),
                jobs=jobs,
                on_trial=progress,
            )
        show_result(result, json)
        write(result)
