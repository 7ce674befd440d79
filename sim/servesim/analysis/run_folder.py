"""The folder of a study that can be interrupted: a manifest, and one file for each finished point.

A file is written beside its place and moved there, so that it is whole or absent whenever the program ends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servesim.errors import OutputError, Problem, StudyError

__all__ = ["RunFolder", "json_text"]

_WAITING = ".part"


class RunFolder:
    """A study's folder; raises OutputError where it cannot be written, StudyError where it is another's."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Begin a study in ``folder``, or go on with the one of the same ``manifest`` that is there."""
        self.folder = folder
        self._points = folder / "points"
        known = self._known_manifest()
        if known is not None and known != json.loads(json_text(manifest)):
            raise StudyError(self._another(known, manifest))
        try:
            self._points.mkdir(parents=True, exist_ok=True)
            for waiting in [*folder.glob(f"*{_WAITING}"), *self._points.glob(f"*{_WAITING}")]:
                waiting.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        if known is None:
            self._write(folder / "manifest.json", json_text(manifest))

    def finished(self) -> dict[int, dict[str, Any]]:
        """The points that are done, by number; a damaged file counts as not done."""
        found = {}
        for path in sorted(self._points.glob("*.json")):
            try:
                found[int(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
        return found

    def keep(self, number: int, point: Mapping[str, Any]) -> None:
        """Put a finished point where no later interruption can lose it."""
        self._write(self._points / f"{number:05}.json", json_text(point))

    def _known_manifest(self) -> Any:
        path = self.folder / "manifest.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = Problem(
                "is not a manifest", file=str(path), next_step="choose another folder with --out"
            )
            raise StudyError(problem) from error

    def _another(self, known: Any, manifest: Mapping[str, Any]) -> list[Problem]:
        """What makes the study in the folder another one than is asked for."""
        step = "choose another folder with --out, or delete this one to begin anew"
        keys = [key for key in manifest if not isinstance(known, dict) or known.get(key) != manifest[key]]
        if keys == ["digest"]:
            text = "the scenario, or a file it names, has changed since this sweep was begun"
            return [Problem(text, file=str(self.folder), next_step=step)]
        got = ", ".join(f"{key} {_short(manifest[key])}" for key in keys if key != "digest")
        return [Problem("holds a sweep of other points", file=str(self.folder), got=got, next_step=step)]

    def _write(self, path: Path, text: str) -> None:
        waiting = path.with_name(path.name + _WAITING)
        try:
            with waiting.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(waiting, path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OutputError:
        step = "choose another folder with --out"
        words = error.strerror or str(error)
        return OutputError(
            Problem("the run folder cannot be written", file=str(self.folder), got=words, next_step=step)
        )


def json_text(value: Any) -> str:
    """JSON, the same bytes for the same value; NaN must have been taken out."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
