"""The command that says why a percentile is what it is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from servesim.cli.shared import (
    AsJson,
    Jobs,
    Out,
    Overrides,
    Prices,
    Scenario,
    Seed,
    app,
    output,
    overrides,
    prices_of,
    progress_of,
    show_result,
)

__all__: list[str] = []


class Metric(StrEnum):
    """What can be explained."""

    TTFT = "ttft_p99"
    TPOT = "tpot_p99"
    E2E = "e2e_p99"


@app.command()
def explain(
    scenario: Scenario,
    metric: Annotated[Metric, typer.Option(help="The figure to explain.")] = Metric.TTFT,
    price: Prices = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    jobs: Jobs = None,
) -> None:
    """Say where a tail latency comes from, and which settings or purchases would help, each one tried."""
    from servesim import api

    loaded = api.load(scenario, overrides(set_, seed))
    name, prices = loaded.scenario.name, prices_of(price, loaded)
    with output(out, f"{name}-explained", wanted=out is not None or not json) as write:
        with progress_of(name, "simulations", 1) as progress:
            result = api.explain(loaded, metric.value, prices_usd_per_hour=prices, jobs=jobs, on_run=progress)
        show_result(result, json)
        write(result)
