"""The commands of the fragmentation lab: where the KV memory goes, and what a prefix cache would find."""

from __future__ import annotations

from math import isfinite
from typing import Annotated

import typer

from servesim.cli.shared import AsJson, Out, Overrides, Scenario, Seed, app, output, overrides, show_result

__all__: list[str] = []


@app.command()
def fragmentation(
    scenario: Scenario,
    allocators: Annotated[
        str,
        typer.Option(
            help="Names with commas between, all when not given. NAME+KEY=VALUE also sets the engine, as in "
            "paged+block_size=32; another scenario may take the place of a name."
        ),
    ] = "",
    replications: Annotated[
        int, typer.Option(min=1, help="Seeds; intervals come from them instead of batches over time.")
    ] = 1,
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes to try, with commas between; none skips them.")
    ] = "1,8,16,32,64,128,256",
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Find the rate at which each breaks the SLO.")
    ] = False,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
) -> None:
    """Show where the KV-cache memory goes with each allocator, what is lost, and a map of the memory."""
    from servesim import api

    changes, sizes = overrides(set_, seed), _block_sizes(block_sizes)
    name = f"{api.load(scenario, changes).scenario.name}-fragmentation"
    wanted = out is not None or not json
    with output(out, name, wanted=wanted) as write:
        report = api.fragmentation(
            scenario,
            overrides=changes,
            allocators=[part for part in allocators.split(",") if part],
            replications=replications,
            block_sizes=sizes,
            capacity=capacity,
            maps=wanted,
            on_run=lambda what: typer.echo(f"Simulating: {what}", err=True),
        )
        show_result(report, json)
        write(report)


@app.command("prefix-cache")
def prefix_cache(
    scenario: Scenario,
    sizes: Annotated[
        str, typer.Option(help="Sizes in tokens with commas between, as 3e6,10e6; multiples of the pool.")
    ] = "",
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
) -> None:
    """Replay the prompts through prefix caches of several sizes and show how much each would find."""
    from servesim import api

    loaded, tokens = api.load(scenario, overrides(set_, seed)), _sizes(sizes)
    wanted = out is not None or not json
    with output(out, f"{loaded.scenario.name}-prefix-cache", wanted=wanted) as write:
        report = api.prefix_cache(loaded, tokens, on_size=_tell_size)
        show_result(report, json)
        write(report)


def _tell_size(tokens: float) -> None:
    size = f"{tokens:,.0f} tokens" if isfinite(tokens) else "a cache without bounds"
    typer.echo(f"Replaying: {size}", err=True)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(float(part)) for part in text.split(",") if part.strip()]
    except (ValueError, OverflowError):
        sizes = [0]
    if not all(size > 0 for size in sizes):
        raise typer.BadParameter(f"{text!r} is not a list of sizes in tokens", param_hint="--sizes")
    return sizes


def _block_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip() and text != "none"]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of block sizes", param_hint="--block-sizes")
    return [int(part) for part in parts]
