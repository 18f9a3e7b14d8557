"""Arms: each flag changes its own field of the recipe and nothing else, and a cell's hash depends on its arm alone."""

from __future__ import annotations

import pytest
import yaml

from vsdbench.ablation.grid import (
    PARTS,
    Arm,
    Wanted,
    chosen_arms,
    controls,
    describe_change,
    family,
    load_base,
    objective_options,
)
from vsdbench.errors import ConfigError
from vsdbench_drafters.training.recipe import load_recipe

FIELDS = {
    "no-car": ("car", 0),
    "no-arw": ("arw", False),
    "no-utility": ("beta", None),
    "no-kl": ("kl", False),
    "no-correction": ("correction", False),
    "no-oracle": ("oracle", False),
    "no-anchor": ("anchor", "off"),
    "sampler-mh": ("sampler", "mh"),
    "proposals-tree": ("proposals", "tree"),
    "paths-16": ("paths", 16),
    "depth-2": ("depth", 2),
    "acceptance-greedy": ("acceptance", "greedy"),
}
ALL = Wanted(
    parts=list(PARTS),
    settings={"sampler": ["mh"], "proposals": ["tree"], "paths": [16], "depth": [2], "acceptance": ["greedy"]},
)


@pytest.fixture(scope="module")
def base():
    return load_base("ablation-quickstart")


def save(path, raw):
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def members(base, tmp_path):
    """Recipes of a family by ``ARM@SEED``, read back from its file."""

    def read(arms):
        path = save(tmp_path / "family.yaml", family(base, [Arm(name="vsd"), *arms, *controls(base)]))
        return lambda name: load_recipe(f"{path}:{name}")

    return read


def test_each_flag_changes_exactly_its_own_field(base, members):
    arms, notes = chosen_arms(base, ALL)
    assert [arm.name for arm in arms] == list(FIELDS)
    assert notes == []
    member = members(arms)
    whole = member("vsd@0")
    for name, (option, value) in FIELDS.items():
        arm = member(f"{name}@0")
        assert arm.objective.options == whole.objective.options | {option: value}, name
        same = {"objective": whole.objective, "name": whole.name}
        assert arm.model_copy(update=same) == whole, name
        default = objective_options("vsd")[option]
        assert whole.objective.options.get(option, default) != value, name


def test_the_reference_is_the_recipe_itself(members):
    recipe = load_recipe("ablation-quickstart")
    whole = members([])("vsd@0")
    assert whole.content() == recipe.content()
    assert whole.content() == load_recipe("contest-quickstart:vsd").content()  # so the cache is shared
    assert whole.warm_start == recipe.warm_start


def test_no_flag_is_leave_one_out(base):
    arms, _ = chosen_arms(base, Wanted())
    assert [arm.name for arm in arms] == [f"no-{part}" for part in PARTS]
    assert [arm.disabled for arm in arms] == [(part,) for part in PARTS]
    assert not any(arm.control for arm in arms)


def test_together_is_one_arm(base, members):
    wanted = Wanted(parts=["car", "arw"], settings={"paths": [8]}, together=True)
    (arm,), _ = chosen_arms(base, wanted)
    assert (arm.name, arm.disabled) == ("no-car-no-arw-paths-8", ("car", "arw"))
    changed = members([arm])(f"{arm.name}@0").objective.options
    assert changed == base.objective["options"] | {"car": 0, "arw": False, "paths": 8}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(parts=["cars"]), r"no part 'cars'\. Did you mean 'car'"),
        (Wanted(settings={"sampler": ["mhh"]}), r"--sampler is 'mhh'\. Did you mean 'mh'"),
        (Wanted(settings={"path": [1]}), r"no setting 'path'\. Did you mean 'paths'"),
        (Wanted(parts=["car"], together=True), "at least two"),
        (Wanted(settings={"paths": [1, 8]}, together=True), "two values of 'paths'"),
        (Wanted(settings={"paths": [4]}), "Nothing is left to compare: 'paths-4'"),
    ],
)
def test_mistakes_are_named(base, wanted, words):
    with pytest.raises(ConfigError, match=words):
        chosen_arms(base, wanted)


def test_a_value_that_the_recipe_has_is_left_out(base):
    arms, notes = chosen_arms(base, Wanted(settings={"paths": [1, 4, 1, 16]}))
    assert [arm.name for arm in arms] == ["paths-1", "paths-16"]
    assert notes == ["'paths-4' is left out: paths 4 is what ablation-quickstart has already."]
    (_, left_out) = chosen_arms(base, Wanted(parts=["car"], settings={"acceptance": ["sampled"]}))
    assert "acceptance sampled" in left_out[0]  # a default, which the file does not mention


