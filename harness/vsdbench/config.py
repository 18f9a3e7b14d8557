"""Configuration: YAML that means what it says, validated once, with every mistake answered by one helpful sentence.

YAML goes through OmegaConf because plain PyYAML reads ``1e-4`` as a string. Models are frozen and refuse unknown keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from vsdbench.errors import ConfigError, did_you_mean


class Config(BaseModel):
    """Base of every model that is read from YAML: frozen, unknown keys refused, no NaN and no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_yaml(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, with ``key=value`` overrides applied.

    Args:
        path: The file, UTF-8.
        overrides: ``dotted.key=value`` each; the value is YAML. Entries of a list are addressed by index or, when
            they have one, by ``name``: ``drafters.eagle3-ce.tree.budget=15``.

    Raises:
        ConfigError: No such file, not YAML (with file and line), a duplicate key, not a mapping, a bad override.
    """
    path = Path(path)
    try:
        loaded = OmegaConf.load(path)
        data = OmegaConf.to_container(loaded, resolve=True, throw_on_missing=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or error.context or 'not valid YAML'}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a UTF-8 YAML file ({_one_line(error)}).") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_one_line(error)}.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or _one_line(error)}).") from error
    if not isinstance(data, dict) or not data:
        kind = "empty" if not data else f"a {type(data).__name__}"
        raise ConfigError(f"{path}: the file is {kind}, where a mapping of keys to values is needed.")
    result = {str(key): value for key, value in data.items()}
    for override in overrides:
        apply_override(result, override)
    return result


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in ``data``, in place; keys that are not there yet are made (and refused by parse).

    >>> data = {"modes": [{"name": "greedy", "temperature": 0}]}
    >>> apply_override(data, "modes.greedy.temperature=1e-1")
    >>> data["modes"][0]["temperature"]
    0.1

    Raises:
        ConfigError: There is no ``=``, the value is not YAML, or the path leads through something that has no keys.
    """
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{override}' is not of the form key=value (for example seed=1).")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override '{override}': the value '{text}' is not valid YAML.") from error
    assert isinstance(value, dict)
    node: Any = data
    for position, part in enumerate(keys[:-1]):
        child = _child(node, part, override)
        if child is None:
            child = {}
            _put(node, part, child, override)
        if not isinstance(child, dict | list):
            parent = ".".join(keys[: position + 1])
            raise ConfigError(f"override '{override}': '{parent}' is {child!r}, which has no keys inside.")
        node = child
    _put(node, keys[-1], value["value"], override)


def _child(node: dict[str, Any] | list[Any], key: str, override: str) -> Any:  # noqa: ANN401 - YAML has no one type
    return node[_list_index(node, key, override)] if isinstance(node, list) else node.get(key)


def _put(node: dict[str, Any] | list[Any], key: str, value: object, override: str) -> None:
    if isinstance(node, list):
        node[_list_index(node, key, override)] = value
    else:
        node[key] = value


def _list_index(entries: list[Any], key: str, override: str) -> int:
    """Return the index that ``key`` means in a list: a number, or the ``name`` of one of its entries."""
    if key.isdecimal() and int(key) < len(entries):
        return int(key)
    names = [str(entry.get("name", "")) if isinstance(entry, dict) else "" for entry in entries]
    if key in names:
        return names.index(key)
    known = [name for name in names if name] or [str(index) for index in range(len(entries))]
    raise ConfigError(f"override '{override}': the list has no entry '{key}'.{did_you_mean(key, known)}")


def parse(model_cls: type[ConfigT], data: object, *, where: str) -> ConfigT:
    """Return ``data`` as a ``model_cls``.

    Args:
        model_cls: The model to validate against.
        data: What was read, usually a mapping.
        where: What the sentence starts with: a file name, or words such as ``command line``.

    Raises:
        ConfigError: One sentence about the most telling of the errors: unknown keys first, since a typo in a required
            key also shows as a missing one.
    """
    try:
        return model_cls.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
        place = _resolve(model_cls, first["loc"])[0]
        others = [detail for detail in details if detail is not first]
        forms = [detail for detail in others if _resolve(model_cls, detail["loc"])[0] == place]  # of a union
        sentence = _sentence(model_cls, first, forms)
        if len(others) > len(forms):
            sentence = f"{sentence.removesuffix('.')} (and {len(others) - len(forms)} more)."
        raise ConfigError(f"{where}: {sentence}") from error


def _sentence(model_cls: type[BaseModel], detail: ErrorDetails, forms: Sequence[ErrorDetails]) -> str:
    """Return one sentence for one pydantic error: where, what was there, what would be right.

    Args:
        model_cls: The model.
        detail: The error.
        forms: Errors of the same place, which may have one of several forms.
    """
    path, known = _resolve(model_cls, detail["loc"])
    value, context = detail["input"], detail.get("ctx", {})
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{path}' (value {short(value)}).{did_you_mean(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"the key '{path}' is missing."
    if detail["type"] == "union_tag_not_found":
        return f"'{path}' needs the key {context['discriminator']}, which says what kind it is."
    if detail["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        key = str(context["discriminator"]).strip("'")
        return f"'{path}.{key}' is '{context['tag']}'.{did_you_mean(str(context['tag']), tags)}"
    subject = f"'{path}' is {short(value)}" if path and not isinstance(value, dict) else f"'{path}'" if path else ""
    message = " or ".join([_wanted(detail), *(_wanted(form).removeprefix("it should be ") for form in forms)])
    hint = ""
    if detail["type"] == "literal_error" and isinstance(value, str):
        close = did_you_mean(value, re.findall(r"'([^']*)'", context["expected"]))
        hint = close if close.startswith(" Did") else ""
    return f"{subject}: {message}.{hint}" if subject else f"{message}.{hint}"


def _wanted(detail: ErrorDetails) -> str:
    """Return what pydantic says would be right, in this project's words."""
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if detail["type"] == "value_error":
        return message
    message = re.sub(r"^(Input|String|List|Tuple|Value) should", "it should", message).removesuffix(
        ", unable to interpret input"
    )
    message = re.sub(r"a valid dictionary( or .*)?$", "a mapping of keys to values", message)
    return message.replace("a valid tuple", "a list").replace(" after validation", "")


def _resolve(model_cls: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """Return the path of an error as the user wrote it (union tags left out), and the keys known at its parent."""
    types: list[Any] = [model_cls]
    shown: list[str] = []
    known: list[str] = []
    for part in loc:
        types = _expand(types)
        models = [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]
        known = [name for model in models for name in model.model_fields]
        if isinstance(part, int):
            types = [arg for t in types if get_origin(t) in {list, tuple} for arg in get_args(t) if arg is not ...]
            shown.append(str(part))
        elif any(part in model.model_fields for model in models):
            types = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            shown.append(part)
        elif tagged := [model for model in models if part in _tags(model)]:
            types = list(tagged)
        else:
            types = [get_args(t)[1] for t in types if get_origin(t) is dict]
            if types or (models and part is loc[-1]):
                shown.append(part)
    return ".".join(shown), known


def _expand(types: Sequence[Any]) -> list[Any]:
    """Return the types with ``Annotated`` and unions taken apart."""
    flat: list[Any] = []
    for candidate in types:
        origin = get_origin(candidate)
        if origin is Annotated:
            flat += _expand([get_args(candidate)[0]])
        elif origin in {Union, UnionType}:
            flat += _expand(get_args(candidate))
        else:
            flat.append(candidate)
    return flat


def _tags(model: type[BaseModel]) -> set[str]:
    """Return the values of the model's literal fields, and its name: what pydantic uses as the tag of a union."""
    literals = [field.annotation for field in model.model_fields.values() if get_origin(field.annotation) is Literal]
    return {model.__name__, *(str(value) for literal in literals for value in get_args(literal))}


def short(value: object) -> str:
    """Return a value as Python writes it, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def content_hash(obj: object) -> str:
    """Return 16 hexadecimal digits that depend on the content alone: sha256 of canonical JSON.

    Models, dataclasses, mappings, sequences, sets and paths are taken apart; key order does not matter.

    >>> content_hash({"a": 1, "b": (2, 3)}) == content_hash({"b": [2, 3], "a": 1})
    True

    Raises:
        TypeError: Something in ``obj`` has no JSON form.
        ValueError: A float is NaN or infinite.
    """
    text = json.dumps(_plain(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(obj: object) -> object:
    """Return ``obj`` as dicts, lists, strings, numbers, booleans and None."""
    if isinstance(obj, BaseModel):
        return _plain(obj.model_dump(mode="json"))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, set | frozenset):
        return sorted((_plain(item) for item in obj), key=repr)
    if isinstance(obj, list | tuple):
        return [_plain(item) for item in obj]
    return str(obj) if isinstance(obj, Path) else obj
