"""YAML means what it says, and every mistake is one sentence with the value and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from vsdbench.config import Config, apply_override, content_hash, load_yaml, parse
from vsdbench.errors import ConfigError


class Cat(Config):
    kind: Literal["cat"]
    lives: int = Field(default=9, ge=1)


class Dog(Config):
    kind: Literal["dog"]
    tricks: dict[str, int] = Field(default_factory=dict)


class Zoo(Config):
    name: str
    rate: float = 0.5
    mood: Literal["happy", "sleepy"] = "happy"
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(default_factory=list)
    best: Cat | None = None


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "zoo.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _refused(data: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Zoo, data, where="zoo.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scientific_notation_is_a_float(tmp_path: Path) -> None:
    assert load_yaml(_write(tmp_path, "rate: 1e-4\n")) == {"rate": 1e-4}


def test_overrides_reach_mappings_lists_and_named_entries(tmp_path: Path) -> None:
    path = _write(tmp_path, "name: a\npets:\n  - {name: tom, lives: 9}\n  - {name: kit, lives: 8}\n")
    data = load_yaml(path, ["name=b", "pets.0.lives=1", "pets.kit.lives=2", "best.lives=3", "rate=1e-3", "mood=null"])
    assert data == {
        "name": "b",
        "rate": 1e-3,
        "mood": None,
        "best": {"lives": 3},
        "pets": [{"name": "tom", "lives": 1}, {"name": "kit", "lives": 2}],
    }


def test_an_override_value_may_hold_equal_signs_and_lists() -> None:
    data: dict[str, object] = {}
    apply_override(data, "a.b=x=y")
    apply_override(data, "c=[1, two]")
    assert data == {"a": {"b": "x=y"}, "c": [1, "two"]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rate", "override 'rate' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("a..b=3", "override 'a..b=3' is not of the form key=value"),
        ("rate=[1", "override 'rate=[1': the value '[1' is not valid YAML"),
        ("rate.x=1", "override 'rate.x=1': 'rate' is 0.5, which has no keys inside"),
        ("pets.tim.lives=1", "the list has no entry 'tim'. Did you mean 'tom'?"),
        ("pets.7=1", "the list has no entry '7'"),
    ],
)
def test_a_bad_override_is_named(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_override({"rate": 0.5, "pets": [{"name": "tom"}]}, override)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "zoo.yaml:2: found duplicate key name"),
        ("name: a\npets: [1\nx: 2\n", "zoo.yaml:3: "),
        ("name: !!python/object/apply:os.getcwd []\n", "zoo.yaml:1: could not determine a constructor"),
        ("", "the file is empty"),
        ("- a\n", "the file is a list"),
        ("name: ${nowhere}\n", "nowhere"),
        ("name: ???\n", "name"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_yaml(_write(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"bytes\.yaml"):
        load_yaml(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"nam": "a"}, "zoo.yaml: unknown key 'nam' (value 'a'). Did you mean 'name'? (and 1 more)."),
        ({"name": "a", "best": {"kind": "cat", "live": 3}}, "unknown key 'best.live' (value 3). Did you mean 'lives'?"),
        (
            {"name": "a", "pets": [{"kind": "dog", "trick": 1}]},
            "unknown key 'pets.0.trick' (value 1). Did you mean 'tricks'?",
        ),
        ({"name": "a", "pets": [{"kind": "cow"}]}, "'pets.0.kind' is 'cow'. Known: cat, dog."),
        ({"name": "a", "pets": [{"kind": "dg"}]}, "'pets.0.kind' is 'dg'. Did you mean 'dog'?"),
        ({"name": "a", "pets": [{}]}, "'pets.0' needs the key 'kind'"),
        (
            {"name": "a", "pets": [{"kind": "cat", "lives": 0}]},
            "'pets.0.lives' is 0: it should be greater than or equal to 1.",
        ),
        (
            {"name": "a", "pets": [{"kind": "dog", "tricks": {"sit": "x"}}]},
            "'pets.0.tricks.sit' is 'x': it should be a valid",
        ),
        ({"name": "a", "mood": "hapy"}, "'mood' is 'hapy': it should be 'happy' or 'sleepy'. Did you mean 'happy'?"),
        ({"name": "a", "mood": "zzz"}, "'mood' is 'zzz': it should be 'happy' or 'sleepy'."),
        ({"name": "a", "rate": float("nan")}, "'rate' is nan: it should be a finite number."),
        ({}, "zoo.yaml: the key 'name' is missing."),
        ([], "zoo.yaml: it should be a mapping of keys to values"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_path_the_user_wrote(data: object, expected: str) -> None:
    assert expected in _refused(data)


def test_an_override_of_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    data = load_yaml(_write(tmp_path, "name: a\nbest: {kind: cat}\n"), ["best.livse=2"])
    assert "unknown key 'best.livse' (value 2). Did you mean 'lives'?" in _refused(data)


def test_configurations_are_frozen() -> None:
    zoo = parse(Zoo, {"name": "a"}, where="test")
    with pytest.raises(ValueError, match="frozen"):
        zoo.name = "b"  # type: ignore[misc]


@dataclass
class Point:
    x: int
    where: Path


def test_the_content_hash_sees_content_only() -> None:
    assert content_hash(parse(Zoo, {"name": "a"}, where="t")) == content_hash(Zoo(name="a", rate=0.5))
    assert content_hash(Zoo(name="a")) != content_hash(Zoo(name="a", rate=0.25))
    assert content_hash(Point(1, Path("a/b"))) == content_hash({"where": "a/b", "x": 1})
    assert content_hash({"s": {3, 1, 2}}) == content_hash({"s": {2, 3, 1}})
    assert len(content_hash(None)) == 16
    with pytest.raises(ValueError, match="JSON"):
        content_hash(float("nan"))


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none()))
def test_the_content_hash_does_not_depend_on_the_order_of_keys(data: dict[str, object]) -> None:
    assert content_hash(data) == content_hash(dict(reversed(data.items())))
