"""Where things lie: the cache, the results, the reports, and the suites and recipes in a checkout or in the wheel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from vsdbench.errors import ConfigError, did_you_mean

DataKind = Literal["suites", "recipes"]
Origin = Literal["path", "flag", "environment", "checkout", "package"]

_PACKAGE = Path(__file__).parent
_IN_ROOT: dict[DataKind, tuple[str, ...]] = {"suites": ("suites",), "recipes": ("drafters/recipes", "recipes")}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A suite or a recipe that was found.

    Attributes:
        path: The YAML file.
        origin: Where it was found: the path given, the flag's folder, ``VSDBENCH_DATA``, the checkout, the package.
        note: None, or the sentence to print when the path that was asked for is not there and its namesake is used.
    """

    path: Path
    origin: Origin
    note: str | None = None


def cache_dir() -> Path:
    """Return the folder of everything that can be fetched or made again (``VSDBENCH_CACHE``); it may not exist yet."""
    configured = os.environ.get("VSDBENCH_CACHE")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_cache_dir("vsdbench"))


def results_dir(flag: Path | str | None = None) -> Path:
    """Return the folder of runs: the flag, ``VSDBENCH_RESULTS``, or ``results`` in the checkout or where we are."""
    return _output_dir(flag, "VSDBENCH_RESULTS", "results")


def reports_dir(flag: Path | str | None = None) -> Path:
    """Return the folder of reports: the flag, ``VSDBENCH_REPORTS``, or ``reports`` in the checkout or where we are."""
    return _output_dir(flag, "VSDBENCH_REPORTS", "reports")


def _output_dir(flag: Path | str | None, variable: str, name: str) -> Path:
    configured = flag or os.environ.get(variable)
    if configured:
        return Path(configured).expanduser()
    return (checkout_root() or Path.cwd()) / name


def checkout_root() -> Path | None:
    """Return the nearest folder, from here upwards, that has YAML files in ``suites/``; None if there is none."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if _has_suites(folder)), None)


def _has_suites(folder: Path) -> bool:
    return any((folder / "suites").glob("*.yaml"))


def _folders(kind: DataKind, flag: Path | str | None) -> list[tuple[Origin, Path]]:
    """Return the folders to look in, the most specific first."""
    folders: list[tuple[Origin, Path]] = []
    given: list[tuple[Origin, Path | str | None]] = [("flag", flag), ("environment", os.environ.get("VSDBENCH_DATA"))]
    for origin, root in given:
        if root:
            folder = Path(root).expanduser()
            if not folder.is_dir():
                name = "the data flag" if origin == "flag" else "VSDBENCH_DATA"
                raise ConfigError(f"{name} names '{root}', which is not a folder; give one that has {kind} in it.")
            folders += [(origin, folder / inside) for inside in _IN_ROOT[kind]] + [(origin, folder)]
    checkout = checkout_root()
    if checkout:
        folders += [("checkout", checkout / inside) for inside in _IN_ROOT[kind]]
    folders.append(("package", _PACKAGE / "data" / kind))
    installed_from = _PACKAGE.parents[1]  # an editable install has no package data but its own checkout
    if _has_suites(installed_from):
        folders += [("package", installed_from / inside) for inside in _IN_ROOT[kind]]
    return folders


def _known(kind: DataKind, flag: Path | str | None) -> dict[str, DataFile]:
    known: dict[str, DataFile] = {}
    for origin, folder in _folders(kind, flag):
        for path in sorted(folder.glob("*.yaml")):
            known.setdefault(path.stem, DataFile(path=path, origin=origin))
    return known


def list_data(kind: DataKind, flag: Path | str | None = None) -> dict[str, Path]:
    """Return the suites or recipes that can be named, by name; the nearest of two namesakes wins."""
    return {name: found.path for name, found in sorted(_known(kind, flag).items())}


def locate(kind: DataKind, name_or_path: str | Path, flag: Path | str | None = None) -> DataFile:
    """Return where a suite or recipe lies, and how it was found.

    Args:
        kind: ``suites`` or ``recipes``.
        name_or_path: A bare name (``mtbench``) or a path (``suites/mtbench.yaml``). A path that is not there falls
            back to a known file of the same name, which the result's ``note`` says.
        flag: The folder given on the command line, if any: one that has ``suites/`` (or the YAML files) in it.

    Raises:
        ConfigError: There is no such file and no such name, with the closest name.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    is_path = path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
    if is_path and path.is_file():
        return DataFile(path=path, origin="path")
    known = _known(kind, flag)
    name = path.stem if is_path else text
    found = known.get(name)
    singular = kind.removesuffix("s")
    if found is None:
        problem = f"there is no file '{text}'" if is_path else f"unknown {singular} '{text}'"
        raise ConfigError(f"{problem}.{did_you_mean(name, known)}")
    if not is_path:
        return found
    note = f"There is no file '{text}' here; using the {singular} '{name}' from {found.path}."
    return DataFile(path=found.path, origin=found.origin, note=note)


def find_data(kind: DataKind, name_or_path: str | Path, flag: Path | str | None = None) -> Path:
    """Return the path of a suite or recipe; ``locate`` says more, and takes and raises the same."""
    return locate(kind, name_or_path, flag).path
