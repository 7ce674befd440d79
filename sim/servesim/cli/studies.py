"""The commands that simulate many times: replications of run and compare, and sweeps."""

from __future__ import annotations

from pathlib import Path
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

__all__ = ["compare_replicated", "run_replicated"]


def run_replicated(
    scenario: str, changes: list[str], json: bool, out: Path | None, count: int, jobs: int | None
) -> None:
    """``servesim run --replications``."""
    from servesim import api

    loaded = api.load(scenario, changes)
    name = loaded.scenario.name
    with output(out, f"{name}-replicated", wanted=out is not None or not json) as write:
        with progress_of(name, "replications", 1) as progress:
            result = api.replicate(loaded, count, jobs=jobs, on_run=progress)
        show_result(result, json)
        write(result)


def compare_replicated(
    a: str, b: str, changes: list[str], json: bool, out: Path | None, count: int, jobs: int | None
) -> None:
    """``servesim compare --replications``."""
    from servesim import api

    pair = api.load(a, changes), api.load(b, changes)
    name = "-against-".join(each.scenario.name for each in pair)
    with output(out, f"{name}-replicated", wanted=out is not None or not json) as write:
        with progress_of(name, "replications", 1) as progress:
            result = api.replicate_compared(*pair, count, jobs=jobs, on_run=progress)
        show_result(result, json)
        write(result)


@app.command()
def sweep(
    scenario: Scenario,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V,V,...", help="Values to vary; may be repeated. With --latin also LOW:HIGH."
        ),
    ] = None,
    latin: Annotated[
        int | None,
        typer.Option(min=2, help="Draw this many points of a Latin hypercube, not the whole grid."),
    ] = None,
    replications: Annotated[
        int, typer.Option(min=1, help="Simulate each point this many times, and give intervals.")
    ] = 1,
    figure: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Figure to print, such as p99_ttft_ms; may be repeated."),
    ] = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    jobs: Jobs = None,
    backend: Annotated[str, typer.Option(help="local, or dask: an existing cluster.")] = "local",
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The Dask cluster's scheduler, tcp://HOST:PORT.")
    ] = None,
) -> None:
    """Simulate a scenario over a grid of values. An interrupted sweep goes on when it is asked for again."""
    from servesim import api
    from servesim.report.folder import write_files
    from servesim.report.sweep import check_figures

    check_figures(figure or ())
    changes = overrides(set_, seed)
    name = api.load(scenario, changes).scenario.name
    folder = out or Path("out") / f"{name}-sweep"
    try:
        with progress_of(name, "points", 1) as progress:
            result = api.sweep(
                scenario,
                vary or [],
                out=folder,
                overrides=changes,
                latin=latin,
                replications=replications,
                jobs=jobs,
                backend=backend,
                scheduler=scheduler,
                on_point=progress,
            )
    except KeyboardInterrupt:
        typer.echo(f"Stopped. Finished points are in {folder}; the same command goes on from them.", err=True)
        raise typer.Exit(130) from None
    typer.echo(result.to_json() if json else result.text(figure or ()), nl=False)
    files = result.files()
    write_files(folder, files)
    typer.echo(f"Wrote {folder}{'/'}{{{','.join(files)}}}", err=True)


@app.command()
def sensitivity(
    scenario: Scenario,
    change: Annotated[float, typer.Option(help="Share by which every input is lowered and raised.")] = 0.1,
    replications: Annotated[
        int, typer.Option(min=2, help="Seeds under which each variant is simulated.")
    ] = 5,
    figure: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Figure to show, such as p99_ttft_ms; may be repeated."),
    ] = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    jobs: Jobs = None,
) -> None:
    """Show what the results hang on, how sure they are and why, and how likely the SLO is met."""
    from servesim import api
    from servesim.report.sweep import check_figures

    check_figures(figure or ())
    loaded = api.load(scenario, overrides(set_, seed))
    name = loaded.scenario.name
    with output(out, f"{name}-sensitivity", wanted=out is not None or not json) as write:
        with progress_of(name, "simulations", 1) as progress:
            result = api.sensitivity(loaded, replications, change=change, jobs=jobs, on_run=progress)
        typer.echo(result.to_json() if json else result.text(figure or ()), nl=False)
        write(result)
