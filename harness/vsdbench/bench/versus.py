"""Two drafters that are in no run yet: one run decodes both on a suite, block by block, to compare them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vsdbench import registry
from vsdbench.bench.compare import Side, load_side
from vsdbench.bench.methods import REFERENCE
from vsdbench.bench.run import RunOptions, open_suite, run_suite
from vsdbench.config import parse
from vsdbench.errors import ConfigError
from vsdbench.paths import results_dir
from vsdbench.suites.schema import DrafterEntry, SuiteConfig

if TYPE_CHECKING:
    from rich.console import Console


def decode_both(specs: Sequence[str], suite: str, options: RunOptions, console: Console) -> list[Side]:
    """Return both sides, decoded by one run of ``suite`` with these two drafters and plain decoding alone.

    A run like it that was left unfinished goes on.

    Args:
        specs: Two of: a drafter of the suite, a folder of weights (``TYPE:PATH`` where the suite's first drafter with
            weights is of another type), a recipe.
        suite: On which prompts.
        options: From the command line.
        console: Where notes and progress go.

    Raises:
        ConfigError: Anything that is wrong with the drafters or the suite, or both drafters are one.
        InterruptedRunError: Ctrl-C; everything measured so far is kept.
    """
    opened = open_suite(suite, options, console)
    entries = [find_drafter(spec, opened.config) for spec in specs]
    if entries[0] == entries[1]:
        raise ConfigError(f"Both sides are '{specs[0]}', but a comparison needs two drafters.")
    if entries[0].name == entries[1].name:
        entries = [entry.model_copy(update={"name": f"{entry.name}-{side}"})
                   for entry, side in zip(entries, "ab", strict=True)]  # fmt: skip
    content = opened.config.model_dump(mode="json")
    content |= {"drafters": [entry.model_dump(mode="json") for entry in entries], "baselines": [REFERENCE], "once": []}
    config = parse(SuiteConfig, content, where=str(opened.path))
    folder, _ = run_suite(replace(opened, config=config), options, console)
    return [load_side(f"{folder}:{entry.name}", results_dir(options.results)) for entry in entries]


def find_drafter(spec: str, suite: SuiteConfig) -> DrafterEntry:
    """Return the drafter that ``spec`` names, with the tree that the suite has for its type.

    Raises:
        ConfigError: It is no drafter of the suite, no folder and no recipe, or no drafter of the suite has weights.
    """
    for entry in suite.drafters:
        if entry.name == spec:
            return entry
    kind, _, rest = spec.partition(":")
    for path, of_type in ((spec, None), (rest, kind)):
        if path and Path(path).expanduser().is_dir():
            entry = _template(suite, of_type)
            name = _name(Path(path).expanduser().resolve().name)
            return entry.model_copy(update={"name": name, "checkpoint": path, "recipe": None})
    try:
        recipe = registry.load("vsdbench.trainers", "load")(spec)
    except ConfigError as error:
        names = ", ".join(entry.name for entry in suite.drafters)
        raise ConfigError(
            f"'{spec}' is no drafter of the suite '{suite.name}' ({names}) and no folder of weights, and as a recipe: "
            f"{error}"
        ) from error
    entry = _template(suite, recipe.architecture.type)
    return entry.model_copy(update={"name": _name(recipe.name), "checkpoint": None, "recipe": spec})


def _template(suite: SuiteConfig, kind: str | None) -> DrafterEntry:
    """Return the suite's drafter of a type, or with the tree of another where it has none; of any type for None."""
    trained = [entry for entry in suite.drafters if entry.recipe or entry.checkpoint]
    found = next((entry for entry in trained if kind in {None, entry.type}), None)
    if found is not None:
        return found
    if kind is None:
        raise ConfigError(
            f"The suite '{suite.name}' has no drafter with weights, so the type of these is unknown; name it, for "
            "example eagle3:PATH."
        )
    trees = [entry.tree for entry in trained or suite.drafters]
    return DrafterEntry(name=kind, type=kind, **({"tree": trees[0]} if trees else {}))


def _name(text: str) -> str:
    """Return ``text`` as a drafter may be called.

    >>> _name("contest-hour:vsd@0"), _name("_a b")
    ('contest-hour-vsd@0', 'a-b')
    """
    base, at, seed = text.rpartition("@")
    if not at or not seed.isdigit():
        base, at, seed = text, "", ""
    return (re.sub(r"[^A-Za-z0-9._-]+", "-", base).lstrip("._-") or "drafter") + at + seed
