"""Every shipped recipe is valid; what determines a drafter is hashed, and what does not is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsdbench.config import content_hash, load_yaml
from vsdbench.errors import ConfigError
from vsdbench_drafters.training.contest import members
from vsdbench_drafters.training.recipe import ObjectiveConfig, load_recipe, make_objective
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
    with pytest.raises(ConfigError, match="unknown objective 'kll'"):
        load_recipe(path, ["objective.type=kll"])


def test_an_option_that_the_objective_does_not_take():
    with pytest.raises(ConfigError, match="objective 'kl' does not take"):
        make_objective(ObjectiveConfig(type="kl", options={"top": 1}))


def test_only_what_changes_the_weights_is_hashed():
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    base = content_hash(load_recipe(path).content())
    speed = ("features=online", "checkpoint_s=5", "compile=true", "shard_target=true")
    for same in (*(f"training.{change}" for change in speed), "description=x", "data.slots=3"):
        assert content_hash(load_recipe(path, [same]).content()) == base
    for other in ("training.lr=1e-4", "training.seed=1", "objective.type=ce", "data.num_tokens=5"):
        assert content_hash(load_recipe(path, [other]).content()) != base


def test_estimate_grows_with_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    quick, more = estimate(load_recipe(path)), estimate(load_recipe(path, ["training.epochs=5"]))
    assert not quick["cached"]
    assert 60 < quick["seconds"] < more["seconds"]
    assert quick["bytes"] > 0
    assert estimate(load_recipe(path, ["training.features=online"]))["bytes"] == 0