def test_a_grid_file(base, members, tmp_path):
    grid = save(
        tmp_path / "grid.yaml",
        {
            "strong-car": {"objective.options.car": 0.5, "training.lr": 1e-4},
            "plain": {"objective.options.car": 0, "objective.options.arw": False},
        },
    )
    arms, _ = chosen_arms(base, Wanted(grid=grid, parts=["kl"]))
    assert [(arm.name, arm.disabled) for arm in arms] == [
        ("no-kl", ("kl",)),
        ("strong-car", ()),
        ("plain", ("car", "arw")),
    ]
    strong, whole = (members(arms)(name) for name in ("strong-car@0", "vsd@0"))
    assert strong.objective.options == whole.objective.options | {"car": 0.5}
    assert strong.training == whole.training.model_copy(update={"lr": 1e-4})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": {"objective.options.karr": 0}}, r"unknown key 'objective.options.karr'\. Did you mean 'objective.opt"),
        ({"a": {"car": 0}}, r"unknown key 'car'\. Did you mean 'objective.options.car'"),
        ({"a": {"trainin.lr": 0.1}}, r"Did you mean 'training.lr'"),
        ({"a": {"data.num_tokens": 1}}, r"unknown key 'data.num_tokens'"),
        ({"a": {"training.seed": 1}}, r"unknown key 'training.seed'"),
        ({"a": {"objective.type": "gto"}}, r"unknown key 'objective.type'"),
        ({"a": 3}, r"'a' must map recipe keys"),
        ({"vsd": {"objective.options.car": 0}}, r"cannot be called 'vsd'"),
        ({"a b": {"objective.options.car": 0}}, r"cannot be called 'a b'"),
        ({"no-car": {"objective.options.car": 0}}, r"Two arms are called 'no-car'"),
    ],
)
def test_grid_mistakes_are_named(base, tmp_path, content, words):
    grid = save(tmp_path / "grid.yaml", content)
    with pytest.raises(ConfigError, match=words):
        chosen_arms(base, Wanted(grid=grid, parts=["car"]))


def test_a_value_of_the_wrong_type_is_refused_by_the_recipe(base, tmp_path):
    grid = save(tmp_path / "grid.yaml", {"fast": {"training.lr": "quick"}})
    arms, _ = chosen_arms(base, Wanted(grid=grid))
    with pytest.raises(ConfigError, match=r"ablation-quickstart:fast: 'training.lr' is 'quick'"):
        family(base, arms)


def test_controls_have_the_warm_starts_objective_and_the_same_samples(base, members):
    member = members([])
    continual, policy, whole = (member(f"{name}@0") for name in ("continual-kl", "onpolicy-rkl", "vsd"))
    assert continual.objective == load_recipe(whole.warm_start).objective
    assert policy.objective.type == "onpolicy"
    assert policy.objective.options == {"divergence": "rkl"} | whole.objective.options
    for control in (continual, policy):
        assert control.model_copy(update={"objective": whole.objective, "name": whole.name}) == whole
    assert all(arm.control for arm in controls(base))


def test_options_that_the_control_does_not_take_stay_away():
    base = load_base("ablation-quickstart", ["objective.options.car=0.2", "objective.options.omega=0.7"])
    _, policy = controls(base)
    assert policy.change["objective"]["options"]["omega"] == 0.7
    assert "car" not in policy.change["objective"]["options"]


def test_adding_an_arm_or_a_seed_changes_no_other_cell(base, members):
    one, _ = chosen_arms(base, Wanted(parts=["car"]))
    both, _ = chosen_arms(base, Wanted(parts=["arw", "car"]))
    names = ["vsd@0", "no-car@0", "continual-kl@0", "onpolicy-rkl@0"]
    before = [members(one)(name).content() for name in names]
    assert [members(both)(name).content() for name in names] == before
    assert len({str(content) for content in before}) == len(names)
    assert members(one)("vsd@1").content() != before[0]


def test_a_part_that_the_objective_cannot_do_without_is_left_out():
    base = load_base("contest-hour:vsd-full")
    arms, notes = chosen_arms(base, Wanted())
    assert [arm.name for arm in arms] == [f"no-{part}" for part in PARTS if part != "oracle"]
    assert len(notes) == 1
    assert notes[0].startswith("'no-oracle' is left out; contest-hour:no-oracle: vsd: targets: full")
    with pytest.raises(ConfigError, match="no-oracle: vsd: targets: full"):
        family(base, chosen_arms(base, Wanted(parts=["oracle"]))[0])


def test_seeds(base):
    assert base.seeds == (0,)
    assert load_base("ablation-quickstart", num_seeds=3).seeds == (0, 1, 2)
    assert load_base("ablation-quickstart", ["training.seed=4"]).seeds == (4,)
    assert load_base("ablation-hour").seeds == (0, 1, 2)


def test_a_contest_is_taken_apart_at_its_arm():
    found = load_base("contest-hour")
    assert (found.name, found.objective["type"], found.seeds) == ("contest-hour", "vsd", (0, 1, 2))
    full = load_base("contest-hour:vsd-full@1")
    assert (full.objective["options"]["targets"], full.seeds) == ("full", (1,))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("contest-hour:kl", "objective.type is 'kl'"),
        ("eagle3-kl-start", "objective.type is 'kl'"),
        ("ablation-quikstart", "Did you mean 'ablation-quickstart'"),
    ],
)
def test_what_cannot_be_taken_apart(name, words):
    with pytest.raises(ConfigError, match=words):
        load_base(name)


def test_a_contest_without_the_arm_and_a_recipe_without_a_start(tmp_path):
    raw = {"name": "x", "target": "t", "objective": {"type": "kl"}, "arms": {"a": {}, "b": {}}}
    path = save(tmp_path / "contest.yaml", raw)
    with pytest.raises(ConfigError, match=r"several arms \(a, b\)"):
        load_base(str(path))
    path = save(tmp_path / "alone.yaml", {"name": "x", "target": "t", "objective": {"type": "vsd"}})
    with pytest.raises(ConfigError, match="no warm_start"):
        load_base(str(path))


def test_changes_in_words():
    change = {"objective.options.arw": False, "training.lr": 0.1, "objective": {"type": "kl", "options": {}}}
    assert describe_change(change) == "arw off, training.lr 0.1, objective kl"
