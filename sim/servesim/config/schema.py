"""The JSON schema of a scenario file, for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from servesim.config.record import Record, attribute_texts
from servesim.config.scenario import Scenario

__all__ = ["scenario_schema", "schema_text"]

_EXTENDS = {
    "type": "string",
    "description": "Another scenario, by name or path, that this one changes: sections are merged "
    "key by key, all else is replaced.",
}


def scenario_schema() -> dict[str, Any]:
    """What an editor needs to complete and check a scenario; its text is that of the attribute docstrings.

    A scenario that extends another may leave out any key, at any depth, and an editor cannot look into
    the other file; so only `servesim check` reports what is missing below the top level.
    """
    plain: dict[str, Any] = _plain(_described(Scenario.model_json_schema()))
    needed = plain.pop("required")
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "servesim scenario",
        "description": plain.pop("description"),
        "type": plain.pop("type"),
        "anyOf": [{"required": ["extends"]}, {"required": needed}],
        "properties": {"extends": _EXTENDS, **plain.pop("properties")},
        **plain,
    }


def schema_text() -> str:
    """The text of scenarios/scenario.schema.json."""
    return json.dumps(scenario_schema(), indent=2) + "\n"


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the texts of all attributes."""
    records = {record.__name__: record for record in _kinds_of(Record)}
    for name, node in ((Scenario.__name__, schema), *schema["$defs"].items()):
        for key, text in attribute_texts(records[name]).items() if name in records else ():
            node["properties"][key]["description"] = text
    return schema


def _kinds_of(record_type: type[Record]) -> Iterator[type[Record]]:
    for kind in record_type.__subclasses__():
        yield kind
        yield from _kinds_of(kind)


def _plain(node: Any, depth: int = 0) -> Any:
    """Without pydantic's titles, defaults that are whole sections, and the keys required below the top."""
    if isinstance(node, list):
        return [_plain(item, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {}
    for key, value in node.items():
        if key == "properties":
            plain[key] = {name: _plain(field, depth + 1) for name, field in value.items()}
        elif (
            key in ("title", "discriminator")
            or (key == "required" and depth)
            or (key == "default" and isinstance(value, dict))
        ):
            continue
        else:
            plain["anyOf" if key == "oneOf" else key] = _plain(value, depth + 1)
    return plain
