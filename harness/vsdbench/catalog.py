"""What there is: suites, recipes, objectives, drafters, models and runs; listed, shown, copied and validated."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vsdbench import registry
from vsdbench.config import load_yaml, parse
from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.models.source import describe, list_models
from vsdbench.paths import cache_dir, list_data, results_dir
from vsdbench.pictures.settings import BUILT_MODELS, METADATA, built_folder
from vsdbench.store.store import list_runs, load_manifest
from vsdbench.suites.schema import SuiteConfig, check_plugins

KINDS = ("suites", "recipes", "objectives", "drafters", "peers", "models", "runs")


def entries(kind: str, results: Path | None = None) -> list[dict[str, Any]]:
    """Return one dict an entry, each with a ``name`` and a ``description``.

    Raises:
        ConfigError: ``kind`` is not one of ``KINDS``.
    """
    listers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "suites": lambda: [_from_yaml(name, path) for name, path in sorted(list_data("suites").items())],
        "recipes": lambda: [_from_yaml(name, path) for name, path in sorted(list_data("recipes").items())],
        "objectives": lambda: _from_plugins("vsdbench.objectives"),
        "drafters": lambda: _from_plugins("vsdbench.drafters"),
        "peers": lambda: _from_plugins("vsdbench.peers"),
        "models": lambda: [{"name": name, "description": _cached(name)} for name in list_models()],
        "runs": lambda: [_from_run(run) for run in list_runs(results_dir(results))],
    }
    if kind not in listers:
        raise ConfigError(f"There is no list of '{kind}'.{did_you_mean(kind, KINDS)}")
    return listers[kind]()


def find(name: str) -> tuple[str, Path | None, str]:
    """Return kind, file (None for a plug-in) and text of a suite, recipe, objective or drafter.

    Raises:
        ConfigError: Nothing has that name.
    """
    known: list[str] = []
    for kind in ("suites", "recipes"):
        data = list_data(kind)
        known += data
        stem = Path(name).stem if name.endswith(".yaml") else name
        if stem in data:
            return kind.removesuffix("s"), data[stem], data[stem].read_text(encoding="utf-8")
    for group in ("vsdbench.objectives", "vsdbench.drafters", "vsdbench.peers"):
        names = registry.names(group)
        known += names
        if name in names:
            return group.removeprefix("vsdbench.").removesuffix("s"), None, _documentation(registry.load(group, name))
    raise ConfigError(f"Nothing is called '{name}'.{did_you_mean(name, known)}")


def copy(name: str, destination: Path) -> Path:
    """Copy a suite or recipe out of the package, for editing, and return where it is.

    Raises:
        ConfigError: No such suite or recipe, or the file is there already.
    """
    kind, path, _ = find(name)
    if path is None:
        raise ConfigError(f"'{name}' is among the {kind}s, which are no files: only suites and recipes can be copied.")
    is_file = destination.suffix in {".yaml", ".yml"} and not destination.is_dir()
    target = destination if is_file else destination / path.name
    if target.exists():
        raise ConfigError(f"'{target}' exists already: choose another name or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return target


def validate(path: Path) -> str:
    """Check a suite or recipe file and return which of the two it is.

    Raises:
        ConfigError: The first thing that is wrong with it.
    """
    data = load_yaml(path)
    if "sources" in data or "modes" in data:
        suite = parse(SuiteConfig, data, where=str(path))
        check_plugins(suite, str(path))
        return "suite"
    registry.load("vsdbench.trainers", "check")(data, str(path))
    return "recipe"


def _from_yaml(name: str, path: Path) -> dict[str, Any]:
    try:
        description = load_yaml(path).get("description", "")
    except ConfigError as error:  # one broken file must not hide the others
        description = f"cannot be read: {error}"
    return {"name": name, "description": description, "path": str(path)}


def _from_plugins(group: registry.Group) -> list[dict[str, Any]]:
    return [
        {"name": name, "description": _documentation(registry.load(group, name)).partition("\n")[0]}
        for name in registry.names(group)
    ]


def _documentation(plugin: Any) -> str:  # noqa: ANN401 - whatever the plug-in registered
    """Return the docstring of a class or of a peer's build function, or of the module that a ``build`` stands in."""
    documented = inspect.getmodule(plugin) if getattr(plugin, "__name__", "") == "build" else plugin
    return inspect.getdoc(documented) or ""


def _from_run(run: Path) -> dict[str, Any]:
    try:
        manifest = load_manifest(run)
        description = f"{manifest.get('target')} · {manifest.get('dtype')} · {manifest.get('status')}"
    except ConfigError as error:
        description = f"cannot be read: {error}"
    return {"name": run.name, "description": description, "path": str(run)}


def _cached(name: str) -> str:
    if name in BUILT_MODELS:
        state = "in the cache" if (built_folder(name) / METADATA).is_file() else "built when first used"
    else:
        cached = any((cache_dir() / "models").glob(f"{name}-*"))
        state = "in the cache" if cached else "fetched from the package index when first used"
    return f"{describe(name)}; {state}"
