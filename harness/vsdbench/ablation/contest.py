"""A contest's own arms as the arms of an ablation: its other objectives, set against its arm ``vsd``.

An arm is taken as the contest's file has it, so that its drafter is the one that ``vsdbench train CONTEST:ARM@SEED``
trains, and is found in the cache where it was. What differs from the reference is told apart from that, defaults
included, for the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vsdbench import registry
from vsdbench.ablation.grid import (
    ARM_NAME,
    MEMBER,
    OPTION,
    REFERENCE,
    WARM_START,
    Arm,
    Base,
    controls,
    objective_options,
    parts_off,
    training_of,
)
from vsdbench.errors import ConfigError, did_you_mean

_SHARED = ("target", "warm_start", "architecture", "data", "evaluation")
_OF_THE_REFERENCE = (OPTION, "objective.options=", "objective.type=")


def arm_names(name: str, chosen: Sequence[str] = ()) -> list[str]:
    """Return the arms of a contest that are to be compared with its arm ``vsd``, as ``CONTEST:ARM``.

    Args:
        name: A contest.
        chosen: Some of its arms; none: all of them.

    Raises:
        ConfigError: It has no arms, none called ``vsd``, none beside it, or none of a chosen name.
    """
    members = registry.load("vsdbench.trainers", "members")
    found = [match for match in map(MEMBER.match, members(name)) if match]
    if not found:
        raise ConfigError(f"{name} has no arms to compare; name a contest, such as contest-hour, or leave --arms out.")
    contest = found[0]["base"]
    arms = list(dict.fromkeys(match["arm"] for match in map(MEMBER.match, members(contest)) if match))
    if REFERENCE not in arms:
        raise ConfigError(
            f"{contest} has no arm '{REFERENCE}' that its others ({', '.join(arms)}) could be compared with; "
            "add one to a copy of it, or name a contest that has one, such as contest-hour."
        )
    if not {REFERENCE} <= {match["arm"] for match in found}:
        raise ConfigError(
            f"{name} is one arm, but --arms compares all with '{REFERENCE}'; name the contest alone: {contest}."
        )
    others = [arm for arm in arms if arm != REFERENCE]
    if not others:
        raise ConfigError(
            f"{contest} has no arm beside '{REFERENCE}', so there is nothing to compare; leave --arms out."
        )
    for arm in chosen:
        if arm == REFERENCE:
            raise ConfigError(
                f"--arm {arm}: '{arm}' is what the arms are compared with, and always runs; leave it out."
            )
        if arm not in others:
            raise ConfigError(f"{contest} has no arm '{arm}'.{did_you_mean(arm, others)}")
    return [f"{contest}:{arm}" for arm in others if not chosen or arm in chosen]


def read_arms(names: Sequence[str], overrides: Sequence[str] = ()) -> tuple[list[Arm], list[str]]:
    """Return the arms of these names, and notes on overrides that are not for all of them.

    Args:
        names: As ``arm_names`` gives them, at least one.
        overrides: ``key=value`` changes of the recipe. Those of the objective's type and options reach the arms whose
            objective is the reference's; the others have options of their own.

    Raises:
        ConfigError: An arm changes what all must share, or has a name that no table can have.
    """
    load = registry.load("vsdbench.trainers", "load")
    own = [override for override in overrides if override.startswith(_OF_THE_REFERENCE)]
    common = [override for override in overrides if override not in own]
    contest = names[0].rpartition(":")[0]
    whole = load(f"{contest}:{REFERENCE}", overrides)
    theirs = whole.model_dump(mode="json")
    arms: list[Arm] = []
    without: list[str] = []
    for name in names:
        arm = name.rpartition(":")[2]
        if arm == WARM_START or not ARM_NAME.match(arm):
            raise ConfigError(f"{contest}: an arm cannot be called '{arm}' here; use letters, digits, '.', '_' and '-'"
                              f"{', and not the name of the warm start' if arm == WARM_START else ''}.")  # fmt: skip
        recipe = load(name, common)
        if recipe.objective.type != whole.objective.type:
            without.append(arm)
        elif own:
            recipe = load(name, overrides)
        ours = recipe.model_dump(mode="json")
        different = next((key for key in _SHARED if ours[key] != theirs[key]), None)
        if different is not None:
            raise ConfigError(
                f"{contest}: arm '{arm}' has another {different} than '{REFERENCE}', so they cannot be compared; an "
                "arm may change objective and training."
            )
        arms.append(_arm(arm, ours, theirs))
    note = f"{' '.join(own)} is not for {', '.join(without)}: other objectives have options of their own."
    return arms, [note] if own and without else []


def controls_beside(base: Base, arms: Sequence[Arm]) -> tuple[list[Arm], list[str]]:
    """Return the controls that are not among the arms already, and notes on those that are.

    A contest has arms such as ``kl``, which is more of the warm start's objective, and ``onpolicy-rkl``. They stay
    arms: the question of a contest is how objectives compare, all of them in one table and adjusted together, and the
    answer to the control's question is in their rows.
    """
    kept: list[Arm] = []
    notes: list[str] = []
    for control in controls(base):
        mine = training_of(base, control)
        same = next((arm.name for arm in arms if training_of(base, arm) == mine), None)
        if same is not None:
            notes.append(f"The control '{control.name}' is the arm '{same}', so it runs once, as that.")
        elif any(arm.name == control.name for arm in arms):
            notes.append(f"The control '{control.name}' is left out: an arm has its name, with other settings.")
        else:
            kept.append(control)
    return kept, notes


def other_objective(arm: Mapping[str, Any]) -> str | None:
    """Return the objective of an arm, as a manifest or a result has it, where it is not the reference's.

    >>> other_objective({"name": "kl", "change": {"objective": {"type": "kl"}}})
    'kl'
    """
    objective: Mapping[str, str] = (arm.get("change") or {}).get("objective") or {}
    return objective.get("type")


def is_contest(arms: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether any of these arms, controls apart, has another objective than the reference."""
    return any(other_objective(arm) for arm in arms if not arm.get("control"))


def _arm(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Arm:
    training = {k: v for k, v in ours["training"].items() if k != "seed" and v != theirs["training"][k]}
    change = _objective_change(ours["objective"], theirs["objective"])
    change |= {f"training.{key}": value for key, value in training.items()}
    recipe: dict[str, Any] = {"objective": ours["objective"]} | ({"training": training} if training else {})
    return Arm(name=name, change=change, disabled=parts_off(change), recipe=recipe)


def _objective_change(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole objective where it is another one, else what differs in it."""
    if ours["type"] != theirs["type"]:
        return {"objective": ours}
    defaults = objective_options(ours["type"])
    mine, whole = (defaults | objective["options"] for objective in (ours, theirs))
    change = {f"{OPTION}{key}": value for key, value in mine.items() if value != whole.get(key)}
    return change | {
        f"objective.{key}": value
        for key, value in ours.items()
        if key not in {"type", "options"} and value != theirs[key]
    }
