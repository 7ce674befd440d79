"""The commands that simulate, compare, check and look up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from servesim.cli.shared import (
    AsJson,
    Jobs,
    Out,
    Overrides,
    Replications,
    Scenario,
    Seed,
    app,
    output,
    overrides,
    progress_of,
    show_result,
    step_trace_file,
    stoppable,
)
from servesim.cli.studies import compare_replicated, run_replicated

if TYPE_CHECKING:
    from servesim.results import Result

__all__: list[str] = []


@app.command()
def run(
    scenario: Scenario,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    replications: Replications = None,
    jobs: Jobs = None,
    step_trace: Annotated[
        Path | None, typer.Option(help="Also write what was scheduled in every step to this file.")
    ] = None,
    expect: Annotated[
        bool,
        typer.Option("--expect", help="Check what the scenario expects; exit code 1 if missed."),
    ] = False,
) -> None:
    """Simulate a scenario; print the result and write a report. With --json only --out writes files."""
    from servesim import api

    if replications is not None:
        if step_trace is not None or expect:
            raise typer.BadParameter("--step-trace and --expect are of one run: leave --replications out")
        run_replicated(scenario, overrides(set_, seed), json, out, replications, jobs)
        return
    from servesim.report.expectations import expectations_text
    from servesim.report.terminal import warnings_text

    loaded = api.load(scenario, overrides(set_, seed))
    if expect:
        api.check_expect(loaded)
    name, wanted = loaded.scenario.name, out is not None or not json
    with output(out, name, wanted=wanted) as write:
        with stoppable() as stop, progress_of(name) as progress, step_trace_file(step_trace) as trace:
            result = api.simulate(
                loaded, progress=progress, stop=stop, step_trace=trace, split_latencies=wanted
            )
        if json:
            typer.echo(result.to_json(expect=expect), nl=False)
        else:
            show_result(result, json)
            typer.echo(warnings_text(result.summary), nl=False)
            if expect:
                typer.echo(expectations_text(result.expectations), nl=False)
        write(result)
    _tell_if_nobody_was_served(result)
    if result.run.log.interrupted:
        raise typer.Exit(130)
    if expect and not all(finding.met for finding in result.expectations):
        raise typer.Exit(1)


def _tell_if_nobody_was_served(result: Result) -> None:
    """On stderr, too: who takes only the figures from stdout would find none, and no reason."""
    of = result.summary
    if not of.completed:
        total = of.failed + of.unfinished
        text = f"servesim: {of.name}: not one of {total:,} requests was completed, so most figures are n/a"
        typer.echo(f"{text} -> the warnings in the result say why", err=True)


Compared = Annotated[str, typer.Argument(help="A scenario, or the result.json of a finished run.")]


@app.command()
def compare(
    a: Compared,
    b: Compared,
    more: Annotated[list[str] | None, typer.Argument(help="Further ones.")] = None,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
    replications: Replications = None,
    jobs: Jobs = None,
) -> None:
    """Show where scenarios, simulated on the same random numbers, and finished runs differ."""
    from servesim import api

    sources = [a, b, *(more or ())]
    changes = overrides(set_, seed)
    if replications is not None:
        if more or any(api.is_finished(source) for source in sources):
            raise typer.BadParameter("takes two scenarios, no finished runs", param_hint="--replications")
        compare_replicated(a, b, changes, json, out, replications, jobs)
        return
    from servesim.report.terminal import warnings_text

    loaded = [source if api.is_finished(source) else api.load(source, changes) for source in sources]
    names = [Path(s).parent.name or "result" if isinstance(s, str) else s.scenario.name for s in loaded]
    with output(out, "-against-".join(names), wanted=out is not None or not json) as write:
        if more or any(isinstance(s, str) for s in loaded):
            many = api.compare_many(loaded)
            show_result(many, json)
            write(many)
            return
        results = []
        with stoppable() as stop:
            for each, name in zip(loaded, names, strict=True):
                with progress_of(name) as progress:
                    results.append(api.simulate(each, progress=progress, stop=stop))
        comparison = api.Comparison(*results)
        show_result(comparison, json)
        if not json:
            for name, result in zip(names, results, strict=True):
                typer.echo(warnings_text(result.summary, name), nl=False)
        write(comparison)
    for result in results:
        _tell_if_nobody_was_served(result)
    if any(result.run.log.interrupted for result in results):
        raise typer.Exit(130)


@app.command()
def check(scenario: Scenario, set_: Overrides = None, seed: Seed = None) -> None:
    """Validate a scenario, its files and its memory without simulating."""
    from servesim import api
    from servesim.report.startup import startup_lines

    loaded, memory, requests = api.check(scenario, overrides=overrides(set_, seed))
    typer.echo(
        f"{loaded.scenario.name}: ok; {requests:,} requests, {memory.num_gpu_blocks:,} KV blocks, "
        f"{memory.kv_cache_tokens:,} KV tokens"
    )
    for line in startup_lines(memory):
        typer.echo(line)


@app.command()
def trace(
    settings: Annotated[Path, typer.Option(help="JSON or YAML file with the scheduler's settings.")],
    requests: Annotated[Path, typer.Option(help="File with one request per line, as JSON.")],
    version: Annotated[str, typer.Option(help="vLLM version to follow.")] = "0.26",
    out: Annotated[Path | None, typer.Option(help="File for the trace; stdout when not given.")] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Add block tables.")] = False,
) -> None:
    """Run a bare scheduler on a list of requests and write what it schedules in every step."""
    from servesim import api
    from servesim.report.step_trace import line

    lines = api.trace(settings, requests, version=version, blocks=blocks)
    if out is None:
        for record in lines:
            typer.echo(line(record), nl=False)
        return
    with step_trace_file(out) as write:
        for record in lines:
            assert write is not None
            write(record)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="gpus, links, models or scenarios.")], json: AsJson = False
) -> None:
    """List the GPUs, models or scenarios that a scenario can name."""
    from servesim.report.catalog import list_json, list_text

    typer.echo(list_json(kind) if json else list_text(kind), nl=False)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or path of a GPU, a model or a scenario.")],
    json: AsJson = False,
) -> None:
    """Show what is known about a GPU, a model or a scenario, with sources."""
    from servesim.report.catalog import show_json, show_text

    typer.echo(show_json(name) if json else show_text(name), nl=False)


@app.command()
def fit(
    gpu: Annotated[str, typer.Argument(help="Name or path of a GPU.")],
    measurements: Annotated[
        Path | None, typer.Option(help="A CSV file of kernel times, instead of the shipped table.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the coefficients into the GPU's file.")] = False,
    json: AsJson = False,
) -> None:
    """Fit a GPU's kernel efficiencies to measured times; needs the extra servesim[fit]."""
    from servesim import api
    from servesim.report.fitted import fit_json, fit_text, write_block

    path, fitted = api.fit(gpu, measurements)
    typer.echo(fit_json(fitted) if json else fit_text(fitted), nl=False)
    if write:
        write_block(fitted, path)
        typer.echo(f"Wrote {path}", err=True)


