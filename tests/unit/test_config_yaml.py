"""What is read from YAML text, and what is said about text that is no such YAML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from config_example import write

from servesim.config.load import read_yaml
from servesim.config.tree import place_of
from servesim.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.35e12", 3.35e12),
        ("1e6", 1e6),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5E-3", -1.5e-3),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("16", 16),
        ("+16", 16),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("1.2.3", "1.2.3"),
        ("'3'", "3"),
        ('"true"', "true"),
        ("=", "="),
        ("[1, on, 2.5]", [1, "on", 2.5]),
    ],
)
def test_values(tmp_path: Path, text: str, value: Any) -> None:
    read = read_yaml(write(tmp_path, f"key: {text}\n"))["key"]
    assert read == value
    assert type(read) is type(value) or isinstance(value, list)


def test_not_a_number_is_a_number(tmp_path: Path) -> None:
    assert math.isnan(read_yaml(write(tmp_path, "key: .nan\n"))["key"])


def test_keys_are_words_or_whole_numbers(tmp_path: Path) -> None:
    tree = read_yaml(write(tmp_path, "on: 1\ntrue: 2\n8: 3\n1.5: 4\nnull: 5\n"))
    assert list(tree) == ["on", "true", 8, "1.5", "null"]


def test_every_value_knows_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a:\n  b: 0.30\n  c: [x, {d: 1}]\n")
    tree = read_yaml(path)
    place, found = place_of(tree, ("a", "b"))
    assert found
    assert place is not None
    assert (place.file, place.key_line, place.key_column, place.line, place.column, place.text) == (
        *(str(path), 2, 3, 2, 6),
        "0.30",
    )
    inner, _ = place_of(tree, ("a", "c", 1, "d"))
    assert inner is not None
    assert (inner.key_line, inner.key_column, inner.column) == (3, 11, 14)
    nearest, found = place_of(tree, ("a", "missing", "deeper"))
    assert nearest is not None
    assert not found
    assert nearest.key_line == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE  the file is empty  -> write key: value lines into it"),
        ("# only a comment\n", "FILE  the file is empty  -> write key: value lines into it"),
        ("- 1\n- 2\n", "FILE:1:1  must hold keys and values  got a list of 2  -> write key: value lines"),
        ("hello\n", 'FILE:1:1  must hold keys and values  got "hello"  -> write key: value lines'),
        ("a: 1\nb: 2\na: 3\n", 'FILE:3:1  the key "a" is on line 1 already  -> remove one of the two'),
        ("a: {b: 1, b: 2}\n", 'FILE:1:11  the key "b" is on line 1 already  -> remove one of the two'),
        ("a:\n\tb: 1\n", "FILE:2:1  a tab where YAML wants spaces  -> indent with spaces"),
        (
            "a: b: c\n",
            "FILE:1:5  a colon that cannot stand here  -> line up the keys, or put text with a"
            " colon in quotes",
        ),
        ("a: 1\nb\n", "FILE:3:1  a line that is not key: value  -> put a colon and a space after the key"),
        (
            "a: 1\n b: 2\n",
            "FILE:2:3  a colon that cannot stand here  -> line up the keys, or put text with a"
            " colon in quotes",
        ),
        (
            "a:\n    b: 1\n  c: 2\n",
            "FILE:3:3  a line that does not fit those above it  -> line up the keys of a section",
        ),
        ("a: [1, 2\nb: 3\n", "FILE:1:4  a list without its closing ]  -> close it"),
        ("a: {b: 2\n", "FILE:1:4  a section without its closing }  -> close it"),
        ("x: 1\na: 'text\n", "FILE:2:4  a text without its closing quote  -> close it"),
        ("a: @x\n", "FILE:1:4  text that begins with a special character  -> put it in quotes"),
        (
            "a: 1\n---\nb: 2\n",
            "FILE:2:1  a second document (---) in one file  -> put it in a file of its own",
        ),
        (
            "a: &x {b: 1}\nc: *x\n",
            "FILE:2:4  YAML aliases (*name) are not allowed  -> write the value out, or put what is shared in"
            " a scenario to `extends:`",
        ),
        ("a: !!set {x}\n", "FILE:1:4  YAML tags (!!set) are not allowed  -> remove the tag"),
        (
            "a: !!python/object:os.system x\n",
            "FILE:1:4  YAML tags (!!python/object:os.system) are not allowed  -> remove the tag",
        ),
        ("? [a, b]\n: 1\n", "FILE:1:3  a key must be a word  -> write key: value"),
        ("a: 1\nb: \x07\n", "FILE:2  a character that YAML does not allow  got U+0007  -> remove it"),
        ("a: " + "9" * 5000, "FILE:1:4  is not a number that can be read  -> write it with fewer digits"),
        ("a: " + "[" * 3000, "FILE  sections are nested too deeply  -> a few levels do"),
        ("a: 1 # " + "x" * 300_000, "FILE  is longer than 256 KiB  -> give a YAML file"),
    ],
)
def test_text_that_is_not_such_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value) == message.replace("FILE", str(path))


def test_a_billion_laughs_are_refused_before_they_are_built(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(ConfigError, match=r":2:10  YAML aliases"):
        read_yaml(write(tmp_path, "\n".join(lines)))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "\ufeffname: x\n")) == {"name": "x"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        return str(caught.value)

    missing = tmp_path / "missing.yaml"
    assert message(missing) == f"{missing}  no such file  -> check the path"
    assert message(tmp_path) == f"{tmp_path}  is a folder, not a file  -> give a file in it"
    below_a_file = write(tmp_path, "a: 1") / "x.yaml"
    assert message(below_a_file) == (
        f"{below_a_file}  cannot be read  got Not a directory  -> check the path and its permissions"
    )
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("a: 1\nname: Zürich\n".encode("latin-1"))
    assert message(latin) == f"{latin}:2  is not UTF-8 text  -> give a YAML file, saved as UTF-8"
    assert "embedded null byte" in message(Path("a\0b"))


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a: 1")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match="cannot be read  got Permission denied"):
        read_yaml(path)
