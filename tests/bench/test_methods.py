"""From a suite's entries to methods: what is refused, what is trained, what each method carries."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from vsdbench import registry
from vsdbench.bench import methods as module
from vsdbench.bench.methods import build_methods
from vsdbench.bench.run import _describe
from vsdbench.errors import ConfigError
from vsdbench.suites.schema import DrafterEntry

TARGET = SimpleNamespace(name="toy", device=torch.device("cpu"))


def suite(*drafters, compiled=False):
    entries = [DrafterEntry(**entry) for entry in drafters]
    baselines = ["autoregressive", "hf-generate"]
    return SimpleNamespace(baselines=baselines, drafters=entries, peers=[], compile=compiled)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "drafter-1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def plugins(monkeypatch, checkpoint, tmp_path):
    """Stand-ins for the drafter and trainer plug-ins; returns what they were asked for."""
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    asked = SimpleNamespace(trained=[], built=[], found=[])

    def train(recipe, *, target, console):
        asked.trained.append((recipe, target, console))
        return SimpleNamespace(
            path=checkpoint, objective="kl", seconds=12.5, tokens=1000, target_forwards=7, cached=False
        )

    def build(target, *, checkpoint, options):
        asked.built.append((target, checkpoint, options))
        return SimpleNamespace(name="stand-in")

    def load(group, name):
        asked.found.append((group, name))
        if group == "vsdbench.trainers" and name == "default":
            return train
        if group == "vsdbench.drafters" and name in {"known", "other"}:
            return build
        raise ConfigError(f"unknown {group} '{name}'.")

    monkeypatch.setattr(registry, "load", load)
    return asked


def test_an_unknown_drafter_fails_before_anything_is_trained(plugins):
    entries = [{"name": "a", "type": "known", "recipe": "r"}, {"name": "b", "type": "unknown"}]
    with pytest.raises(ConfigError, match="unknown"):
        build_methods(suite(*entries), TARGET)
    assert plugins.trained == []
    assert plugins.built == []


def test_the_real_registry_suggests_a_name():
    with pytest.raises(ConfigError, match=r"unknown drafter 'ngran'\. Did you mean 'ngram'\?"):
        build_methods(suite({"name": "a", "type": "ngran"}), TARGET)


def test_a_missing_checkpoint_is_refused_with_its_path(plugins, tmp_path):
    entry = {"name": "a", "type": "known", "checkpoint": str(tmp_path / "nowhere"), "recipe": "r"}
    with pytest.raises(ConfigError, match=r"drafter 'a': checkpoint '.*nowhere' does not exist"):
        build_methods(suite(entry), TARGET)
    assert plugins.trained == []


def test_a_recipe_is_trained_through_the_plug_in(plugins, checkpoint):
    console = object()
    entry = {"name": "a", "type": "known", "recipe": "my-recipe", "options": {"x": 1}}
    *_, method = build_methods(suite(entry), TARGET, console=console)
    assert plugins.trained == [("my-recipe", TARGET, console)]
    assert plugins.built == [(TARGET, checkpoint, {"x": 1})]
    assert (method.name, method.kind, method.objective) == ("a", "drafter", "kl")
    assert len(method.drafter_fingerprint) == 16
    assert method.training == {
        "recipe": "my-recipe",
        "seconds": 12.5,
        "tokens": 1000,
        "target_forwards": 7,
        "cached": False,
        "checkpoint": "drafter-1",
    }


def test_a_checkpoint_stands_in_for_its_recipe(plugins, checkpoint):
    entry = {"name": "a", "type": "known", "recipe": "r", "checkpoint": str(checkpoint)}
    *_, method = build_methods(suite(entry), TARGET)
    assert plugins.trained == []
    assert plugins.built == [(TARGET, checkpoint, {})]
    assert method.training == {}
    before = method.drafter_fingerprint
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert build_methods(suite(entry), TARGET)[-1].drafter_fingerprint != before


def test_a_draft_model_is_known_by_its_own_weights(plugins, monkeypatch):
    drafter = SimpleNamespace(model=SimpleNamespace(fingerprint="f" * 16))
    monkeypatch.setattr(registry, "load", lambda group, name: lambda target, **details: drafter)
    assert build_methods(suite({"name": "a", "type": "known"}), TARGET)[-1].drafter_fingerprint == "f" * 16


@pytest.mark.parametrize("reason", [None, "its steps vary"])
def test_steps_of_drafters_are_compiled_for_their_trees_if_that_is_asked_for(plugins, monkeypatch, reason):
    def compile_steps(graphs, shape):
        graphs.count += shape.depth
        return reason

    drafters = {"known": SimpleNamespace(name="a", compile_steps=compile_steps), "other": SimpleNamespace(name="b")}
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda group, name: load(group, name) and (lambda *_, **__: drafters[name]))
    monkeypatch.setattr(module, "why_not", lambda device: None)
    tree = {"kind": "dynamic", "budget": 7, "depth": 3, "top_k": 4}
    entries = [{"name": name, "type": name, "tree": tree} for name in drafters]
    *_, able, other = build_methods(suite(*entries, compiled=True), TARGET)
    assert (able.graphs.count, able.not_compiled) == (3, reason)
    assert "none of a form" in other.not_compiled
    told = [entry.get("compiled") for entry in _describe([able, other])]
    assert told[0] == {"graphs": 3, "seconds": 0.0} | ({"not_compiled": reason} if reason else {})
    assert told[1]["graphs"] == 0
    plain = build_methods(suite(*entries), TARGET)[-2]
    assert (plain.graphs, plain.not_compiled, "compiled" in _describe([plain])[0]) == (None, None, False)


def test_baselines_come_first_and_only_drafters_have_trees(plugins):
    entries = [{"name": "a", "type": "known"}, {"name": "b", "type": "other", "tree": {"budget": 3, "depth": 2}}]
    methods = build_methods(suite(*entries), TARGET)
    assert [(m.name, m.kind) for m in methods] == [
        ("autoregressive", "baseline"),
        ("hf-generate", "baseline"),
        ("a", "drafter"),
        ("b", "drafter"),
    ]
    assert [m.shape and m.shape.budget for m in methods] == [None, None, 7, 3]
    assert [m.drafter_fingerprint for m in methods] == [None] * 4
