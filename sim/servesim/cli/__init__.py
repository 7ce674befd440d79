"""The command line. Results go to stdout, the same bytes for one seed; everything else goes to stderr."""

from __future__ import annotations

import os
import sys

import typer

from servesim.cli import capacity, commands, explain, lab, plan, studies  # noqa: F401  # they add their commands to the app
from servesim.cli.shared import app
from servesim.errors import ServesimError

__all__ = ["app", "main"]

# NumPy's linear algebra would start a thread per core when it is imported, and nothing here keeps them busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Entry point: a user's mistake ends with its message and status 2."""
    try:
        app()
    except ServesimError as error:
        typer.echo(f"servesim: {error}", err=True)
        sys.exit(2)
