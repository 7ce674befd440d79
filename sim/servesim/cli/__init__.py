"""The command line. Results go to stdout, the same bytes for one seed; everything else goes to stderr."""

from __future__ import annotations

import sys

import typer

from servesim.cli import capacity, commands, explain, lab, plan, studies  # noqa: F401  # they add their commands to the app
from servesim.cli.shared import app
from servesim.errors import ServesimError

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: a user's mistake ends with its message and status 2."""
    try:
        app()
    except ServesimError as error:
        typer.echo(f"servesim: {error}", err=True)
        sys.exit(2)
