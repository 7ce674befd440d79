"""Which record, and which of its fields, a place in a tree belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from servesim.config.record import Record
from servesim.config.tree import LocatedDict, TreePath

__all__ = [
    "Spot",
    "alternatives",
    "choices",
    "homes",
    "inside",
    "merge",
    "record_of",
    "records",
    "spot",
    "tag_of",
]


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, without None."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for argument in get_args(annotation) for kind in alternatives(argument))
    return () if annotation in (None, NoneType) else (annotation,)


def records(annotation: Any) -> list[type[Record]]:
    """The sections among the types that an annotation allows."""
    return [kind for kind in alternatives(annotation) if isinstance(kind, type) and issubclass(kind, Record)]


def choices(annotation: Any) -> list[Any]:
    """The values of an annotation that allows nothing but a few given ones; else empty."""
    kinds = alternatives(annotation)
    if not kinds or any(get_origin(kind) is not Literal for kind in kinds):
        return []
    return [value for kind in kinds for value in get_args(kind)]


def tag_of(members: Sequence[type[Record]]) -> str | None:
    """The key that tells several kinds of one section apart (``process``, ``law``, ``format``)."""
    if len(members) < 2:
        return None
    for name in members[0].model_fields:
        values = [
            choices(member.model_fields[name].annotation) for member in members if name in member.model_fields
        ]
        flat = [value for own in values for value in own]
        if len(values) == len(members) and all(values) and len(set(flat)) == len(flat):
            return name
    return None


def record_of(annotation: Any, section: Mapping[Any, Any]) -> type[Record] | None:
    """The record that ``section`` means to be: by its tag, else by the keys it shares with each."""
    members = records(annotation)
    if len(members) < 2:
        return members[0] if members else None
    tag = tag_of(members)
    if tag is None:
        return max(members, key=lambda member: len(set(section) & set(member.model_fields)))
    for member in members:
        field = member.model_fields[tag]
        if section.get(tag, field.default) in choices(field.annotation):
            return member
    return None


def inside(annotation: Any, key: str | int, node: Any) -> Any:
    """The annotation of what stands under ``key`` of ``node``; Any where nothing is known of it."""
    if isinstance(node, Mapping) and (record := record_of(annotation, node)):
        field = record.model_fields.get(str(key))
        return field.annotation if field else Any
    for kind in alternatives(annotation):
        arguments = get_args(kind)
        if get_origin(kind) is dict:
            return arguments[1]
        if get_origin(kind) in (list, tuple) and isinstance(key, int):
            return arguments[key] if key < len(arguments) and arguments[-1] is not ... else arguments[0]
    return Any


class Spot(NamedTuple):
    """What pydantic's error location means in the file."""

    path: TreePath
    annotation: Any
    node: Any
    """What stands there; None when nothing does."""
    parent: Any
    """The annotation of the section (or list) around it."""
    union: tuple[TreePath, str] | None
    """Where a union without tags was met, and which of its alternatives the error is about."""
    is_key: bool
    """The key itself is wrong, and not what stands under it; ``node`` is the key."""


def spot(annotation: Any, tree: Any, location: Sequence[str | int]) -> Spot:
    """Resolve an error location, leaving out the names of types that pydantic puts between the keys."""
    path: list[str | int] = []
    union = None
    parent, node = annotation, tree
    for item in location:
        kinds = alternatives(annotation)
        if len(kinds) > 1 and item != "[key]":
            tag = tag_of(records(annotation))
            if tag is None and union is None:
                union = (tuple(path), str(item))
            annotation = next((kind for kind in kinds if _is_called(kind, str(item), tag)), Any)
        elif item == "[key]":
            keys = [get_args(kind)[0] for kind in alternatives(parent) if get_origin(kind) is dict]
            return Spot(tuple(path), keys[0] if keys else Any, path[-1], parent, union, True)
        else:
            parent, annotation = annotation, inside(annotation, item, node)
            path.append(item)
            node = _get(node, item)
    return Spot(tuple(path), annotation, node, parent, union, False)


def _get(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except (KeyError, IndexError, TypeError):
        return None


def _is_called(kind: Any, label: str, tag: str | None) -> bool:
    if tag and isinstance(kind, type) and issubclass(kind, Record):
        return label in map(str, choices(kind.model_fields[tag].annotation))
    return (kind.__name__ if isinstance(kind, type) and not get_origin(kind) else str(kind)) in label


def homes(annotation: Any, key: str, path: TreePath = ()) -> Iterator[TreePath]:
    """Every section, from ``annotation`` down, that has a field called ``key``."""
    for member in records(annotation):
        if key in member.model_fields:
            yield path
        if len(path) < 4:
            for name, field in member.model_fields.items():
                yield from homes(field.annotation, key, (*path, name))


def merge(base: LocatedDict, over: LocatedDict, annotation: Any) -> LocatedDict:
    """``base`` with the values of ``over`` put on top: sections key by key, everything else as a whole.

    Where ``over`` changes the tag of a section (``process: poisson`` over ``process: gamma``), the keys
    of ``base`` that only the former kind has are dropped, so that the rest can be kept.
    """
    merged = base.copy()
    tag = tag_of(records(annotation))
    if tag in over and over[tag] != base.get(tag):
        former, latter = record_of(annotation, base), record_of(annotation, over)
        if former and latter:
            for key in former.model_fields.keys() - latter.model_fields.keys():
                merged.drop(key)
    whole = merged.copy()
    whole.update(over)
    for key, value, place in over.located():
        old = merged.get(key)
        if isinstance(old, LocatedDict) and isinstance(value, LocatedDict):
            value = merge(old, value, inside(annotation, key, whole))
        merged.put(key, value, place)
    return merged
