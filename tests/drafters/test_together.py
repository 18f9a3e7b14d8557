"""Every drafter for several sequences at a time: trees and answers are those of one at a time."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import SHAPES, make_prompt, make_target, settings
from tests.drafters.test_eagle3_decoding import DRAFT_IDS, make_drafter_model

from vsdbench.bench.methods import forks
from vsdbench.decoding.engine import Autoregressive, decode, decode_together
from vsdbench.decoding.interfaces import DraftsTogether
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.draft_model import DraftModelDrafter
from vsdbench_drafters.architectures.eagle import EagleModel
from vsdbench_drafters.architectures.medusa import MedusaModel
from vsdbench_drafters.architectures.ngram import NgramDrafter

PROMPTS = [make_prompt(length, seed) for seed, length in enumerate((9, 1, 22, 14))]


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


def spread(model, dtype):
    """Random weights, so that trees are not all the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


DRAFTERS = {
    "ngram": lambda target: NgramDrafter(),
    "draft_model": lambda target: DraftModelDrafter(make_target(seed=3, dtype=target.dtype), target.vocab_size),
    "medusa": lambda target: spread(
        MedusaModel.from_target(target, DRAFT_IDS, seed=0, num_heads=3, num_layers=1), target.dtype
    ).drafter(target.dtype),
    "eagle": lambda target: spread(EagleModel.from_target(target, DRAFT_IDS, seed=0), target.dtype).drafter(
        target.dtype
    ),
    "eagle3": lambda target: make_drafter_model(target).drafter(target.dtype),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_trees_and_answers_are_those_of_one_at_a_time(target, name):
    drafter = DRAFTERS[name](target)
    chosen = [settings(8 + 3 * seed, seed=seed, shape=SHAPES[2]) for seed in range(4)]
    alone = [decode(target, drafter, *both) for both in zip(PROMPTS, chosen, strict=True)]
    generations = decode_together(target, forks(drafter, 3), PROMPTS, chosen)
    for generation, one in zip(generations, alone, strict=True):
        assert generation.token_ids == one.token_ids
        assert [drafted.parents for drafted in generation.drafted] == [drafted.parents for drafted in one.drafted]
        for ours, theirs in zip(generation.drafted, one.drafted, strict=True):
            torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)


RULES = [("coupled", SHAPES[0]), ("coupled", SHAPES[4]), ("rejection", SHAPES[1]), ("traversal", SHAPES[3])]


@pytest.mark.parametrize(("rule", "shape"), RULES, ids=lambda value: getattr(value, "kind", value))
def test_every_kind_of_tree_and_rule_gives_what_it_gives_alone(target, rule, shape):
    drafter = DRAFTERS["eagle3"](target)
    assert isinstance(drafter, DraftsTogether)
    chosen = [settings(10, temperature=1.0, rule=rule, seed=seed, shape=shape) for seed in range(4)]
    alone = [decode(target, drafter, *both) for both in zip(PROMPTS, chosen, strict=True)]
    generations = decode_together(target, forks(drafter, 3), PROMPTS, chosen)
    assert [one.token_ids for one in generations] == [one.token_ids for one in alone]
    for ours, theirs in zip(generations, alone, strict=True):
        assert [step.num_accepted for step in ours.steps] == [step.num_accepted for step in theirs.steps]


def test_a_drafter_that_cannot_fork_is_refused():
    class Single(Autoregressive):
        name = "single"
        fork = None

    assert len(forks(Single(), 1)) == 1
    with pytest.raises(ConfigError, match=r"'single'.*fork\(\).*batch size 1"):
        forks(Single(), 2)
