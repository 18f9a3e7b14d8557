"""Plug-ins by entry point: the harness finds drafters, objectives and trainers without importing their packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from vsdbench.errors import ConfigError, did_you_mean

Group = Literal["vsdbench.drafters", "vsdbench.objectives", "vsdbench.peers", "vsdbench.trainers"]


def _found(group: Group) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: Group) -> list[str]:
    """Return the names registered in a group, sorted; nothing is imported."""
    return sorted(_found(group))


def load(group: Group, name: str) -> Any:  # noqa: ANN401 - what a plug-in registers is the group's contract
    """Return the object that a plug-in registered under ``name``.

    Raises:
        ConfigError: The name is unknown (with the closest one), or importing the plug-in failed (with its cause).
    """
    found = _found(group)
    if name not in found:
        singular = group.rpartition(".")[2].removesuffix("s")
        raise ConfigError(f"unknown {singular} '{name}'.{did_you_mean(name, found)}")
    point = found[name]
    try:
        return point.load()
    except Exception as error:  # a plug-in may fail in any way, and it must say its name when it does
        cause = f"{type(error).__name__}: {error}".rstrip(".")
        raise ConfigError(f"the plug-in '{name}' ({point.value}, group {group}) cannot be loaded: {cause}.") from error
