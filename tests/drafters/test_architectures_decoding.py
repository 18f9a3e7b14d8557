"""Trained drafters through the engine: lossless with every shape and rule, and step by step what the model says."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import SHAPES, make_prompt, make_target, plain, settings
from tests.drafters.test_eagle import random_weights
from tests.drafters.test_eagle3_decoding import DRAFT_IDS, WIDE, make_drafter_model

from vsdbench.decoding.engine import decode
from vsdbench_drafters.architectures.eagle import EagleModel
from vsdbench_drafters.architectures.medusa import MedusaModel
from vsdbench_drafters.objectives.base import DraftBatch, unroll


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def target(request):
    return make_target(request.param)


@pytest.fixture(scope="module", params=["eagle3", "eagle", "medusa"])
def model(target, request):
    if request.param == "eagle3":
        return make_drafter_model(target)
    if request.param == "eagle":
        made = EagleModel.from_target(target, DRAFT_IDS, seed=0)
        head = target.model.get_output_embeddings().weight[DRAFT_IDS]
        made = random_weights(made).to(target.dtype)
        made.frozen_head.copy_(head)
        return made
    return random_weights(MedusaModel.from_target(target, DRAFT_IDS, seed=0, num_heads=4, num_layers=1)).to(
        target.dtype
    )


@pytest.mark.parametrize("shape", [SHAPES[0], *WIDE[1:]], ids=lambda shape: shape.kind)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_is_lossless(target, model, shape, temperature):
    drafter = model.drafter(target.dtype)
    for seed in range(3):
        prompt = make_prompt((1, 8, 30)[seed], seed)
        chosen = settings(16, temperature=temperature, seed=seed, shape=shape)
        generation = decode(target, drafter, prompt, chosen)
        assert generation.token_ids == plain(target, prompt, chosen)
        assert all(step.num_nodes <= shape.budget and step.depth <= shape.depth for step in generation.steps)


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
def test_the_other_rules_run_with_sampled_trees(target, model, rule):
    chosen = settings(24, temperature=1.0, rule=rule, shape=WIDE[3])
    answers = [decode(target, model.drafter(target.dtype), make_prompt(8), chosen) for _ in range(2)]
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].token_ids) == 24
    assert sum(step.num_accepted for step in answers[0].steps) > 0


class Watching:
    """Passes everything on and remembers the likeliest child of the root of every tree."""

    def __init__(self, drafter):
        self.drafter, self.name = drafter, drafter.name
        self.first, self.accepted = [], []

    def begin(self, state, max_length):
        self.drafter.begin(state, max_length)

    def propose(self, state, shape, *, temperature, generator):
        tree = self.drafter.propose(state, shape, temperature=temperature, generator=generator)
        children = [node for node, parent in enumerate(tree.parents) if parent < 0]
        best = max(children, key=lambda node: float(tree.log_probs[node]))
        self.first.append((len(state.tokens), int(tree.tokens[best]), float(tree.log_probs[best])))
        return tree

    def commit(self, state, num_accepted, features):
        self.drafter.commit(state, num_accepted, features)
        self.accepted.append(num_accepted)


@pytest.mark.parametrize("shape", WIDE[:3], ids=lambda shape: shape.kind)
def test_step_by_step_it_computes_what_the_model_computes_at_once(target, model, shape):
    """After accepted and refused nodes it knows what one forward over the text with the target's features gives."""
    accepted = compared = 0
    for seed in range(8):
        drafter = Watching(model.drafter(target.dtype))
        prompt = make_prompt(6, seed)
        answer = decode(target, drafter, prompt, settings(40, temperature=1.0, seed=seed, shape=shape)).token_ids
        text = [*prompt, *answer]
        batch = DraftBatch.pack([text], [1], target.prefill(text, len(text)).features)
        with torch.no_grad():
            hidden = next(iter(unroll(model, batch, 1)))[1]
            expected = torch.log_softmax(hidden @ model.head(0).T, dim=-1)
        for num_tokens, token, log_prob in drafter.first:
            slot = num_tokens - 2  # the root, token num_tokens - 1, was predicted from the feature before it
            if slot < len(expected):
                best = expected[slot].max(-1)
                assert token == int(DRAFT_IDS[best.indices])
                assert log_prob == pytest.approx(float(best.values), rel=1e-4, abs=1e-5)
                compared += 1
        accepted += sum(drafter.accepted)
    assert compared > 20
    assert accepted > 0, "no accepted slot was ever committed, so the test shows nothing"


@pytest.mark.parametrize("shape", WIDE, ids=lambda shape: shape.kind)
def test_nothing_is_remembered_of_earlier_sequences(target, model, shape):
    chosen = settings(24, temperature=1.0, rule="rejection", seed=5, shape=shape)
    used, fresh = (Watching(model.drafter(target.dtype)) for _ in range(2))
    decode(target, used, make_prompt(50, 9), chosen)
    used.first.clear()
    answers = [decode(target, drafter, make_prompt(8), chosen).token_ids for drafter in (used, fresh)]
    assert answers[0] == answers[1]
    assert used.first == fresh.first
