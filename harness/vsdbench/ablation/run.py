"""One ablation from its flags to its result: a contest is written, and one ordinary run trains and decodes its cells.

The contest file lies in the cache under the hash of its content and is named by the run, so every cell is a recipe
like any other: trained once, resumed where it stopped, found again. All cells are decoded block by block in one run,
which is what makes their times comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vsdbench import registry
from vsdbench.ablation import contest, grid
from vsdbench.ablation.analysis import analyse
from vsdbench.ablation.grid import Arm, Base, Wanted
from vsdbench.bench.estimate import estimate
from vsdbench.bench.run import RunOptions, open_suite, run_suite
from vsdbench.config import content_hash, parse
from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.paths import cache_dir
from vsdbench.store.files import write_atomic
from vsdbench.store.store import load_manifest, load_records
from vsdbench.suites.loaders import Suite
from vsdbench.suites.schema import DrafterEntry, SuiteConfig

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.bench.methods import Method
    from vsdbench.bench.summary import Summary

RECIPE, SUITE = "ablation-quickstart", "ablation"
CONTEST, CONTEST_SUITE = "contest-quickstart", "contest"
"""What is taken apart, and what is compared where a contest's arms are asked for, unless another is named."""
FAMILY = "ablation.yaml"
"""Name of the contest file in a run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An ablation that can be run.

    Attributes:
        base: What all arms share.
        arms: The reference, what is compared with it, the trained controls.
        suite: With one drafter a cell, and the untouched warm start.
        family: The contest file, as the suite names it.
        notes: Sentences that the user must see.
    """

    base: Base
    arms: tuple[Arm, ...]
    suite: Suite
    family: str
    notes: tuple[str, ...]


def prepare(
    recipe: str | None,
    wanted: Wanted,
    options: RunOptions,
    console: Console,
    *,
    suite: str | None = None,
    num_seeds: int | None = None,
) -> Plan:
    """Return what would be run; the contest file is written, nothing is loaded or trained.

    Args:
        recipe: What is taken apart, or the contest; None: ``RECIPE`` or ``CONTEST``.
        wanted: Which arms.
        options: From the command line; overrides go to the recipe or to the suite, by their first key.
        console: Where downloads show their progress.
        suite: On which prompts; None: ``SUITE`` or ``CONTEST_SUITE``.
        num_seeds: Training seeds; None: those of the recipe.

    Raises:
        ConfigError: Anything that is wrong with recipe, arms, suite or overrides.
        EnvironmentProblemError: The suite's data cannot be fetched.
    """
    for_recipe, for_suite = split_overrides(options.overrides)
    of_contest = wanted.contest or bool(wanted.arms)
    recipe = recipe or (CONTEST if of_contest else RECIPE)
    suite = suite or (CONTEST_SUITE if of_contest else SUITE)
    names = contest.arm_names(recipe, wanted.arms) if of_contest else []
    base = grid.load_base(recipe, for_recipe, num_seeds=num_seeds, target=options.target)
    others, notes = contest.read_arms(names, for_recipe) if names else ([], [])
    compared, left_out = grid.chosen_arms(base, wanted, others)
    controls, dropped = contest.controls_beside(base, compared)
    notes += [*left_out, *dropped]
    arms = (Arm(name=grid.REFERENCE), *compared, *controls)
    raw = grid.family(base, arms)
    opened = open_suite(suite, replace(options, overrides=for_suite, target=base.target), console)
    template = _template(opened.config, base)
    path = _write(raw, cache_dir() / "ablations" / f"{base.name}-{content_hash(raw)}.yaml")
    recipes = {name: f"{path}:{name}" for arm in arms for name in method_names(arm, base.seeds)}
    recipes[grid.WARM_START] = str(base.recipe["warm_start"])
    entries = [template.model_copy(update={"name": name, "recipe": value}) for name, value in recipes.items()]
    content = opened.config.model_dump(mode="json") | {"drafters": [entry.model_dump(mode="json") for entry in entries]}
    config = parse(SuiteConfig, content, where=str(opened.path))
    if len(base.seeds) == 1:
        notes.append("One training seed: intervals are over prompts only; a claim needs --seeds 3.")
    return Plan(base=base, arms=arms, suite=replace(opened, config=config), family=path, notes=tuple(notes))


def run_ablation(plan: Plan, options: RunOptions, console: Console) -> tuple[Path, Summary, dict[str, Any]]:
    """Train what is missing, decode all cells, and return the run's folder, its summary and the ablation's result.

    Raises:
        InterruptedRunError: Ctrl-C; everything measured so far is kept.
    """
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}")
    folder, summary = run_suite(plan.suite, options, console, extra=lambda methods: describe(plan, methods))
    family = Path(plan.family).expanduser().read_bytes()
    write_atomic(folder / FAMILY, family)
    return folder, summary, analyse(load_records(folder), load_manifest(folder))


