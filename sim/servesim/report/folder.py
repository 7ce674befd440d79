"""The folder of a run's files: all of them or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from servesim.errors import OutputError, Problem

__all__ = ["prepare_folder", "write_files"]


def prepare_folder(folder: Path) -> Path:
    """Make sure that files can be written there; raises OutputError with the reason when not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(_problem(folder, error)) from error
    return folder


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write all files beside their places first, then move them there; raises OutputError."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".servesim-") as waiting:
            for name, text in files.items():
                (Path(waiting) / name).write_text(text, encoding="utf-8", newline="\n")
            for name in files:
                os.replace(Path(waiting) / name, folder / name)
    except OSError as error:
        raise OutputError(_problem(folder, error)) from error


def _problem(folder: Path, error: OSError) -> Problem:
    return Problem(
        "the output folder cannot be written",
        file=str(folder),
        got=error.strerror or str(error),
        next_step="choose another folder with --out",
    )
