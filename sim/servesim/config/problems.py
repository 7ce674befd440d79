"""pydantic's findings in plain words, each with its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from servesim.config.fields import (
    Spot,
    alternatives,
    choices,
    homes,
    inside,
    records,
    spot,
    tag_of,
)
from servesim.config.record import Record, RuleError, attribute_texts
from servesim.config.tree import TreePath, dotted, place_of, shown
from servesim.errors import Problem, did_you_mean

__all__ = ["locate", "problems_of", "switches_for_numbers"]

_SECTION = "a section of keys and values"
_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": _SECTION,
    "mapping_type": _SECTION,
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "greater_than": "greater than {gt:.15g}",
    "greater_than_equal": "{ge:.15g} or more",
    "less_than": "less than {lt:.15g}",
    "less_than_equal": "{le:.15g} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
}


@dataclass(frozen=True, slots=True)
class _Finding:
    detail: ErrorDetails
    spot: Spot


def problems_of(error: ValidationError, record_type: type[Record], tree: Any, file: str) -> list[Problem]:
    """Every problem of a tree, in the order of its lines."""
    findings = [
        _Finding(detail, spot(record_type, tree, detail["loc"])) for detail in error.errors(include_url=False)
    ]
    return [_problem(finding, words, record_type, tree, file) for finding, words in _one_per_union(findings)]


def switches_for_numbers(
    annotation: Any, tree: Any, file: str, path: TreePath = (), root: Any = None
) -> Iterator[Problem]:
    """true and false where a number is wanted: pydantic would read them as 1 and 0."""
    root = tree if root is None else root
    kinds = alternatives(annotation)
    if isinstance(tree, bool) and kinds and all(kind in (int, float) for kind in kinds):
        wanted = "a number" if float in kinds else "a whole number"
        yield locate(Problem(f"must be {wanted}", got=shown(tree)), root, path, file)
    keys = tree.keys() if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield from switches_for_numbers(inside(annotation, key, tree), tree[key], file, (*path, key), root)


def locate(
    problem: Problem, tree: Any, path: Sequence[str | int], file: str, at_key: bool = False
) -> Problem:
    """The problem with its file, line and dotted path filled in."""
    place, found = place_of(tree, path)
    if place is None:
        line = column = 0
    elif found and not at_key:
        file, line, column = place.file or file, place.line, place.column
    else:
        file, line, column = place.file or file, place.key_line, place.key_column
    return replace(problem, file=file, line=line, column=column, path=dotted(path))


def _one_per_union(findings: Sequence[_Finding]) -> Iterator[tuple[_Finding, str]]:
    """Findings in words; of a union's alternatives the one that fits best is told, or all in one sentence."""
    unions: dict[TreePath | int, dict[str, list[_Finding]]] = {}
    for number, finding in enumerate(findings):
        union, label = finding.spot.union or (number, "")
        unions.setdefault(union, {}).setdefault(label, []).append(finding)
    for union, labels in unions.items():
        depth = len(union) if isinstance(union, tuple) else 0
        entered = [found for found in labels.values() if any(len(one.spot.path) > depth for one in found)]
        if len(labels) == 1 or entered:
            nearest = min(entered or labels.values(), key=_misfit)
            yield from ((finding, _words(finding.detail)) for finding in nearest)
        else:
            firsts = [found[0] for found in labels.values()]
            wanted = dict.fromkeys(_words(finding.detail).removeprefix("must be ") for finding in firsts)
            yield firsts[0], "must be " + " or ".join(wanted)


def _misfit(findings: Sequence[_Finding]) -> tuple[int, int]:
    """How unlike an alternative a section is: keys too many or too few count before wrong values."""
    keys = sum(finding.detail["type"] in ("extra_forbidden", "missing") for finding in findings)
    return keys, len(findings)


