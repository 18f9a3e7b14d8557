"""Several sequences at a time: every answer is the one that it is alone, whatever is beside it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tests.decoding.tiny import SHAPES, AdversarialDrafter, make_prompt, make_target, plain, settings, tree_of

from vsdbench.decoding import engine
from vsdbench.decoding.engine import Autoregressive, decode, decode_together
from vsdbench.errors import ConfigError
from vsdbench.models.together import Together

PROMPTS = [make_prompt(length, seed) for seed, length in enumerate((11, 1, 19, 5))]
LENGTHS = (12, 5, 8, 15)
TARGETS = [  # fused layers, and the model's own: rotary and learnt positions, sliding windows in some layers
    ("llama", torch.float32),
    ("qwen2-window", torch.float32),
    ("gemma3", torch.float64),
    ("gpt2", torch.float64),
]


@pytest.fixture(scope="module", params=TARGETS, ids=lambda param: param[0])
def target(request):
    family, dtype = request.param
    return make_target(family, dtype=dtype)


@pytest.fixture(scope="module")
def llama():
    return make_target(dtype=torch.float32)


@pytest.fixture(scope="module", params=[0.0, 1.0])
def answers(request, target):
    """Settings of each prompt, and what plain decoding answers; two end early, at a token of their own."""
    chosen, found = [], []
    for seed, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        own = settings(length, temperature=request.param, seed=seed)
        answer = plain(target, prompt, own)
        if seed % 2:
            end = answer[len(answer) // 2]
            own, answer = replace(own, eos_ids=frozenset({end})), answer[: answer.index(end) + 1]
        chosen.append(own)
        found.append(answer)
    return chosen, found


@pytest.mark.parametrize("size", [2, 3])
def test_random_trees_do_not_change_any_answer(target, answers, size):
    chosen, expected = answers
    drafters = [Knowing(zip(PROMPTS, expected, strict=True), seed) for seed in range(size)]
    generations = decode_together(target, drafters, PROMPTS, chosen)
    assert [generation.token_ids for generation in generations] == expected
    assert sum(drafter.num_kept for drafter in drafters) > 3, "nothing was accepted, so nothing was tested"
    assert [generation.stop_reason for generation in generations] == ["length", "eos"] * 2
    assert max(step.num_sequences for generation in generations for step in generation.steps) == size


class Knowing:
    """Adversarial drafters of several prompts, whichever comes."""

    name = "knowing"

    def __init__(self, pairs, seed):
        self._answers = {tuple(prompt): answer for prompt, answer in pairs}
        self._seed, self.num_kept = seed, 0

    def begin(self, state, max_length):
        prompt = tuple(state.prompt)
        self._drafter = AdversarialDrafter(self._answers[prompt], len(prompt), self._seed)
        self._drafter.begin(state, max_length)
        self.propose = self._drafter.propose

    def commit(self, state, num_accepted, features):
        self._drafter.commit(state, num_accepted, features)
        self.num_kept += num_accepted


def test_logits_and_features_are_those_of_each_tree_alone(target):
    trees = [tree_of([5, 6, 7, 8], [-1, 0, 0, -1]), tree_of([], []), tree_of([9, 3], [-1, 0])]
    together = Together(target, 3, 64)
    states = [together.prefill(prompt) for prompt in PROMPTS[:3]]
    for state in states:
        state.tokens.append(4)
    for path, tokens in (([0, 2], [5, 7, 12]), ([], [3])):
        outputs = together.forward_trees(states, trees)
        for state, tree, output in zip(states, trees, outputs, strict=True):
            alone = target.prefill(state.tokens[:-1], 64)
            alone.tokens = list(state.tokens)
            expected = target.forward_tree(alone, tree)
            rtol = 1e-4 if target.dtype is torch.float32 else 1e-9
            torch.testing.assert_close(output.logits, expected.logits, rtol=rtol, atol=rtol)
            torch.testing.assert_close(output.features, expected.features, rtol=rtol, atol=rtol)
        states[0].commit(path, tokens)


def test_a_sequence_that_leaves_makes_room(llama):
    together = Together(llama, 3, 64)
    states = [together.prefill(prompt) for prompt in PROMPTS[:3]]
    together.leave(states.pop(0))
    for state in states:
        state.tokens.append(4)
    before = [state.cache.length for state in states]
    together.forward_trees(states, [tree_of([], [])] * 2)
    assert [state.cache.length for state in states] == before
    assert sorted(state.cache.slot for state in states) == [0, 1]
    states.append(together.prefill(PROMPTS[3]))
    assert sorted(state.cache.slot for state in states) == [0, 1, 2]


def test_times_are_of_the_whole_step_and_add_up(llama):
    chosen = [settings(length) for length in LENGTHS]
    generations = decode_together(llama, [Autoregressive()] * 3, PROMPTS, chosen)
    for generation in generations:
        parts = [step.draft_ms + step.verify_ms + step.other_ms for step in generation.steps]
        assert sum(parts) == pytest.approx(1e3 * generation.decode_s, rel=1e-6)
        assert all(step.num_nodes == 0 and step.num_emitted == 1 for step in generation.steps)


def test_finishing_an_answer_is_in_no_step_of_the_others(llama, monkeypatch):
    finish = engine._Sequence.generation

    def slowly(sequence):
        time.sleep(0.5)
        return finish(sequence)

    monkeypatch.setattr(engine._Sequence, "generation", slowly)
    chosen = [settings(length) for length in (3, 9)]
    generations = decode_together(llama, [Autoregressive()] * 2, PROMPTS[:2], chosen)
    assert [step.num_sequences for step in generations[1].steps] == [2] * 2 + [1] * 6
    assert generations[1].decode_s < 0.5


def test_an_attention_of_its_own_is_refused_and_served_alone():
    target = make_target("gemma2")
    assert decode(target, Autoregressive(), PROMPTS[0], settings(4)).token_ids
    with pytest.raises(ConfigError, match="batch size 1"):
        decode_together(target, [Autoregressive()] * 2, PROMPTS[:2], [settings(4)] * 2)


def test_a_wrong_slot_would_be_noticed(llama):
    """The negative control: with the keys of another sequence the answer is another."""
    target = llama
    chosen = [settings(12, shape=SHAPES[0])] * 2

    class Swapping(Autoregressive):
        def commit(self, state, num_accepted, features):
            buffers = target.pool.buffers.values()
            for buffer in buffers:
                buffer[:, :2] = buffer[:, :2].flip(1)

    prompts = [PROMPTS[0], PROMPTS[2]]
    expected = [plain(target, prompt, own) for prompt, own in zip(prompts, chosen, strict=True)]
    spoilt = decode_together(target, [Swapping(), Autoregressive()], prompts, chosen)
    assert [generation.token_ids for generation in spoilt] != expected
