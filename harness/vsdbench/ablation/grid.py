"""Which arms an ablation has, and the contest that they make: pure functions from flags to one recipe family.

An arm is a name and the recipe fields that it changes, nothing else. The family is an ordinary contest file (what all
share, the arms, the seeds), so that a cell is trained, resumed and found again as any drafter is: by the hash of what
determines it. Adding an arm changes no other arm's hash.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vsdbench import registry
from vsdbench.config import load_yaml
from vsdbench.errors import ConfigError, did_you_mean

REFERENCE = "vsd"
"""The arm that nothing is taken from: what every other arm is compared with."""
ON_POLICY = "onpolicy-rkl"
WARM_START = "warm-start"

OPTION = "objective.options."
PARTS: dict[str, dict[str, Any]] = {
    "car": {f"{OPTION}car": 0},
    "arw": {f"{OPTION}arw": False},
    "utility": {f"{OPTION}beta": None},
    "kl": {f"{OPTION}kl": False},
    "correction": {f"{OPTION}correction": False},
    "oracle": {f"{OPTION}oracle": False},
    "anchor": {f"{OPTION}anchor": "off"},
}
"""What switches a part off, by the part's name."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "sampler": ("importance", "mh"),
    "proposals": ("sampled", "tree", "mixed"),
    "acceptance": ("sampled", "tree", "greedy"),
    "paths": (),
    "depth": (),
}
"""Options that an arm may give another value, with the values they take; numbers where there are none."""

