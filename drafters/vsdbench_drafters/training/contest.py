"""Contests: one recipe file that describes a warm start and the arms that go on from it.

A recipe file with ``arms`` is a family of recipes: what stands at the top is common to all arms, and each arm says
what it changes, usually the objective alone. ``NAME:ARM@SEED`` names one member (seed 0 where none is given), wherever
a recipe can be named. All members start from the same weights, see the same data in the same order (a seed's), and
differ in nothing that their arm does not name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsdbench.config import load_yaml, parse
from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.paths import find_data

if TYPE_CHECKING:
    from vsdbench_drafters.training.recipe import RecipeConfig

_ARM = re.compile(r"[\w.+-]+")
_MEMBER = re.compile(rf"^(?P<base>.+?)(?::(?P<arm>{_ARM.pattern}))?(?:@(?P<seed>\d+))?$")


def split_name(name: str | Path) -> tuple[str, str | None, int | None]:
    """Return the file's name, the arm and the seed of ``NAME:ARM@SEED``.

    >>> split_name("quickstart:vsd@2"), split_name("quickstart")
    (('quickstart', 'vsd', 2), ('quickstart', None, None))

    Raises:
        ConfigError: The name is empty.
    """
    found = _MEMBER.match(str(name))
    if found is None:
        raise ConfigError(f"{str(name)!r} names no recipe: write NAME, NAME:ARM or NAME:ARM@SEED.")
    seed = found["seed"]
    return found["base"], found["arm"], None if seed is None else int(seed)


def members(name: str | Path) -> list[str]:
    """Return the names of all members that a name stands for: every arm and seed, or the name itself.

    Raises:
        ConfigError: No such file, or not a valid family.
    """
    base, arm, seed = split_name(name)
    raw = load_yaml(find_data("recipes", base))
    if "arms" not in raw:
        return [str(name)]
    arms, seeds = family(raw, base)
    chosen = list(arms) if arm is None else [_known_arm(arm, arms, base)]
    return [f"{base}:{a}@{s}" for s in ([seed] if seed is not None else seeds) for a in chosen]


def family(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], list[int]]:
    """Return the arms and seeds of a recipe file.

    Raises:
        ConfigError: They are not what they should be.
    """
    arms, seeds = raw.get("arms"), raw.get("seeds", [0])
    if not isinstance(arms, dict) or not arms or not all(isinstance(arm, dict) for arm in arms.values()):
        raise ConfigError(f"{where}: 'arms' must map names to what each arm changes, such as vsd: {{objective: …}}.")
    if wrong := next((name for name in arms if not _ARM.fullmatch(str(name))), None):
        raise ConfigError(f"{where}: an arm is called '{wrong}'; use letters, digits and . + - _ alone.")
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ConfigError(f"{where}: 'seeds' is {seeds!r}; it must be a list of whole numbers such as [0, 1, 2].")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: 'seeds' is {seeds!r}; name each one once.")
    return arms, seeds


def member(raw: dict[str, Any], arm: str | None, seed: int | None, where: str) -> dict[str, Any]:
    """Return the recipe, as a mapping, of one member of the file's family (of the file itself if it has no arms).

    Raises:
        ConfigError: There is no such arm, or the file has arms and none is named.
    """
    if "arms" not in raw:
        if arm is not None:
            raise ConfigError(f"{where} has no arms, so there is no arm '{arm}' in it; name the recipe alone.")
        return raw if seed is None else merged(raw, {"training": {"seed": seed}})
    arms, _ = family(raw, where)
    if arm is None:
        raise ConfigError(
            f"{where} has several arms ({', '.join(arms)}); name one of them, as in {where}:{next(iter(arms))}."
        )
    change = arms[_known_arm(arm, arms, where)]
    common = {key: value for key, value in raw.items() if key not in {"arms", "seeds"}}
    chosen = merged(merged(common, change), {"training": {"seed": seed or 0}})
    return chosen | {"name": f"{raw.get('name', '')}:{arm}@{seed or 0}"}


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return ``first`` with the entries of ``second``, mappings merged and everything else replaced.

    An ``objective`` of another ``type`` replaces the common one's options too.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    >>> merged({"objective": {"type": "vsd", "ttt_steps": 2, "options": {"car": 0}}}, {"objective": {"type": "kl"}})
    {'objective': {'type': 'kl', 'ttt_steps': 2}}
    """
    result = copy.deepcopy(first)
    for key, value in second.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            if key == "objective" and value.get("type", result[key].get("type")) != result[key].get("type"):
                result[key].pop("options", None)
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def check_family(raw: dict[str, Any], where: str) -> None:
    """Check a recipe file, every arm of it.

    Raises:
        ConfigError: The first thing that is wrong.
    """
    from vsdbench_drafters.training.recipe import RecipeConfig, check_recipe  # noqa: PLC0415 - it imports this module

    for arm in family(raw, where)[0] if "arms" in raw else [None]:
        label = where if arm is None else f"{where}:{arm}"
        check_recipe(parse(RecipeConfig, member(raw, arm, None, where), where=label), label)


def check_fresh(recipe: RecipeConfig, warm: RecipeConfig, where: str) -> None:
    """Refuse data that the warm start has seen: every answer it used had a token at least.

    Raises:
        ConfigError: The prompts of both may overlap.
    """
    same = recipe.data.source == warm.data.source and recipe.data.seed == warm.data.seed
    first = warm.data.start_index + warm.data.num_tokens
    if same and recipe.data.start_index < first:
        raise ConfigError(
            f"{where}: data.start_index is {recipe.data.start_index}, but the warm start '{warm.name}' may have used "
            f"prompts up to {first}; set it to at least that, so that the arms learn from data nobody has seen."
        )


def _known_arm(arm: str, arms: Sequence[str] | dict[str, Any], where: str) -> str:
    if arm not in arms:
        raise ConfigError(f"{where} has no arm '{arm}'.{did_you_mean(arm, list(arms))}")
    return arm
