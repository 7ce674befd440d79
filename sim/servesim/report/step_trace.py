"""A step trace as a file: JSON lines, settings first, the steps, a summary last."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from typing import Any

from servesim.errors import OutputError, Problem

__all__ = ["line", "trace_file"]


def line(record: dict[str, Any]) -> str:
    """A record as a line of a trace."""
    return json.dumps(record, separators=(",", ":")) + "\n"


@contextmanager
def trace_file(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A writer of records; the file takes its place only when all of them are written.

    Raises OutputError, before anything is computed, where nothing can be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".servesim-") as folder:
            waiting = Path(folder) / "trace"
            with waiting.open("w", encoding="utf-8", newline="\n") as file:

                def write(record: dict[str, Any]) -> None:
                    file.write(line(record))

                yield write
            os.replace(waiting, path)
    except OSError as error:
        raise OutputError(
            Problem(
                "the step trace cannot be written",
                file=str(path),
                got=error.strerror or str(error),
                next_step="choose another file in a folder that exists",
            )
        ) from error
