"""The commands. Results go to stdout, the same bytes for the same seed; everything else goes to stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from servesim.errors import ServesimError

if TYPE_CHECKING:
    from servesim.api import (
        Accuracy,
        Calibrations,
        Comparison,
        FinishedComparison,
        FragmentationReport,
        PrefixCacheReport,
        Result,
    )

    Report = (
        Accuracy
        | Calibrations
        | Comparison
        | FinishedComparison
        | FragmentationReport
        | PrefixCacheReport
        | Result
    )

__all__ = ["app", "main"]

app = typer.Typer(
    name="servesim",
    help="Simulate LLM inference serving: how many GPUs, where the KV-cache memory goes, what breaks first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Scenario = Annotated[str, typer.Argument(help="A scenario file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; may be repeated.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers, instead of the scenario's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the report and the tables; out/NAME when not given.")
]


@app.command()
def run(
    scenario: Scenario,
    set_: Overrides = None,
    seed: Seed = None,
    json: AsJson = False,
    out: Out = None,
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
    from servesim.report.expectations import expectations_text
    from servesim.report.terminal import warnings_text

    loaded = api.load(scenario, _overrides(set_, seed))
    if expect:
        api.check_expect(loaded)
    name = loaded.scenario.name
    with _output(out, name, wanted=out is not None or not json) as write:
        with _stoppable() as stop, _progress(name) as progress, _step_trace(step_trace) as trace:
            result = api.simulate(loaded, progress=progress, stop=stop, step_trace=trace)
        if json:
            typer.echo(result.to_json(expect=expect), nl=False)
        else:
            _print(result, json)
            typer.echo(warnings_text(result.summary), nl=False)
            if expect:
                typer.echo(expectations_text(result.expectations), nl=False)
        write(result)
    if result.run.log.interrupted:
        raise typer.Exit(130)
    if expect and not all(finding.met for finding in result.expectations):
        raise typer.Exit(1)


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
) -> None:
    """Show where scenarios, simulated on the same random numbers, and finished runs differ."""
    from servesim import api
    from servesim.report.terminal import warnings_text

    sources = [a, b, *(more or ())]
    loaded = [s if api.is_finished(s) else api.load(s, _overrides(set_, seed)) for s in sources]
    names = [Path(s).parent.name or "result" if isinstance(s, str) else s.scenario.name for s in loaded]
    with _output(out, "-against-".join(names), wanted=out is not None or not json) as write:
        if more or any(isinstance(s, str) for s in loaded):
            many = api.compare_many(loaded)
            _print(many, json)
            write(many)
            return
        results = []
        with _stoppable() as stop:
            for each, name in zip(loaded, names, strict=True):
                with _progress(name) as progress:
                    results.append(api.simulate(each, progress=progress, stop=stop))
        comparison = api.Comparison(*results)
        _print(comparison, json)
        if not json:
            for name, result in zip(names, results, strict=True):
                typer.echo(warnings_text(result.summary, name), nl=False)
        write(comparison)
    if any(result.run.log.interrupted for result in results):
        raise typer.Exit(130)


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

    overrides = _overrides(set_, seed)
    name = f"{api.load(scenario, overrides).scenario.name}-fragmentation"
    wanted = out is not None or not json
    with _output(out, name, wanted=wanted) as write:
        report = api.fragmentation(
            scenario,
            overrides=overrides,
            allocators=[part for part in allocators.split(",") if part],
            replications=replications,
            block_sizes=_block_sizes(block_sizes),
            capacity=capacity,
            maps=wanted,
            on_run=lambda what: typer.echo(f"Simulating: {what}", err=True),
        )
        _print(report, json)
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

    loaded = api.load(scenario, _overrides(set_, seed))
    wanted = out is not None or not json
    with _output(out, f"{loaded.scenario.name}-prefix-cache", wanted=wanted) as write:
        tell = lambda size: typer.echo(f"Replaying: {size:,.0f} tokens", err=True)  # noqa: E731
        report = api.prefix_cache(loaded, _sizes(sizes), on_size=tell)
        _print(report, json)
        write(report)


@app.command()
def check(scenario: Scenario, set_: Overrides = None, seed: Seed = None) -> None:
    """Validate a scenario, its files and its memory without simulating."""
    from servesim import api
    from servesim.report.startup import startup_lines

    loaded, memory, requests = api.check(scenario, overrides=_overrides(set_, seed))
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
    with _step_trace(out) as write:
        for record in lines:
            assert write is not None
            write(record)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="gpus, models or scenarios.")], json: AsJson = False
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

    with _output(out, "validation", wanted=out is not None or not json) as write:
        with _progress("validate") as progress:
            accuracy = api.validate(
                folders or (), on_run=lambda name, done, total: progress(done, total, 0.0)
            )
        _print(accuracy, json)
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

    with _output(out, "calibration", wanted=out is not None or not json) as write:
        calibrations = api.calibrate(source, scenario, overrides=_overrides(set_, None))
        _print(calibrations, json)
        write(calibrations)


@app.command()
def schema() -> None:
    """Print the JSON schema of scenario files."""
    from servesim.config.schema import schema_text

    typer.echo(schema_text(), nl=False)


def main() -> None:
    """Entry point: a user's mistake ends with its message and status 2."""
    try:
        app()
    except ServesimError as error:
        typer.echo(f"servesim: {error}", err=True)
        sys.exit(2)


def _overrides(set_: list[str] | None, seed: int | None) -> list[str]:
    return [*(set_ or ()), *([] if seed is None else [f"seed={seed}"])]


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


def _print(result: Report, json: bool) -> None:
    typer.echo(result.to_json() if json else str(result), nl=False)


@contextmanager
def _output(out: Path | None, name: str, *, wanted: bool) -> Iterator[Callable[[Any], None]]:
    """A writer into a folder that is known to be writable before anything is simulated."""
    if not wanted:
        yield lambda result: None
        return
    from servesim.report.folder import prepare_folder, write_files

    folder = prepare_folder(out or Path("out") / name)

    def write(result: Report) -> None:
        files = result.files()
        write_files(folder, files)
        typer.echo(f"Wrote {folder}{'/'}{{{','.join(files)}}}", err=True)

    yield write


@contextmanager
def _step_trace(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A writer of step-trace lines, if they are wanted."""
    if path is None:
        yield None
        return
    from servesim.report.step_trace import trace_file

    with trace_file(path) as write:
        yield write
    typer.echo(f"Wrote {path}", err=True)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Turn a first Ctrl-C into an orderly stop; a second one ends the program at once."""
    stopped = False

    def on_interrupt(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)
        typer.echo("Stopping: the results below are partial.", err=True)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int, float], None]]:
    """Progress with the time left on stderr, for simulations of more than two seconds."""
    from servesim.report.progress import Progress

    progress = Progress(name)
    try:
        yield progress.update
    finally:
        progress.close()