MEMBER = re.compile(r"^(?P<base>.+):(?P<arm>[\w.+-]+)@(?P<seed>\d+)$")
ARM_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_COMMON = ("architecture", "data", "training", "warm_start", "evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One drafter of an ablation, trained once a seed.

    Attributes:
        name: As the tables call it.
        change: What differs from the reference's recipe: dotted key to value.
        disabled: The parts that are switched off, by the names of their flags.
        control: Not VSD with something changed, but what VSD must be better than.
        recipe: What a contest's file makes of the arm, its ``objective`` and ``training``, as the hash of a drafter
            that was trained from that file has it (options that it leaves out stay out); None: what ``change`` makes.
    """

    name: str
    change: Mapping[str, Any] = field(default_factory=dict)
    disabled: tuple[str, ...] = ()
    control: bool = False
    recipe: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What all arms share.

    Attributes:
        name: Of the recipe.
        target: Name or folder of the target.
        recipe: Every field that the arms have in common, resolved.
        objective: The reference's objective, complete.
        warm_objective: The objective that the warm start was trained with, complete.
        seeds: Training seeds of every arm.
    """

    name: str
    target: str
    recipe: Mapping[str, Any]
    objective: Mapping[str, Any]
    warm_objective: Mapping[str, Any]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The arms that a command asks for; nothing at all means every part, one at a time.

    Attributes:
        parts: To switch off, keys of ``PARTS``.
        settings: Other values of options, keys of ``SETTINGS``.
        grid: File of further arms.
        together: One arm that has all changes, in place of one arm a change.
        contest: All other arms of the contest that is named, or ``arms``.
        arms: Of the contest, in place of all.
    """

    parts: Sequence[str] = ()
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    grid: Path | None = None
    together: bool = False
    contest: bool = False
    arms: Sequence[str] = ()


def load_base(
    name: str, overrides: Sequence[str] = (), *, num_seeds: int | None = None, target: str | None = None
) -> Base:
    """Return what the arms of an ablation share.

    Args:
        name: A recipe whose objective is ``vsd``, or a contest: its arm ``vsd``, or the arm that is named.
        overrides: ``key=value`` changes of the recipe, for all arms.
        num_seeds: Seeds 0, 1, …; None: those of the recipe.
        target: Another target than the recipe's.

    Raises:
        ConfigError: No such recipe, another objective than ``vsd``, or no warm start.
    """
    chosen, seeds = _reference_of(name, registry.load("vsdbench.trainers", "members")(name))
    load = registry.load("vsdbench.trainers", "load")
    recipe = load(chosen, overrides)
    if recipe.objective.type != REFERENCE:
        raise ConfigError(
            f"{name}: objective.type is '{recipe.objective.type}', but an ablation takes VSD apart; name a recipe "
            "whose objective is vsd, such as ablation-quickstart."
        )
    if recipe.warm_start is None:
        raise ConfigError(f"{name} has no warm_start, but all arms must go on from one drafter; name a recipe there.")
    content = recipe.model_dump(mode="json")
    if num_seeds is not None:
        seeds = tuple(range(num_seeds))
    return Base(
        name=recipe.name.partition(":")[0],
        target=target or recipe.target,
        recipe={key: content[key] for key in _COMMON},
        objective=content["objective"],
        warm_objective=load(recipe.warm_start).objective.model_dump(mode="json"),
        seeds=seeds or (recipe.training.seed,),
    )


def _reference_of(name: str, members: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """Return the recipe to start from, and the family's seeds (none where the recipe has no arms)."""
    found = [match for match in map(MEMBER.match, members) if match]
    if len(found) != len(members):
        return name, ()
    arms = list(dict.fromkeys(match["arm"] for match in found))
    if REFERENCE not in arms and len(arms) > 1:
        raise ConfigError(f"{name} has several arms ({', '.join(arms)}); name the one to take apart, as in {name}:ARM.")
    arm = REFERENCE if REFERENCE in arms else arms[0]
    seeds = tuple(dict.fromkeys(int(match["seed"]) for match in found))
    return f"{found[0]['base']}:{arm}", seeds


def chosen_arms(base: Base, wanted: Wanted, contest: Sequence[Arm] = ()) -> tuple[list[Arm], list[str]]:
    """Return the arms that are compared with the reference, controls apart, and notes on what was left out.

    Args:
        base: What they share.
        wanted: What was asked for beside the contest's arms.
        contest: Arms of the contest, as ``contest.read_arms`` gives them; they stand in the place of all parts.

    Raises:
        ConfigError: An unknown part, value or key; two changes that exclude each other; or no arm is left.
    """
    arms = [_part_arm(part) for part in dict.fromkeys(wanted.parts)]
    for option, values in wanted.settings.items():
        arms += [_setting_arm(option, value) for value in dict.fromkeys(values)]
    if wanted.together:
        arms = [_combined(arms)]
    if wanted.grid is not None:
        arms += _grid_arms(base, wanted.grid)
    arms = [*contest, *arms]
    notes: list[str] = []
    if not arms:
        arms, notes = _leave_one_out(base)
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        where = f"the one in {wanted.grid}" if wanted.grid else "one of them"
        raise ConfigError(f"Two arms are called '{twice}'; give {where} another name.")
    kept, left_out = _distinct(base, arms)
    notes += left_out
    if not kept:
        raise ConfigError(f"Nothing is left to compare: {' '.join(notes)}")
    return kept, notes


def training_of(base: Base, arm: Arm) -> dict[str, Any]:
    """Return what an arm is trained with, defaults written out: where it is equal, two arms are one drafter."""
    nested = _nested(base, arm)
    objective = nested["objective"]
    options = objective_options(objective["type"]) | objective["options"]
    return {"objective": objective | {"options": options}, **base.recipe["training"], **nested.get("training", {})}


def _distinct(base: Base, arms: Iterable[Arm]) -> tuple[list[Arm], list[str]]:
    """Return the arms that are neither the reference nor each other under another name, and notes on the others."""
    trainings = {REFERENCE: training_of(base, Arm(name=REFERENCE))}
    kept: list[Arm] = []
    notes: list[str] = []
    for arm in arms:
        mine = training_of(base, arm)
        same = next((name for name, training in trainings.items() if training == mine), None)
        if same is None:
            trainings[arm.name] = mine
            kept.append(arm)
        elif same == REFERENCE and arm.change:
            notes.append(f"'{arm.name}' is left out: {describe_change(arm.change)} is what {base.name} has already.")
        else:
            notes.append(f"'{arm.name}' is left out: it is trained as '{same}' is, to the last setting.")
    return kept, notes


def controls(base: Base) -> list[Arm]:
    """Return the arms that always run beside: more of the warm start's objective, and on-policy reverse KL."""
    known = objective_options("onpolicy")
    shared = {key: value for key, value in base.objective["options"].items() if key in known}
    on_policy = dict(base.objective) | {"type": "onpolicy", "options": shared | {"divergence": "rkl"}}
    return [
        Arm(name=f"continual-{base.warm_objective['type']}", change={"objective": base.warm_objective}, control=True),
        Arm(name=ON_POLICY, change={"objective": on_policy}, control=True),
    ]


def family(base: Base, arms: Sequence[Arm]) -> dict[str, Any]:
    """Return the contest of the arms as a recipe file holds it, every arm of it checked.

    Raises:
        ConfigError: The objective refuses what an arm says.
    """
    raw = {
        "name": base.name,
        "description": f"The arms of an ablation of {base.name}.",
        "target": base.target,
        **copy.deepcopy(dict(base.recipe)),
        "seeds": list(base.seeds),
        "arms": {arm.name: _nested(base, arm) for arm in arms},
    }
    check = registry.load("vsdbench.trainers", "check")
    for name, content in raw["arms"].items():
        check(raw | {"arms": {name: content}}, base.name)
    return raw


def describe_change(change: Mapping[str, Any]) -> str:
    """Return a change in a few words.

    >>> describe_change({"objective.options.car": 0, "objective.options.beta": None})
    'car 0, beta null'
    """
    return ", ".join(f"{key.removeprefix(OPTION)} {_word(value)}" for key, value in change.items())


def objective_options(objective: str) -> dict[str, Any]:
    """Return the options of an objective with their defaults, those of its base classes included."""
    found: dict[str, Any] = {}
    for cls in reversed(registry.load("vsdbench.objectives", objective).__mro__):
        if "__init__" in vars(cls) and cls is not object:
            for parameter in inspect.signature(cls.__init__).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    found[parameter.name] = parameter.default
    return {name: default for name, default in found.items() if name not in {"ttt_steps", "step_weight"}}


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return str(value.get("type", dict(value)))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "null" if value is None else str(value)


def _leave_one_out(base: Base) -> tuple[list[Arm], list[str]]:
    """Return an arm for every part that the objective, set as it is, can do without, and notes on the others."""
    arms: list[Arm] = []
    notes: list[str] = []
    for arm in map(_part_arm, PARTS):
        try:
            family(base, [arm])
        except ConfigError as error:
            notes.append(f"'{arm.name}' is left out; {error}")
        else:
            arms.append(arm)
    return arms, notes


def _part_arm(part: str) -> Arm:
    if part not in PARTS:
        raise ConfigError(f"VSD has no part '{part}'.{did_you_mean(part, PARTS)}")
    return Arm(name=f"no-{part}", change=PARTS[part], disabled=(part,))


def _setting_arm(option: str, value: object) -> Arm:
    if option not in SETTINGS:
        raise ConfigError(f"VSD has no setting '{option}'.{did_you_mean(option, SETTINGS)}")
    known = SETTINGS[option]
    if known and value not in known:
        raise ConfigError(f"--{option} is '{value}'.{did_you_mean(str(value), known)}")
    return Arm(name=f"{option}-{value}", change={f"{OPTION}{option}": value})


def _combined(arms: Sequence[Arm]) -> Arm:
    """Return the one arm that has the changes of all."""
    if len(arms) < 2:
        raise ConfigError("--together makes one arm of several changes; give at least two, such as --no-car --no-arw.")
    change: dict[str, Any] = {}
    for arm in arms:
        for key in arm.change:
            if key in change:
                option = key.removeprefix(OPTION)
                raise ConfigError(f"--together: one arm cannot have two values of '{option}'; leave one of them out.")
        change |= arm.change
    disabled = tuple(part for arm in arms for part in arm.disabled)
    return Arm(name="-".join(arm.name for arm in arms), change=change, disabled=disabled)


def _grid_arms(base: Base, path: Path) -> list[Arm]:
    """Return the arms of a grid file: names, each with what it changes."""
    known = _changeable(base)
    reserved = {REFERENCE, WARM_START, *(arm.name for arm in controls(base))}
    arms: list[Arm] = []
    for name, change in load_yaml(path).items():
        if name in reserved or not ARM_NAME.match(name):
            raise ConfigError(f"{path}: an arm cannot be called '{name}'; use letters, digits, '.', '_' and '-'"
                              f"{', and not a name that every ablation has' if name in reserved else ''}.")  # fmt: skip
        if not isinstance(change, dict) or not change:
            raise ConfigError(
                f"{path}: '{name}' must map recipe keys to values, such as objective.options.car: 0, not {change!r}."
            )
        for key in change:
            if key not in known:
                raise ConfigError(f"{path}: '{name}' has the unknown key '{key}'.{_suggestion(str(key), known)}")
        arms.append(Arm(name=name, change=change, disabled=parts_off(change)))
    return arms


def parts_off(change: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parts that a change switches off.

    >>> parts_off({"objective.options.car": 0, "training.lr": 1e-4})
    ('car',)
    """
    return tuple(part for part, off in PARTS.items() if off.items() <= change.items())


def _changeable(base: Base) -> list[str]:
    """Return the keys that an arm may change: where it starts from and what it learns from are common to all."""
    options = [f"{OPTION}{option}" for option in objective_options(REFERENCE)]
    steps = [f"objective.{key}" for key in base.objective if key not in {"type", "options"}]
    return [*options, *steps, *(f"training.{key}" for key in base.recipe["training"] if key != "seed")]


def _suggestion(key: str, known: Iterable[str]) -> str:
    full = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" Did you mean '{full[0]}'?" if full else did_you_mean(key, known)


def _nested(base: Base, arm: Arm) -> dict[str, Any]:
    """Return an arm as a contest file has it: its whole objective, and what else it changes."""
    if arm.recipe is not None:
        return copy.deepcopy(dict(arm.recipe))
    result: dict[str, Any] = {"objective": copy.deepcopy(dict(base.objective))}
    for key, value in arm.change.items():
        node = result
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = copy.deepcopy(value)
    return result
