"""Peers emit plain decoding's tokens, and their steps are the target's forwards."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import make_prompt, make_target, plain, settings

from vsdbench import registry
from vsdbench.decoding import peers
from vsdbench.errors import ConfigError

PROMPT = [*make_prompt(9), *make_prompt(9), *make_prompt(5)]  # it repeats itself, so a look-up finds something


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


@pytest.fixture(params=["hf-prompt-lookup", "the target drafts for itself", "a stranger drafts"])
def peer(request, target, monkeypatch):
    if request.param == "hf-prompt-lookup":
        return registry.load("vsdbench.peers", "hf-prompt-lookup")(target, {"num_tokens": 4})
    seed = 0 if "itself" in request.param else 1
    draft = make_target(dtype=torch.float32, seed=seed)
    monkeypatch.setattr(peers, "load_draft_model", lambda *_, **__: draft)
    return registry.load("vsdbench.peers", "hf-assisted")(target, {"model": "any", "num_tokens": 3})


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 11, "top_p": 0.9}])
def test_it_emits_plain_decodings_tokens(target, peer, sampling):
    for seed in range(2):
        chosen = settings(24, seed=seed, **sampling)
        generation = peer(PROMPT, chosen)
        assert generation.token_ids == plain(target, PROMPT, chosen)
        assert generation.stop_reason == "length"
        assert sum(step.num_emitted for step in generation.steps) == len(generation.token_ids) - 1
        assert generation.prefill_s > 0
        assert generation.decode_s > 0
        assert all(min(step.draft_ms, step.verify_ms, step.other_ms) >= 0 for step in generation.steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_ends_where_plain_decoding_ends(target, peer, temperature):
    answer = plain(target, PROMPT, settings(20, temperature=temperature))
    chosen = settings(20, temperature=temperature, eos_ids={answer[5]})
    generation = peer(PROMPT, chosen)
    assert generation.token_ids == plain(target, PROMPT, chosen)
    assert generation.stop_reason == "eos"


def test_steps_are_forwards_and_emit_what_the_prefill_did_not(target, monkeypatch):
    draft = make_target(dtype=torch.float32)
    monkeypatch.setattr(peers, "load_draft_model", lambda *_, **__: draft)
    run = peers.build_assisted(target, {"model": "itself", "num_tokens": 3})
    generation = run(PROMPT, settings(24))
    # A draft model that is the target is always right: four tokens a forward; the prefill emits one and three.
    assert [step.num_emitted for step in generation.steps] == [3, 4, 4, 4, 4, 4]
    assert [step.num_nodes for step in generation.steps[:-1]] == [2, 3, 3, 3, 3]
    assert all(step.num_accepted == step.num_emitted - 1 for step in generation.steps)
    assert generation.steps[0].verify_ms == 0


def test_options_that_do_not_exist_are_named(target):
    with pytest.raises(ConfigError, match=r"no option 'num_token'.*num_tokens"):
        peers.build_lookup(target, {"num_token": 3})
    with pytest.raises(ConfigError, match="num_tokens is 0"):
        peers.build_lookup(target, {"num_tokens": 0})
    with pytest.raises(ConfigError, match="needs the option 'model'"):
        peers.build_assisted(target, {})
    with pytest.raises(ConfigError, match="unknown peer 'hf-assist'"):
        registry.load("vsdbench.peers", "hf-assist")
