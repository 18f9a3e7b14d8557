"""Contests: arms that share everything but what they name, a warm start, budgets, and selection by real decoding."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from vsdbench.config import load_yaml
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.training import train as train_module
from vsdbench_drafters.training.contest import check_family, members, split_name
from vsdbench_drafters.training.heldout import DecodedHeldOut
from vsdbench_drafters.training.loop import TrainingLoop
from vsdbench_drafters.training.recipe import load_recipe
from vsdbench_drafters.training.train import drafter_key, estimate, train

WARM = """
name: warm
target: toy
architecture: {draft_vocab_size: 40}
objective: {type: kl, ttt_steps: 2}
data: {num_tokens: 100}
training: {batch_tokens: 16, epochs: 2, autocast: false}
"""
CONTEST = """
name: contest
target: toy
warm_start: WARM
objective: {type: kl, ttt_steps: 2}
data: {num_tokens: 100, start_index: 100, num_heldout: 2}
training: {batch_tokens: 16, lr: 1e-3, autocast: false}
evaluation: {prompts: 2, max_new_tokens: 8, times: 2, tree: {budget: 3, depth: 2, top_k: 2}}
seeds: [0, 3]
arms:
  kl: {}
  vsd: {objective: {type: vsd, options: {anchors: 2, paths: 2, depth: 2}}}
  longer: {training: {epochs: 2}}