@app.command()
def validate(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of recorded runs; the shipped ones when none is given."),
    ] = None,
    json: AsJson = False,
    out: Out = None,
) -> None:
    """Replay recorded runs of real servers and show how wrong the simulation is, the worst first."""
    from servesim import api

    with output(out, "validation", wanted=out is not None or not json) as write:
        with progress_of("validate", "runs", 1) as progress:
            accuracy = api.validate(
                folders or (), on_run=lambda name, done, total: progress(done, total, 0.0)
            )
        show_result(accuracy, json)
        write(accuracy)


@app.command()
def calibrate(
    source: Annotated[
        Path, typer.Argument(help="A folder of recorded runs, or a detailed result of `vllm bench serve`.")
    ],
    scenario: Annotated[
        str | None,
        typer.Option(help="What served a benchmark: a scenario file or name; only a JSON needs it."),
    ] = None,
    set_: Overrides = None,
    json: AsJson = False,
    out: Out = None,
) -> None:
    """Fit a server's few physical scalars to one measurement and write an engine profile for scenarios."""
    from servesim import api

    with output(out, "calibration", wanted=out is not None or not json) as write:
        calibrations = api.calibrate(source, scenario, overrides=overrides(set_, None))
        show_result(calibrations, json)
        write(calibrations)


@app.command()
def schema() -> None:
    """Print the JSON schema of scenario files."""
    from servesim.config.schema import schema_text

    typer.echo(schema_text(), nl=False)