def describe(plan: Plan, methods: Sequence[Method]) -> dict[str, Any]:
    """Return what the manifest says of an ablation, under ``ablation``; budgets are means over seeds."""
    training = {method.name: method.training for method in methods}

    def entry(arm: Arm, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        return {
            "name": arm.name,
            "disabled": list(arm.disabled),
            "change": dict(arm.change),
            "control": arm.control,
            "seeds": list(seeds),
            "methods": list(names),
            "budget": _budget([training[name] for name in names] if seeds else []),
        }

    arms = [entry(arm, method_names(arm, plan.base.seeds), plan.base.seeds) for arm in plan.arms]
    untouched = entry(Arm(name=grid.WARM_START, control=True), [grid.WARM_START], [])
    told = {"reference": grid.REFERENCE, "recipe": plan.base.name, "arms": [*arms, untouched]}
    return {"ablation": told}


def estimate_ablation(plan: Plan, options: RunOptions, console: Console) -> dict[str, Any]:
    """Return what an ablation would cost: ``bench.estimate``'s result with ``cells``, one a drafter to be trained.

    A cell has ``arm``, ``change``, ``seed``, ``recipe``, ``cached`` and ``seconds``; seed is None for the warm start.
    """
    result = estimate(plan.suite, options, console)
    training = {entry["recipe"]: entry for entry in result.pop("training")}
    recipes = {entry.name: str(entry.recipe) for entry in plan.suite.config.drafters}
    cells = [
        {"arm": arm.name, "change": dict(arm.change), "seed": seed} | training[recipes[name]]
        for arm in plan.arms
        for seed, name in zip(plan.base.seeds, method_names(arm, plan.base.seeds), strict=True)
    ]
    warm = {"arm": grid.WARM_START, "change": {}, "seed": None} | training[recipes[grid.WARM_START]]
    return result | {"recipe": plan.base.name, "cells": [warm, *cells]}


def method_names(arm: Arm, seeds: Sequence[int]) -> list[str]:
    """Return what an arm's drafters are called in the run.

    >>> method_names(Arm(name="no-car"), (0, 1))
    ['no-car@0', 'no-car@1']
    """
    return [f"{arm.name}@{seed}" for seed in seeds]


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides of the recipe and those of the suite, told apart by their first key.

    Raises:
        ConfigError: Neither has the key, or it belongs to what an ablation keeps as it is.
    """
    recipe_keys = set(registry.load("vsdbench.trainers", "recipe").model_fields)
    suite_keys = set(SuiteConfig.model_fields)
    fixed = recipe_keys & suite_keys  # name, version, description, and the target, which has a flag
    found: tuple[list[str], list[str]] = ([], [])
    for override in overrides:
        key = override.partition("=")[0].partition(".")[0].strip()
        if key in fixed:
            fix = "use --target" if key == "target" else "copy the recipe or the suite to change it"
            raise ConfigError(f"override '{override}': '{key}' is a key of recipe and suite alike; {fix}.")
        if key not in recipe_keys | suite_keys:
            raise ConfigError(f"override '{override}': no recipe and no suite has the key '{key}'."
                              f"{did_you_mean(key, (recipe_keys | suite_keys) - fixed)}")  # fmt: skip
        found[key in suite_keys].append(override)
    return found


def _template(config: SuiteConfig, base: Base) -> DrafterEntry:
    """Return the suite's drafter whose tree and options every arm gets."""
    kind = base.recipe["architecture"]["type"]
    found = next((entry for entry in config.drafters if entry.type == kind), None)
    if found is None:
        raise ConfigError(
            f"The suite '{config.name}' measures no drafter of type '{kind}', whose tree all arms could have; add one "
            "to a copy of it."
        )
    if found.tree.kind == "auto":
        raise ConfigError(
            f"The suite '{config.name}' chooses the tree of '{found.name}' by measurement, so arms would differ in it; "
            f"set drafters.{found.name}.tree.kind=dynamic and a budget, depth and top_k."
        )
    return found.model_copy(update={"checkpoint": None})


def _write(raw: Mapping[str, Any], path: Path) -> str:
    """Write the contest file if it is not there, and return its path, from the home folder on where it lies there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True).encode())
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def _budget(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a cell's training took, the mean over seeds; nothing was spent on what was not trained."""
    cells = max(1, len(trainings))
    tokens, forwards, wall_s = (
        sum(training[key] for training in trainings) / cells for key in ("tokens", "target_forwards", "seconds")
    )
    return {"tokens": round(tokens), "target_forwards": round(forwards), "wall_s": wall_s}
