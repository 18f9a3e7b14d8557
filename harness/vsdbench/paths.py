"""Where things lie: the cache, the results, the reports, and the suites and recipes in a checkout or in the wheel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import platformdirs

from vsdbench.errors import ConfigError, did_you_mean

DataKind = Literal["suites", "recipes"]

_PACKAGE = Path(__file__).parent
_IN_ROOT: dict[DataKind, tuple[str, ...]] = {"suites": ("suites",), "recipes": ("drafters/recipes", "recipes")}


def cache_dir() -> Path:
    """Return the folder of everything that can be fetched or made again (``VSDBENCH_CACHE``); it may not exist yet."""
    configured = os.environ.get("VSDBENCH_CACHE")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_cache_dir("vsdbench"))


def results_dir(flag: Path | str | None = None) -> Path:
    """Return the folder of runs: the flag, ``VSDBENCH_RESULTS``, or ``results`` in the checkout or where we are."""
    return _output_dir(flag, "VSDBENCH_RESULTS", "results")


def reports_dir() -> Path:
    """Return the folder of reports: ``VSDBENCH_REPORTS``, or ``reports`` in the checkout or where we are."""
    return _output_dir(None, "VSDBENCH_REPORTS", "reports")


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


def _folders(kind: DataKind) -> list[Path]:
    """Return the folders to look in, the most specific first."""
    folders: list[Path] = []
    if root := os.environ.get("VSDBENCH_DATA"):
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"VSDBENCH_DATA names '{root}', which is not a folder; give one that has {kind} in it.")
        folders += [*(folder / inside for inside in _IN_ROOT[kind]), folder]
    if checkout := checkout_root():
        folders += [checkout / inside for inside in _IN_ROOT[kind]]
    folders.append(_PACKAGE / "data" / kind)
    installed_from = _PACKAGE.parents[1]  # an editable install has no package data but its own checkout
    if _has_suites(installed_from):
        folders += [installed_from / inside for inside in _IN_ROOT[kind]]
    return folders


def list_data(kind: DataKind) -> dict[str, Path]:
    """Return the suites or recipes that can be named, by name; the nearest of two namesakes wins."""
    known: dict[str, Path] = {}
    for folder in _folders(kind):
        for path in folder.glob("*.yaml"):
            known.setdefault(path.stem, path)
    return dict(sorted(known.items()))


def locate(kind: DataKind, name_or_path: str | Path) -> tuple[Path, str | None]:
    """Return where a suite or recipe lies, and a sentence to print where its namesake from elsewhere is taken.

    Args:
        kind: ``suites`` or ``recipes``.
        name_or_path: A bare name (``mtbench``) or a path (``suites/mtbench.yaml``). A path that is not there falls
            back to a known file of the same name.

    Raises:
        ConfigError: There is no such file and no such name, with the closest name.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    is_path = path.suffix in {".yaml", ".yml"} or len(path.parts) > 1
    if is_path and path.is_file():
        return path, None
    known = list_data(kind)
    name = path.stem if is_path else text
    singular = kind.removesuffix("s")
    if name not in known:
        problem = f"there is no file '{text}'" if is_path else f"unknown {singular} '{text}'"
        raise ConfigError(f"{problem}.{did_you_mean(name, known)}")
    found = known[name]
    return found, f"There is no file '{text}' here; using the {singular} '{name}' from {found}." if is_path else None


def find_data(kind: DataKind, name_or_path: str | Path) -> Path:
    """Return the path of a suite or recipe; ``locate`` says more, and takes and raises the same."""
    return locate(kind, name_or_path)[0]


def sizes_below(folder: Path, suffix: str = "") -> Iterator[int]:
    """Yield the size in bytes of every file below a folder whose name ends so; none if there is no such folder.

    Others may write and delete there meanwhile: what has gone when it is looked at is left out. (A recursive glob
    ends with an error where a folder goes.)
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(suffix):
                try:
                    size = Path(parent, name).lstat().st_size
                except OSError:
                    continue
                yield size
