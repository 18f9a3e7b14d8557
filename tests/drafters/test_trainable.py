"""Recipes choose an architecture: each trains, is found again, decodes losslessly, and refuses what does not fit it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vsdbench import registry
from vsdbench.config import content_hash
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.trainable import fresh_model, load_model
from vsdbench_drafters.training import train as train_module
from vsdbench_drafters.training.recipe import (
    Eagle3Architecture,
    EagleArchitecture,
    MedusaArchitecture,
    load_recipe,
)
from vsdbench_drafters.training.train import train

FOLDER = Path(__file__).parents[2] / "drafters" / "recipes"
RECIPE = """
name: tiny
target: toy
architecture: {ARCHITECTURE}
objective: {OBJECTIVE}
data: {num_tokens: 100, num_heldout: 2}
training: {batch_tokens: 30, epochs: 2, autocast: false}
evaluation: {prompts: 2, max_new_tokens: 8, times: 2, tree: {budget: 3, depth: 2, top_k: 2}}
"""
EAGLE = "type: eagle, draft_vocab_size: 40"
MEDUSA = "type: medusa, draft_vocab_size: 40, num_heads: 2"
PAIRS = [
    ("draft_vocab_size: 40", "type: kl, ttt_steps: 2"),  # EAGLE-3 unless a recipe says otherwise
    ("draft_vocab_size: 40, copying: true", "type: kl, ttt_steps: 2"),
    (EAGLE, "type: feature, ttt_steps: 1"),
    (EAGLE, "type: feature, ttt_steps: 2"),
    (EAGLE, "type: topk, ttt_steps: 2"),
    (EAGLE, "type: vsd, ttt_steps: 2, options: {anchors: 2, paths: 2, depth: 2}"),
    ("type: msd, draft_vocab_size: 40", "type: feature, ttt_steps: 1"),
    ("type: vispec, draft_vocab_size: 40, num_q: 3", "type: vsd, options: {anchors: 2, paths: 2, depth: 2}"),
    (MEDUSA, "type: ce, ttt_steps: 2"),
    (MEDUSA, "type: kl, ttt_steps: 2"),
]


@pytest.fixture
def write(tmp_path):
    def recipe(architecture, objective, name="tiny"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.replace("ARCHITECTURE", architecture).replace("OBJECTIVE", objective))
        return path

    return recipe


@pytest.fixture
def toy_data(tmp_path, monkeypatch, toy_sequences):
    class Lengths(list):
        lengths = torch.tensor([len(sequence.ids) for sequence in toy_sequences])

    def data(_config, *_args, **_kwargs):
        return SimpleNamespace(
            sequences=Lengths(toy_sequences), heldout=toy_sequences[:3], fingerprint="toy", num_response_tokens=60
        )

    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train_module, "ensure_data", data)
    monkeypatch.setattr(train_module, "data_key", lambda _config, _target: "key")


@pytest.mark.parametrize(("architecture", "objective"), PAIRS)
def test_a_recipe_trains_a_drafter_that_decodes_losslessly(write, toy_target, toy_data, architecture, objective):
    path = write(architecture, objective)
    trained = train(path, target=toy_target)
    assert not trained.cached
    assert trained.tokens > 0
    assert trained.heldout["tau"] >= 1
    assert train(path, target=toy_target).cached
    config = load_recipe(path).architecture
    model = load_model(config, trained.path, toy_target)
    fresh = dict(fresh_model(config, toy_target, model.draft_ids, seed=0).named_parameters())
    assert any(not torch.equal(p, fresh[name]) for name, p in model.named_parameters())
    drafter = registry.load("vsdbench.drafters", config.type)(toy_target, checkpoint=trained.path, options={})
    assert drafter.name == config.type
    for kind in ("chain", "dynamic"):
        settings = DecodeSettings(max_new_tokens=24, shape=TreeShape(kind=kind, budget=6, depth=3, top_k=3))
        plain = decode(toy_target, Autoregressive(), [5, 9, 33, 12], settings)
        assert decode(toy_target, drafter, [5, 9, 33, 12], settings).token_ids == plain.token_ids


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("eagle-feature-quickstart", []), ("medusa-ce-quickstart", ["architecture.num_layers=2"])],
)
def test_shipped_recipes_learn_what_they_are_shown(toy_target, toy_data, name, changes, optimiser):
    """The same few sequences again and again: the loss that the recipe minimises falls by a quarter at least."""
    base = ["architecture.draft_vocab_size=60", "training.autocast=false", "training.epochs=60", "training.lr=2e-2"]
    recipe = load_recipe(FOLDER / f"{name}.yaml", [*base, *changes, f"training.optimiser={optimiser}"])
    trained = train(recipe, target=toy_target)
    entries = [json.loads(line) for line in (trained.path / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < 3 / 4 * entries[0]["loss"], [entry["loss"] for entry in entries]


def test_only_medusa_heads_and_the_layer_are_trained(toy_target):
    ids = torch.arange(3, 43)
    eagle3 = fresh_model(Eagle3Architecture(), toy_target, ids, seed=0)
    eagle = fresh_model(EagleArchitecture(type="eagle"), toy_target, ids, seed=0)
    medusa = fresh_model(MedusaArchitecture(type="medusa", num_heads=2), toy_target, ids, seed=0)
    assert "lm_head.weight" in dict(eagle3.named_parameters())
    assert not any("head" in name for name, _ in eagle.named_parameters())
    assert {n for n, _ in medusa.named_parameters() if "head" in n} == {"lm_head.0.weight", "lm_head.1.weight"}


@pytest.mark.parametrize(
    ("architecture", "objective", "message"),
    [
        (
            "type: eagle3",
            "type: feature, ttt_steps: 2",
            "'feature' cannot train 'eagle3'; set architecture.type to eagle",
        ),
        (MEDUSA, "type: feature, ttt_steps: 2", "'feature' cannot train 'medusa'"),
        (MEDUSA, "type: vsd, ttt_steps: 2", "'vsd' cannot train 'medusa'; set architecture.type to eagle3 or eagle"),
        (MEDUSA, "type: ce, ttt_steps: 3", "ttt_steps is 3, but every one of the 2 Medusa heads"),
        (EAGLE, "type: feature, options: {noise: -1}", "noise is -1"),
        ("type: eagle, num_heads: 2", "type: kl", r"unknown key 'architecture\.num_heads'"),
        ("type: medusa, num_heads: 0", "type: ce", r"'architecture\.num_heads' is 0"),
        ("type: eagle4", "type: kl", r"'architecture\.type' is 'eagle4'\. Did you mean 'eagle"),
        ("type: [1]", "type: kl", r"architecture"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(write, architecture, objective, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(architecture, objective))


def test_a_warm_start_is_of_the_same_architecture(write, tmp_path):
    warm = write(EAGLE, "type: feature", name="warm")
    path = write(MEDUSA, "type: ce, ttt_steps: 2")
    path.write_text(path.read_text() + f"warm_start: {warm}\n")
    with pytest.raises(ConfigError, match="the warm start 'tiny' trains 'eagle'"):
        load_recipe(path, ["data.start_index=100"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eagle3-ce-quickstart", "0e1e2138df9d6c42"),
        ("eagle3-kl-quickstart", "d379f037c1f38b52"),
        ("eagle3-kl-hour", "93823e3ebc2317f8"),
        ("eagle3-kl-grounded", "f795ac74f32e111b"),
    ],
)
def test_trained_drafters_are_found_again(name, expected):
    """The hash names a cached drafter: if it changes, an hour of training is done again without need."""
    assert content_hash(load_recipe(FOLDER / f"{name}.yaml").content()) == expected


def test_an_architecture_without_a_type_is_eagle3():
    path = FOLDER / "eagle3-kl-quickstart.yaml"
    assert load_recipe(path).architecture == Eagle3Architecture(draft_vocab_size=4096)
    with pytest.raises(ConfigError, match=r"unknown key 'architecture\.num_layers'"):
        load_recipe(path, ["architecture.num_layers=2"])
