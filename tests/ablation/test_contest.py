"""A contest's arms as arms: the drafters that its file trains, what differs in them, and what cannot be compared."""

from __future__ import annotations

import pytest
import yaml

from vsdbench.ablation.contest import arm_names, controls_beside, read_arms
from vsdbench.ablation.grid import Arm, Wanted, chosen_arms, describe_change, family, load_base
from vsdbench.errors import ConfigError
from vsdbench.paths import list_data
from vsdbench_drafters.training.recipe import load_recipe

WARM = {"name": "warm", "target": "t", "objective": {"type": "kl", "ttt_steps": 2}, "data": {"num_tokens": 100}}
CONTEST = {
    "name": "toy",
    "target": "t",
    "objective": WARM["objective"],
    "data": {"num_tokens": 100, "start_index": 100},
    "seeds": [0, 1],
    "arms": {
        "kl": {},
        "vsd": {"objective": {"type": "vsd", "options": {"anchors": 8, "paths": 4}}},
    },
}


@pytest.fixture
def contest(tmp_path):
    """Write a contest with these arms beside ``kl`` and ``vsd``, and return its name."""

    def write(arms):
        path, warm = tmp_path / "toy.yaml", tmp_path / "warm.yaml"
        raw = CONTEST | {"warm_start": str(warm), "arms": CONTEST["arms"] | arms}
        for file, content in ((path, raw), (warm, WARM)):
            file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(path)

    return write


def arms_of(name, *, chosen=(), overrides=(), **wanted):
    """What ``prepare`` makes of a contest: base, arms, controls, notes."""
    names = arm_names(name, chosen)
    base = load_base(name, overrides)
    arms, notes = read_arms(names, overrides)
    kept, left_out = chosen_arms(base, Wanted(**wanted), arms)
    controls, dropped = controls_beside(base, kept)
    return base, kept, controls, [*notes, *left_out, *dropped]


def test_arms_of_a_contest_are_the_drafters_that_its_file_trains(tmp_path):
    """So one that was trained by name is found in the cache; every way in which an arm can differ is among these."""
    some = ["kl", "onpolicy-rkl", "vsd-full", "vsd-tree"]
    base, arms, controls, notes = arms_of("contest-hour", chosen=some, parts=["car"])
    assert [arm.name for arm in arms] == [*some, "no-car"]
    assert not any(arm.control for arm in arms)
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(family(base, [Arm(name="vsd"), *arms]), sort_keys=False), encoding="utf-8")
    for name in (*some, "vsd"):
        assert load_recipe(f"{path}:{name}@1").content() == load_recipe(f"contest-hour:{name}@1").content(), name
    assert [describe_change(arm.change) for arm in arms] == [
        "objective kl", "objective onpolicy", "targets full", "proposals tree, acceptance tree, targets full", "car 0"
    ]  # fmt: skip
    assert [arm.disabled for arm in arms] == [(), (), (), (), ("car",)]
    assert controls == []
    assert notes == [
        "The control 'continual-kl' is the arm 'kl', so it runs once, as that.",
        "The control 'onpolicy-rkl' is the arm 'onpolicy-rkl', so it runs once, as that.",
    ]


def test_all_arms_are_taken_in_order_unless_some_are_named(contest):
    name = contest({"ce": {"objective": {"type": "ce"}}})
    assert arm_names(name) == [f"{name}:kl", f"{name}:ce"]
    assert arm_names(f"{name}:vsd@1", ["ce", "ce"]) == [f"{name}:ce"]
    base, arms, controls, _ = arms_of(name, chosen=["ce"])
    assert (base.seeds, [arm.name for arm in arms]) == ((0, 1), ["ce"])
    assert [arm.name for arm in controls] == ["continual-kl", "onpolicy-rkl"]


