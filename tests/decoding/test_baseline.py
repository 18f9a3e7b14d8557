"""The ``generate`` baseline does the engine's work: the same tokens, the same ends, times of its own."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import make_prompt, make_target, plain, settings

from vsdbench.decoding.baseline import hf_generate
from vsdbench.decoding.engine import Autoregressive, decode
from vsdbench.errors import ConfigError

PROMPT = make_prompt(11)


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 11, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_the_engines_tokens(family, sampling, dtype):
    target = make_target(family, dtype=dtype)
    for seed in range(3):
        prompt = make_prompt(4 + 3 * seed, seed)
        chosen = settings(24, seed=seed, **sampling)
        generation = hf_generate(target, prompt, chosen)
        assert generation.token_ids == plain(target, prompt, chosen)
        assert generation.stop_reason == "length"


def test_seeds_matter_only_when_sampling(target):
    assert hf_generate(target, PROMPT, settings(12, seed=1)).token_ids == plain(target, PROMPT, settings(12, seed=2))
    answers = {tuple(hf_generate(target, PROMPT, settings(12, temperature=1.0, seed=s)).token_ids) for s in range(4)}
    assert len(answers) == 4


@pytest.mark.parametrize("index", [0, 1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_ends_where_the_engine_ends(target, index, temperature):
    answer = plain(target, PROMPT, settings(20, temperature=temperature))
    chosen = settings(20, temperature=temperature, eos_ids={answer[index], answer[index + 1]})
    ours, theirs = decode(target, Autoregressive(), PROMPT, chosen), hf_generate(target, PROMPT, chosen)
    assert theirs.token_ids == ours.token_ids
    assert theirs.stop_reason == ours.stop_reason == "eos"
    assert len(ours.token_ids) <= index + 1


def test_the_context_is_filled_and_not_exceeded(target):
    prompt = make_prompt(target.max_positions - 5)
    ours, theirs = decode(target, Autoregressive(), prompt, settings(20)), hf_generate(target, prompt, settings(20))
    assert theirs.token_ids == ours.token_ids
    assert len(theirs.token_ids) == 5
    assert theirs.stop_reason == "context"


def test_a_prompt_that_leaves_no_room_is_refused(target):
    with pytest.raises(ConfigError, match="shorten the prompt"):
        hf_generate(target, make_prompt(target.max_positions), settings(4))
    with pytest.raises(ConfigError, match="no tokens"):
        hf_generate(target, [], settings(4))


def test_its_times_are_there(target):
    generation = hf_generate(target, PROMPT, settings(12))
    assert generation.prefill_s > 0
    assert generation.decode_s > 0
    assert generation.steps == []
    assert hf_generate(target, PROMPT, settings(1)).decode_s == 0


def test_the_models_own_generation_defaults_do_not_count():
    target = make_target()
    answer = plain(target, PROMPT, settings(20))
    defaults = target.model.generation_config
    defaults.repetition_penalty = 5.0
    defaults.eos_token_id = answer[0]
    assert hf_generate(target, PROMPT, settings(20)).token_ids == answer
    assert target.model.generation_config is defaults


def test_the_engine_goes_on_with_its_own_attention(target):
    before = plain(target, PROMPT, settings(20))
    hf_generate(target, PROMPT, settings(4))
    assert target.model.config._attn_implementation == target.attention
    assert plain(target, PROMPT, settings(20)) == before