def _words(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _MUST_BE:
        return "must be " + _MUST_BE[kind].format(**context)
    if kind == "string_too_short":
        least = context["min_length"]
        return "must not be empty" if least == 1 else f"must have {least} characters or more"
    if kind in ("value_error", "assertion_error"):
        return str(context["error"])
    return detail["msg"].replace("Input should be", "must be")


def _problem(finding: _Finding, words: str, root: type[Record], tree: Any, file: str) -> Problem:
    detail, where = finding.detail, finding.spot
    kind, path = detail["type"], where.path
    scalar = bool(path) and not isinstance(where.node, Mapping | list)
    got = _got(tree, where) if scalar else ""
    rule = detail.get("ctx", {}).get("error")
    if kind in ("extra_forbidden", "invalid_key"):
        return locate(_unknown_key(where, root), tree, path, file, at_key=True)
    if kind == "missing":
        return locate(_missing(where), tree, path, file)
    if kind.startswith("union_tag") and isinstance(where.node, Mapping):
        return locate(_untold(where), tree, (*path, tag_of(records(where.annotation)) or ""), file)
    if kind.startswith("union_tag"):
        return locate(Problem(f"must be {_SECTION}", got=got, next_step=_step(where)), tree, path, file)
    if isinstance(rule, RuleError):
        return locate(Problem(words, next_step=rule.next_step), tree, (*path, *rule.path), file, at_key=True)
    if rule is not None:
        return locate(Problem(words, got=got), tree, path, file, at_key=not scalar)
    if kind == "literal_error" and choices(where.annotation):
        return locate(_unknown_value(where, got), tree, path, file, at_key=where.is_key)
    hint = _range(where) if "_than" in kind else ""
    problem = Problem(words, got=got or _got(tree, where), hint=hint, next_step=_step(where))
    return locate(problem, tree, path, file, at_key=where.is_key)


def _got(tree: Any, where: Spot) -> str:
    place, found = place_of(tree, where.path)
    written = place.text if place and found and not where.is_key else None
    return written or shown(where.node)


def _step(where: Spot) -> str:
    """What to do about a value of the wrong kind, for the slips that YAML invites."""
    if where.node is None:
        return "give it a value, or remove the key"
    kinds = records(where.annotation)
    if not kinds or isinstance(where.node, Mapping):
        return ""
    if tag_of(kinds) and where.node in _tags(kinds):
        return f"write {tag_of(kinds)}: {where.node}, and its other keys, on lines of their own below it"
    if isinstance(where.node, str) and ":" in where.node:
        return "put a space after the colon"
    return f"write its keys, such as {next(iter(kinds[0].model_fields))}, on lines of their own below it"


def _tags(members: Sequence[type[Record]]) -> list[str]:
    tag = tag_of(members) or ""
    return [str(value) for member in members for value in choices(member.model_fields[tag].annotation)]


def _unknown_key(where: Spot, root: type[Record]) -> Problem:
    key = str(where.path[-1])
    known = records(where.parent)
    home = [path for path in homes(root, key) if path != where.path[:-1]]
    if 1 <= len(home) <= 2:
        return Problem("unknown key here", hint="it belongs " + " or ".join(_under(path) for path in home))
    return Problem("unknown key", hint=did_you_mean(key, known[0].model_fields) if known else "")


def _unknown_value(where: Spot, got: str) -> Problem:
    allowed = [str(value) for value in choices(where.annotation)]
    if isinstance(where.node, str):
        words = "unknown key" if where.is_key else "unknown value"
        return Problem(words, got="" if where.is_key else got, hint=did_you_mean(where.node, allowed))
    hint = f"allowed: {', '.join(allowed)}"
    if where.node is None:
        return Problem("must not be empty", hint=hint, next_step=_step(where))
    return Problem("unknown value", got=got or shown(where.node), hint=hint)


def _missing(where: Spot) -> Problem:
    key = str(where.path[-1])
    members = [member for member in records(where.parent) if key in member.model_fields]
    allowed = choices(members[0].model_fields[key].annotation) if members else []
    about = attribute_texts(members[0]).get(key, "").split("\n")[0] if members else ""
    hint = f"allowed: {', '.join(map(str, allowed))}" if allowed else about
    return Problem("is missing", hint=hint, next_step=f"add {key}: {_under(where.path[:-1])}")


def _untold(where: Spot) -> Problem:
    """A section that does not say, or says wrongly, which of several kinds it is."""
    members = records(where.annotation)
    tag, kinds = tag_of(members) or "", _tags(members)
    value = where.node.get(tag)
    if value is None:
        step = f"add {tag}: {_under(where.path)}"
        return Problem("is missing", hint=f"allowed: {', '.join(kinds)}", next_step=step)
    return Problem(f"unknown {tag}", got=shown(value), hint=did_you_mean(str(value), kinds))


def _under(path: TreePath) -> str:
    return f"under {dotted(path)}" if path else "at the top level"


def _range(where: Spot) -> str:
    """Both ends of a number's range, when it has two: one end is told by the problem itself."""
    parent = records(where.parent)
    field = parent[0].model_fields.get(str(where.path[-1])) if parent and where.path else None
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    bounds = [
        f"{words[name]} {getattr(item, name):.15g}"
        for item in (field.metadata if field else ())
        for name in words
        if hasattr(item, name)
    ]
    return f"allowed: {' and '.join(bounds)}" if len(bounds) > 1 else ""
