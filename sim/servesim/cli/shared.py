"""What the commands share: the program itself, options, output, progress, an orderly stop."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from servesim.errors import ConfigError, Problem, ServesimError, blamed_on

if TYPE_CHECKING:
    from servesim.config.load import LoadedScenario

__all__ = [
    "AsJson",
    "Jobs",
    "Limits",
    "Out",
    "Overrides",
    "Prices",
    "Replications",
    "Scenario",
    "Seed",
    "app",
    "load_with_limits",
    "output",
    "overrides",
    "prices_of",
    "progress_of",
    "show_result",
    "step_trace_file",
    "stoppable",
]

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
Replications = Annotated[
    int | None,
    typer.Option(min=2, help="Simulate this many times under different seeds, and print intervals."),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Simulations at a time; all cores when not given.")]
Limits = Annotated[
    list[str] | None,
    typer.Option("--slo", metavar="KEY=SECONDS", help="A limit, such as ttft_p99_s=0.5; may be repeated."),
]
Prices = Annotated[
    list[str] | None,
    typer.Option("--price", metavar="GPU=USD", help="Price of a GPU per hour; may be repeated."),
]


class Printable(Protocol):
    """A result: text, JSON, files."""

    def to_json(self) -> str: ...

    def files(self) -> dict[str, str]: ...


def overrides(set_: list[str] | None, seed: int | None) -> list[str]:
    """What --set and --seed say, as texts for the loader."""
    return [*(set_ or ()), *([] if seed is None else [f"seed={seed}"])]


def load_with_limits(
    scenario: str, changes: list[str], slo: list[str] | None
) -> tuple[LoadedScenario, list[str]]:
    """The scenario with the limits of --slo, and all changes; a mistake is blamed on its option."""
    from servesim import api

    for text in slo or ():
        if not re.match(r"\s*\w+\s*=", text):
            step = "write --slo ttft_p99_s=0.5"
            raise ConfigError(Problem("not a limit", "--slo", got=text, next_step=step))
    changes = [*changes, *(f"slo.{text}" for text in slo or ())]
    with blamed_on({"slo": "--slo"} if slo else {}):
        return api.load(scenario, changes), changes


def prices_of(texts: list[str] | None, loaded: LoadedScenario) -> dict[str, float]:
    """What --price says, by GPU; raises ConfigError for a GPU that there is not, and for what is no price."""
    return dict(_price(text, loaded) for text in texts or ())


def _price(text: str, loaded: LoadedScenario) -> tuple[str, float]:
    from servesim.config.profiles import load_gpu

    gpu, _, usd = text.partition("=")
    try:
        price = float(usd)
    except ValueError:
        price = nan
    if not 0 < price < inf:
        step = "write --price h100-sxm=2.50"
        raise ConfigError(Problem("not a price", "--price", got=text, next_step=step))
    return load_gpu(str(loaded.find("gpus", gpu.strip()))).name, price


def show_result(result: Printable, json: bool) -> None:
    """Print a result to stdout."""
    typer.echo(result.to_json() if json else str(result), nl=False)


@contextmanager
def output(out: Path | None, name: str, *, wanted: bool) -> Iterator[Callable[[Any], None]]:
    """A writer into a folder that is known to be writable before anything is simulated."""
    if not wanted:
        yield lambda result: None
        return
    from servesim.report.folder import prepare_folder, write_files

    wanted_at = out or Path("out") / name
    new = [each for each in (wanted_at, *wanted_at.parents) if not each.exists()]
    folder = prepare_folder(wanted_at)
    empty = not any(folder.iterdir())

    def write(result: Printable) -> None:
        files = result.files()
        write_files(folder, files)
        typer.echo(f"Wrote {folder}{'/'}{{{','.join(files)}}}", err=True)

    try:
        yield write
    except (KeyboardInterrupt, ServesimError) as error:
        if empty and not any(folder.iterdir()):
            for each in new:
                if not any(each.iterdir()):
                    each.rmdir()
            if isinstance(error, KeyboardInterrupt):
                typer.echo("Stopped before there was a result: nothing is written.", err=True)
        raise


@contextmanager
def step_trace_file(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A writer of step-trace lines, if they are wanted."""
    if path is None:
        yield None
        return
    from servesim.report.step_trace import trace_file

    with trace_file(path) as write:
        yield write
    typer.echo(f"Wrote {path}", err=True)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
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
def progress_of(name: str, what: str = "requests", every: int = 64) -> Iterator[Callable[..., None]]:
    """Progress with the time left on stderr, for what takes more than two seconds."""
    from servesim.report.progress import Progress

    progress = Progress(name, what, every)
    try:
        yield progress.update
    finally:
        progress.close()
