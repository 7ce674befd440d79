"""Strict YAML that remembers where every key and value stands: the one door to PyYAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from servesim.config.tree import LocatedDict, LocatedList, Place, shown
from servesim.errors import ConfigError, Problem

__all__ = ["read_value", "read_yaml"]

_MOST_BYTES = 256 * 1024  # a scenario has about 2 KiB; anything this long is some other file
_TAG = "tag:yaml.org,2002:"
_DIGITS = "[0-9](?:_?[0-9])*"
_PLAIN = {  # what is read from text without quotes, by YAML's name of it; all else stays text
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": rf"[-+]?{_DIGITS}|0x[0-9a-fA-F]+",
    "float": rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _StrictLoader(yaml.SafeLoader):
    """YAML without surprises: on, off, dates and 12:30 are text, 3.35e12 is a number, nothing is an alias."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name and type)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="alias", problem_mark=mark)
        return super().compose_node(parent, index)


for _kind, _pattern in _PLAIN.items():
    _StrictLoader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), None)

_SYNTAX = {  # PyYAML's words: ours, and what to do
    "found character '\\t'": ("a tab where YAML wants spaces", "indent with spaces"),
    "mapping values are not allowed": (
        "a colon that cannot stand here",
        "line up the keys, or put text with a colon in quotes",
    ),
    "could not find expected ':'": ("a line that is not key: value", "put a colon and a space after the key"),
    "expected <block end>": ("a line that does not fit those above it", "line up the keys of a section"),
    "expected ',' or ']'": ("a list without its closing ]", "close it"),
    "expected ',' or '}'": ("a section without its closing }", "close it"),
    "found unexpected end of stream": ("a text without its closing quote", "close it"),
    "that cannot start any token": ("text that begins with a special character", "put it in quotes"),
    "found another document": ("a second document (---) in one file", "put it in a file of its own"),
    "alias": (
        "YAML aliases (*name) are not allowed",
        "write the value out, or put what is shared in a scenario to `extends:`",
    ),
}


def read_yaml(path: str | Path) -> LocatedDict:
    """The sections of a YAML file, each key with its line; no two equal keys, no aliases, no guessed types.

    Raises ConfigError for a file that cannot be read or is not such YAML.
    """
    file = str(path)
    tree = _tree(_text_of(file), file)
    if tree is None:
        raise ConfigError(Problem("the file is empty", file, next_step="write key: value lines into it"))
    if not isinstance(tree, LocatedDict):
        step = "write key: value lines"
        raise ConfigError(Problem("must hold keys and values", file, 1, 1, got=shown(tree), next_step=step))
    return tree


def read_value(text: str, option: str) -> tuple[Any, str | None]:
    """A value from the command line; a number, true, false or null also as it is written.

    Only ``[``, ``{`` and quotes make YAML of it, so that ``a: b # c`` is text.  ``option`` is named in
    messages about what stands inside it.  Raises ConfigError.
    """
    if text[:1] in ("[", "{", '"', "'"):
        return _tree(text, option, in_file=False), None
    kind = next((kind for kind, pattern in _PLAIN.items() if re.fullmatch(pattern, text)), "str")
    try:
        return _plain_value(kind, text), None if kind == "str" else text
    except ValueError:
        raise ConfigError(Problem("is not a number that can be read", got=shown(text))) from None


def _text_of(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) <= _MOST_BYTES:
            return data.decode("utf-8-sig")
        problem = Problem(f"is longer than {_MOST_BYTES // 1024} KiB", file, next_step="give a YAML file")
    except FileNotFoundError:
        problem = Problem("no such file", file, next_step="check the path")
    except IsADirectoryError:
        problem = Problem("is a folder, not a file", file, next_step="give a file in it")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem("is not UTF-8 text", file, line, next_step="give a YAML file, saved as UTF-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = Problem("cannot be read", file, got=reason, next_step="check the path and its permissions")
    raise ConfigError(problem)


def _tree(text: str, file: str, in_file: bool = True) -> Any:
    try:
        node = _StrictLoader(text).get_single_node()
        return None if node is None else _Builder(file, in_file).build(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{int(error.character):04X}"
        problem = Problem("a character that YAML does not allow", file, line, got=code, next_step="remove it")
    except yaml.MarkedYAMLError as error:
        problem = _syntax_problem(error, file)
    except RecursionError:
        problem = Problem("sections are nested too deeply", file, next_step="a few levels do")
    raise ConfigError(problem)


def _syntax_problem(error: yaml.MarkedYAMLError, file: str) -> Problem:
    said = error.problem or error.context or ""
    unknown = (f"not valid YAML: {said}", "")
    words, step = next((ours for theirs, ours in _SYNTAX.items() if theirs in said), unknown)
    # What is not closed is shown where it opens; PyYAML notices at the end of the file.
    mark = (error.context_mark if step == "close it" else None) or error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    return Problem(words, file, line, column, next_step=step)


def _plain_value(kind: str, text: str) -> Any:
    """Raises ValueError for text that is not of its kind, and for kinds that no plain text has."""
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 16) if text.startswith("0x") else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError(kind)


class _Builder:
    """Turns the nodes of one file, or of an option's value, into a tree with places."""

    def __init__(self, file: str, in_file: bool) -> None:
        self.file, self.in_file = file, in_file

    def build(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.section(node)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return LocatedList((self.build(item), self.place(item, item)) for item in node.value)
        if isinstance(node, yaml.ScalarNode) and (kind == "str" or kind in _PLAIN):
            try:
                return _plain_value(kind, node.value)
            except ValueError:
                self.refuse(node, "is not a number that can be read", "write it with fewer digits")
        return self.refuse(node, f"YAML tags (!!{kind}) are not allowed", "remove the tag")

    def section(self, node: yaml.MappingNode) -> LocatedDict:
        section = LocatedDict()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, "a key must be a word", "write key: value")
            # Words like true and null are no less words for being keys; tensor-parallel degrees are numbers.
            key = self.build(key_node) if key_node.tag == _TAG + "int" else key_node.value
            if key in section:
                before = f"is on line {section.places[key].key_line} already"
                words = f"the key {shown(str(key))} {before if self.in_file else 'is there twice'}"
                self.refuse(key_node, words, "remove one of the two")
            section.put(key, self.build(value_node), self.place(key_node, value_node))
        return section

    def place(self, key: yaml.Node, value: yaml.Node) -> Place:
        scalar = isinstance(value, yaml.ScalarNode) and value.tag != _TAG + "str"
        at, start = key.start_mark, value.start_mark
        text = value.value if scalar else None
        if not self.in_file:  # lines of a file mean something, columns of a command line do not
            return Place(self.file, text=text)
        return Place(self.file, at.line + 1, at.column + 1, start.line + 1, start.column + 1, text)

    def refuse(self, node: yaml.Node, problem: str, next_step: str) -> NoReturn:
        mark = node.start_mark
        raise ConfigError(Problem(problem, self.file, mark.line + 1, mark.column + 1, next_step=next_step))