"""


@pytest.fixture
def contest(tmp_path):
    (tmp_path / "warm.yaml").write_text(WARM)
    path = tmp_path / "contest.yaml"
    path.write_text(CONTEST.replace("WARM", str(tmp_path / "warm.yaml")))
    return path


def test_names_of_members():
    assert split_name("drafters/recipes/contest.yaml:vsd-full@12") == ("drafters/recipes/contest.yaml", "vsd-full", 12)
    assert split_name("plain@1") == ("plain", None, 1)


def test_a_family_is_every_arm_with_every_seed(contest):
    names = [name.removeprefix(str(contest)) for name in members(contest)]
    assert names == [":kl@0", ":vsd@0", ":longer@0", ":kl@3", ":vsd@3", ":longer@3"]
    assert members(f"{contest}:vsd") == [f"{contest}:vsd@0", f"{contest}:vsd@3"]
    assert members(f"{contest}@5") == [f"{contest}:{arm}@5" for arm in ("kl", "vsd", "longer")]
    assert members("eagle3-kl-quickstart") == ["eagle3-kl-quickstart"]
    check_family(load_yaml(contest), "contest")


def test_arms_differ_in_what_they_name_only(contest):
    kl, vsd, longer, other = (load_recipe(f"{contest}:{arm}") for arm in ("kl", "vsd", "longer", "kl@3"))
    assert (kl.name, other.name) == ("contest:kl@0", "contest:kl@3")
    assert vsd.objective.options == {"anchors": 2, "paths": 2, "depth": 2}
    assert vsd.model_copy(update={"objective": kl.objective, "name": kl.name}) == kl
    assert longer.training.model_copy(update={"epochs": 1}) == kl.training
    assert other.training.model_copy(update={"seed": 0}) == kl.training
    assert load_recipe(f"{contest}:kl", ["training.lr=5e-4"]).training.lr == 5e-4


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("vsd: {", "vsd: 3 #", "'arms' must map names"),
        ("seeds: [0, 3]", "seeds: 3", "'seeds' is 3"),
        ("seeds: [0, 3]", "seeds: [3, 3]", "'seeds' is \\[3, 3\\]; name each one once"),
        ("  kl: {}", "  k l: {}", "an arm is called 'k l'; use letters"),
        ("start_index: 100", "start_index: 99", "may have used prompts up to 100"),
        ("type: vsd", "type: vsdd", "Did you mean 'vsd'"),
        ("anchors: 2, ", "ancors: 2, ", "ancors"),
    ],
)
def test_mistakes_are_named(contest, old, new, words):
    contest.write_text(contest.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=words):
        check_family(load_yaml(contest), "contest.yaml")


def test_an_arm_must_be_named_and_known(contest):
    with pytest.raises(ConfigError, match="several arms"):
        load_recipe(contest)
    with pytest.raises(ConfigError, match="Did you mean 'vsd'"):
        load_recipe(f"{contest}:vdsd")
    with pytest.raises(ConfigError, match="no arms"):
        load_recipe("eagle3-kl-quickstart:vsd")


@pytest.fixture
def toy_data(tmp_path, monkeypatch, toy_sequences):
    class Lengths(list):
        lengths = torch.tensor([len(sequence.ids) for sequence in toy_sequences])

    def data(config, *_args, **_kwargs):
        return SimpleNamespace(
            sequences=Lengths(toy_sequences),
            heldout=toy_sequences[:3],
            fingerprint=f"toy{config.start_index}",
            num_response_tokens=60,
        )

    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train_module, "ensure_data", data)
    monkeypatch.setattr(train_module, "data_key", lambda config, _target: f"key{config.start_index}")


def test_all_arms_start_from_the_same_weights(contest, toy_target, toy_data, monkeypatch):
    started = []
    run = TrainingLoop.run

    def watch(self, **options):
        started.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return run(self, **options)

    monkeypatch.setattr(TrainingLoop, "run", watch)
    trained = [train(f"{contest}:{arm}", target=toy_target) for arm in ("kl@0", "vsd@0", "kl@3")]
    warm = started[0]  # the warm start was trained first, once
    assert len(started) == 4
    saved = dict(Eagle3Model.load(trained[0].warm_start.path, toy_target).named_parameters())
    for other in started[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, saved[name]), name
            assert tensor.dtype == torch.float32
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in warm.items())
    assert len({one.path for one in trained}) == 3
    kl, vsd, _ = trained
    assert kl.tokens == vsd.tokens > 0
    # Features come with the answers; the oracle adds one forward a sequence that has drafted tokens.
    assert (kl.target_forwards, vsd.target_forwards) == (0, 8)
    assert vsd.heldout["tau"] >= 1
    assert train(f"{contest}:vsd@0", target=toy_target).cached
    assert estimate(load_recipe(f"{contest}:vsd@0"))["cached"]


def test_a_warm_start_is_part_of_the_key(contest, toy_target, toy_data):
    recipe = load_recipe(f"{contest}:kl")
    key = drafter_key(recipe, toy_target)
    warm = contest.parent / "warm.yaml"
    warm.write_text(warm.read_text().replace("epochs: 2", "epochs: 3"))
    assert drafter_key(recipe, toy_target) != key


def test_the_best_evaluation_is_kept(contest, toy_target, toy_data, monkeypatch):
    """The first of two evaluations is made to look better: its weights are saved, not those of the end, and its tau."""
    taus = iter([2.0, 1.5])
    seen = []

    def evaluate(_self, drafter, *, autocast):
        del autocast
        seen.append({name: p.detach().clone() for name, p in drafter.named_parameters()})
        return {"tau": next(taus)}

    recipe = load_recipe(f"{contest}:kl")
    train(recipe.warm_start, target=toy_target)
    monkeypatch.setattr(DecodedHeldOut, "evaluate", evaluate)
    trained = train(recipe, target=toy_target)
    summary = json.loads((trained.path / "training.json").read_text())
    assert summary["selected_step"] > 0
    assert trained.heldout == summary["heldout"] == {"tau": 2.0}
    found = dict(Eagle3Model.load(trained.path, toy_target).named_parameters())
    for name, tensor in seen[0].items():
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(found[name], tensor) for name, tensor in seen[1].items())


def test_more_held_out_prompts_than_there_are(contest, toy_target, toy_data):
    with pytest.raises(ConfigError, match=r"evaluation\.prompts is 9"):
        train(load_recipe(f"{contest}:kl", ["evaluation.prompts=9"]), target=toy_target)
