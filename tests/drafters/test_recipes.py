"""Every shipped recipe is valid; what determines a drafter is hashed, and what does not is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsdbench.config import content_hash, load_yaml
from vsdbench.errors import ConfigError
from vsdbench_drafters.training import recipe
from vsdbench_drafters.training.contest import members
from vsdbench_drafters.training.recipe import ObjectiveConfig, load_recipe, make_objective, option_defaults
from vsdbench_drafters.training.train import estimate

FOLDER = Path(__file__).parents[2] / "drafters" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_recipes():
    assert {"eagle3-ce-quickstart", "eagle3-kl-quickstart", "eagle3-kl-hour"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_named_as_its_file(path):
    for name in members(path):
        recipe = load_recipe(name)
        assert recipe.name == path.stem + name.removeprefix(str(path))
        assert recipe.description.endswith(".")
        assert make_objective(recipe.objective).name == recipe.objective.type


def test_quickstart_recipes_differ_in_the_objective_only():
    ce, kl = (load_yaml(FOLDER / f"eagle3-{name}-quickstart.yaml") for name in ("ce", "kl"))
    different = {key for key in ce if ce[key] != kl[key]}
    assert different == {"name", "description", "objective"}
    assert {**ce["objective"], "type": "kl"} == kl["objective"]


def test_overrides_and_unknown_keys():
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    assert load_recipe(path, ["training.lr=1e-4"]).training.lr == pytest.approx(1e-4)
    with pytest.raises(ConfigError, match=r"training\.lrr.*Did you mean 'lr'"):
        load_recipe(path, ["training.lrr=1"])
    with pytest.raises(ConfigError, match="betas are"):
        load_recipe(path, ["training.betas=[0.9, 1.0]"])
    with pytest.raises(ConfigError, match=r"'data.temperatures.1' is -1"):
        load_recipe(path, ["data.temperatures=[0, -1]"])
    with pytest.raises(ConfigError, match="unknown objective 'kll'"):
        load_recipe(path, ["objective.type=kll"])


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("kl", {"top": 1}, "objective 'kl' has no option 'top'. It takes none."),
        ("vsd", {"betta": 1}, "objective 'vsd' has no option 'betta'. Did you mean 'beta'?"),
        ("vsd", {"tree_budgets": 1}, "objective 'vsd' has no option 'tree_budgets'. Did you mean 'tree_budget'?"),
        ("topk", {"zzz": 1}, "objective 'topk' has no option 'zzz'. Known: k, soft_weight."),
        ("gto", {"proposals": "tree"}, "objective 'gto' sets 'proposals' itself: remove objective.options.proposals."),
        ("kl", {"ttt_steps": 1}, "objective.options.ttt_steps is set twice: write it as objective.ttt_steps alone."),
    ],
)  # fmt: skip
def test_an_option_that_the_objective_does_not_take_is_named_with_what_it_takes(objective, options, message):
    with pytest.raises(ConfigError) as caught:
        make_objective(ObjectiveConfig(type=objective, options=options))
    assert str(caught.value) == message


def test_an_option_of_the_wrong_type_is_shown():
    with pytest.raises(ConfigError, match=r"objective\.options\.beta is 'half'; it should be like 0\.5, which is the"):
        make_objective(ObjectiveConfig(type="jsd", options={"beta": "half"}))


def test_an_objective_that_cannot_be_made_is_named(monkeypatch):
    monkeypatch.setattr(recipe.registry, "load", lambda *_: lambda *, ttt_steps, step_weight, width: width)
    with pytest.raises(
        ConfigError, match=r"objective 'wide' cannot use these options, \{\}: .*'width'; see .*show wide"
    ):
        make_objective(ObjectiveConfig(type="wide"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective.type=klx", "quickstart.yaml: unknown objective 'klx'. Did you mean 'kl'?"),
        ("objective.options.top=1", "quickstart.yaml: objective 'kl' has no option 'top'."),
        ("warm_start=eagle3-kl-strt", "quickstart.yaml: warm_start: unknown recipe 'eagle3-kl-strt'. Did you mean"),
        ("training.keys=perhaps", "'training.keys' is 'perhaps': it should be a valid boolean or 'auto'."),
        (
            "evaluation.tree=automatic",
            "'evaluation.tree' is 'automatic': it should be 'auto', or a mapping such as {kind: dynamic",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_said_with_its_file(change, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(FOLDER / "eagle3-kl-quickstart.yaml", [change])
    assert message in str(caught.value)
    assert str(caught.value).count("quickstart.yaml") == 1


def test_options_of_objectives_that_are_not_classes_of_ours():
    def anything(*, ttt_steps, step_weight, **options):
        return options

    assert option_defaults(anything) is None
    assert option_defaults(lambda ttt_steps, step_weight, width=1: width) == {"width": 1}


def test_only_what_changes_the_weights_is_hashed():
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    base = content_hash(load_recipe(path).content())
    speed = ("features=online", "checkpoint_s=5", "compile=true", "shard_target=true")
    for same in (*(f"training.{change}" for change in speed), "description=x", "data.slots=3"):
        assert content_hash(load_recipe(path, [same]).content()) == base
    assert content_hash(load_recipe(path, ["architecture.copying=false"]).content()) == base  # older hashes stay
    for other in (
        "architecture.copying=true",
        "training.lr=1e-4",
        "training.seed=1",
        "objective.type=ce",
        "data.num_tokens=5",
    ):
        assert content_hash(load_recipe(path, [other]).content()) != base


def test_estimate_grows_with_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    quick, more = estimate(load_recipe(path)), estimate(load_recipe(path, ["training.epochs=5"]))
    assert not quick["cached"]
    assert 60 < quick["seconds"] < more["seconds"]
    assert quick["bytes"] > 0
    assert estimate(load_recipe(path, ["training.features=online"]))["bytes"] == 0


def test_a_machine_whose_products_are_faster_is_estimated_to_need_less(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    recipe = load_recipe("contest-quickstart:vsd@0")
    usual, twice, gpu = (estimate(recipe, flops=flops)["seconds"] for flops in (230e9, 460e9, 1e15))
    assert usual == pytest.approx(estimate(recipe)["seconds"])
    assert twice == pytest.approx(usual / 2)
    assert gpu > usual / 100  # small models keep it waiting


def test_a_step_is_charged_at_the_rate_of_its_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    names = ("eagle3-ce-quickstart", "eagle-feature-quickstart", "medusa-ce-quickstart")
    steps = ["training.epochs=2", "data.num_tokens=1000", "objective.ttt_steps=3"]
    eagle3, eagle, medusa = (estimate(load_recipe(FOLDER / f"{name}.yaml", steps))["training_s"] for name in names)
    assert eagle == eagle3
    assert 0.37 * eagle3 < medusa < 0.59 * eagle3  # what was measured with small and with large vocabularies
