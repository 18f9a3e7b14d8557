"""Recipes choose an architecture; what was trained before there was a choice is found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsdbench.config import content_hash
from vsdbench.errors import ConfigError
from vsdbench_drafters.training.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "drafters" / "recipes"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eagle3-ce-quickstart", "0e1e2138df9d6c42"),
        ("eagle3-kl-quickstart", "d379f037c1f38b52"),
        ("eagle3-kl-hour", "f5e461cdf49b2713"),
        ("eagle3-kl-grounded", "cd14be54887f3f57"),
    ],
)
def test_trained_drafters_are_found_again(name, expected):
    """The hash names a cached drafter: if it changes, an hour of training is done again without need."""
    assert content_hash(load_recipe(FOLDER / f"{name}.yaml").content()) == expected


def test_an_unknown_architecture_and_an_option_it_does_not_have():
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    with pytest.raises(ConfigError, match=r"'architecture\.type' is 'eagle33'"):
        load_recipe(path, ["architecture.type=eagle33"])
    with pytest.raises(ConfigError, match=r"unknown key 'architecture\.num_layers'"):
        load_recipe(path, ["architecture.num_layers=2"])