def test_what_trains_alike_runs_once(contest):
    policy = {"type": "onpolicy", "options": {"divergence": "rkl", "paths": 2}}
    vsd = CONTEST["arms"]["vsd"]["objective"]
    name = contest({
        "again": {"objective": vsd | {"options": vsd["options"] | {"car": 0.1, "depth": 4}}},  # the defaults
        "plain": {"objective": vsd | {"options": vsd["options"] | {"car": 0}}},
        "onpolicy-rkl": {"objective": policy},
        "kl2": {"objective": {"type": "kl", "options": {}}, "training": {"seed": 3}},
        "slow": {"training": {"lr": 1e-5}},
    })  # fmt: skip
    _, arms, controls, notes = arms_of(name, parts=["car"])
    assert [arm.name for arm in arms] == ["kl", "plain", "onpolicy-rkl", "slow"]
    assert describe_change(arms[-1].change) == "objective kl, training.lr 1e-05"
    assert arms[1].disabled == ("car",)
    assert controls == []
    assert notes == [
        "'again' is left out: it is trained as 'vsd' is, to the last setting.",
        "'kl2' is left out: it is trained as 'kl' is, to the last setting.",
        "'no-car' is left out: it is trained as 'plain' is, to the last setting.",
        "The control 'continual-kl' is the arm 'kl', so it runs once, as that.",
        "The control 'onpolicy-rkl' is left out: an arm has its name, with other settings.",
    ]


def test_overrides_reach_all_arms_but_options_only_those_of_vsd(contest):
    full = {"objective": {"type": "vsd", "options": {"targets": "full"}}}
    overrides = ["objective.options.omega=0.7", "training.lr=0.5", "objective.ttt_steps=1"]
    base, arms, _, notes = arms_of(contest({"full": full}), overrides=overrides)
    kl, other = (arm.recipe["objective"] for arm in arms)
    assert (kl["ttt_steps"], kl["options"]) == (1, {})
    assert (other["ttt_steps"], other["options"]) == (1, {"targets": "full", "omega": 0.7})
    assert describe_change(arms[1].change) == "anchors 16, paths 8, targets full"
    assert base.recipe["training"]["lr"] == 0.5
    assert notes[0] == "objective.options.omega=0.7 is not for kl: other objectives have options of their own."


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"data": {"num_tokens": 5}}, "arm 'x' has another data than 'vsd'"),
        ({"warm_start": "eagle3-kl-hour", "data": {"start_index": 10**6}}, "arm 'x' has another warm_start"),
        ({"architecture": {"draft_vocab_size": 64}}, "arm 'x' has another architecture than 'vsd'"),
        ({"evaluation": {"prompts": 3}}, "arm 'x' has another evaluation than 'vsd'"),
        ({"target": "u"}, "arm 'x' has another target than 'vsd'"),
    ],
)
def test_what_arms_share_they_cannot_change(contest, arm, words):
    with pytest.raises(ConfigError, match=f"{words}.* may change objective and training"):
        read_arms(arm_names(contest({"x": arm})))


@pytest.mark.parametrize("name", ["warm-start", "a+b"])
def test_names_that_no_table_can_have(contest, name):
    with pytest.raises(ConfigError, match="an arm cannot be called"):
        read_arms(arm_names(contest({name: {}})))


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("ablation-quickstart", (), "ablation-quickstart has no arms to compare; name a contest"),
        ("contest-pictures", (), r"contest-pictures has no arm 'vsd' that its others \(eagle3-kl, "),
        ("ablation-hour", (), "ablation-hour has no arm beside 'vsd'"),
        ("contest-hour:kl", (), "contest-hour:kl is one arm.* name the contest alone: contest-hour"),
        ("contest-hour", ["topkk"], r"contest-hour has no arm 'topkk'\. Did you mean 'topk'"),
        ("contest-hour", ["vsd"], "--arm vsd: 'vsd' is what the arms are compared with"),
        ("contest-hout", (), "Did you mean 'contest-hour'"),
    ],
)
def test_mistakes_are_named(name, chosen, words):
    with pytest.raises(ConfigError, match=words):
        arm_names(name, chosen)


def test_the_suite_of_contests_has_the_prompts_of_its_namesakes():
    """Sources, hashes and templates are those of the suites that its prompts are from."""
    suites = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in list_data("suites").items()}
    for source, name in zip(suites["contest"]["sources"], ("mtbench", "humaneval", "gsm8k", "grounded"), strict=True):
        other = suites[name]["sources"][0]
        assert (source["limit"], source["name"]) == (16, other["name"])
        same = ("package", "file", "sha256", "template", "where", "max_characters")
        assert [source.get(key) for key in same] == [other.get(key) for key in same]
        templates = ([variant["template"] for variant in from_.get("variants", ())] for from_ in (source, other))
        assert next(templates) == next(templates)
    drafter = next(entry for entry in suites["contest"]["drafters"] if entry["type"] == "eagle3")
    assert (drafter["tree"], drafter["recipe"]) == (
        {"kind": "dynamic", "budget": 7, "depth": 3, "top_k": 4}, "contest-quickstart:vsd"
    )  # fmt: skip
