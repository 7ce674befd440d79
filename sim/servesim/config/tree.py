"""What a YAML file said, as plain dicts and lists that remember where each key and value stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["LocatedDict", "LocatedList", "Place", "TreePath", "dotted", "place_of", "shown"]

TreePath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key and its value are written; lines and columns count from 1, 0 where there is none."""

    file: str
    key_line: int = 0
    key_column: int = 0
    line: int = 0
    column: int = 0
    text: str | None = None
    """A number, true, false or null as it is written (``0.30``, ``3.35e12``); None for everything else."""


class LocatedDict(dict[Any, Any]):
    """A dict whose ``places`` tell where its keys and values stand; a key put in otherwise has no place."""

    __slots__ = ("places",)

    def __init__(self, items: Iterable[tuple[Any, Any, Place]] = ()) -> None:
        super().__init__()
        self.places: dict[Any, Place] = {}
        for key, value, place in items:
            self.put(key, value, place)

    def put(self, key: Any, value: Any, place: Place) -> None:
        """Set a key together with its place."""
        self[key] = value
        self.places[key] = place

    def drop(self, key: Any) -> None:
        """Remove a key, if it is there."""
        self.pop(key, None)
        self.places.pop(key, None)

    def located(self) -> Iterator[tuple[Any, Any, Place]]:
        """Keys, values and places."""
        return ((key, value, self.places.get(key, Place(""))) for key, value in self.items())

    def copy(self) -> LocatedDict:
        """A copy whose keys can be changed; the sections below are still those of the original."""
        return LocatedDict(self.located())


class LocatedList(list[Any]):
    """A list whose ``places`` tell where its elements stand."""

    __slots__ = ("places",)

    def __init__(self, items: Iterable[tuple[Any, Place]] = ()) -> None:
        pairs = list(items)
        super().__init__(value for value, _ in pairs)
        self.places: dict[int, Place] = {index: place for index, (_, place) in enumerate(pairs)}


def place_of(tree: Any, path: Sequence[str | int]) -> tuple[Place | None, bool]:
    """The place of ``path``, or of the nearest section around it; and whether it is the very place."""
    node, nearest, found = tree, None, False
    for key in path:
        places: dict[Any, Place] = getattr(node, "places", {})
        if key not in places:
            return nearest, False
        nearest, found, node = places[key], True, node[key]
    return nearest, found


def dotted(path: Sequence[str | int]) -> str:
    """A path as people write it: ``workload.turns[2].think_s``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return _printable(text)


def _printable(text: str) -> str:
    """Text on one line, without what would move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def shown(value: Any, text: str | None = None) -> str:
    """A value as its writer would know it, on one short line."""
    if text:
        return text
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        line = _printable(value)
        return f'"{line if len(line) <= 60 else line[:57] + "..."}"'
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, list(value)[:3])) + (", ..." if len(value) > 3 else "")
        return f"a section ({_printable(keys)})" if value else "an empty section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return str(value)[:60] if isinstance(value, int | float) else f"a {type(value).__name__}"
