"""The decode loop: the answer is plain decoding's whatever is proposed, and its counts, ends and times are right."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import (
    SHAPES,
    AdversarialDrafter,
    KnowingDrafter,
    make_prompt,
    make_target,
    plain,
    settings,
    tree_of,
)

from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode, decode_together
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError

CHAIN = SHAPES[0]  # four draft tokens
PROMPT = make_prompt(11)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def any_target(request):
    return make_target(request.param)


class Recorder:
    """Passes everything on and remembers the trees."""

    def __init__(self, drafter):
        self.drafter, self.name, self.trees = drafter, drafter.name, []
        self.begin, self.commit = drafter.begin, drafter.commit

    def propose(self, state, shape, *, temperature, generator):
        tree = self.drafter.propose(state, shape, temperature=temperature, generator=generator)
        self.trees.append((tree.tokens.tolist(), list(tree.parents)))
        return tree


def check_counts(generation, shape):
    assert sum(step.num_emitted for step in generation.steps) == len(generation.token_ids) - 1
    for step in generation.steps:
        assert 0 <= step.num_accepted <= min(step.depth, step.num_emitted)
        assert 1 <= step.num_emitted <= step.num_accepted + 1
        assert step.num_nodes <= shape.budget
    assert all(step.num_emitted == step.num_accepted + 1 for step in generation.steps[:-1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_random_trees_do_not_change_the_answer(any_target, temperature, seed):
    prompt = make_prompt(5 + seed, seed)
    chosen = settings(28, temperature=temperature, seed=seed)
    expected = plain(any_target, prompt, chosen)
    drafter = AdversarialDrafter(expected, len(prompt), seed)
    generation = decode(any_target, drafter, prompt, chosen)
    assert generation.token_ids == expected
    assert drafter.num_accepted > 0, "nothing was accepted, so nothing was tested"
    check_counts(generation, chosen.shape)


def test_truncated_sampling_is_coupled_too(target):
    chosen = settings(28, temperature=0.7, seed=3, top_k=9, top_p=0.8)
    expected = plain(target, PROMPT, chosen)
    generation = decode(target, AdversarialDrafter(expected, len(PROMPT), 0), PROMPT, chosen)
    assert generation.token_ids == expected
    assert expected != plain(target, PROMPT, settings(28, temperature=0.7, seed=4, top_k=9, top_p=0.8))


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
@pytest.mark.parametrize("seed", range(3))
def test_the_other_rules_run_and_repeat(target, rule, seed):
    chosen = settings(20, temperature=1.0, rule=rule, seed=seed)
    answers = [
        decode(target, AdversarialDrafter(plain(target, PROMPT, settings(20)), len(PROMPT), 1), PROMPT, chosen)
        for _ in range(2)
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].token_ids) == 20
    check_counts(answers[0], chosen.shape)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_oracle_gives_depth_plus_one_tokens_a_step(any_target, temperature):
    chosen = settings(1 + 4 * 5, temperature=temperature, shape=CHAIN)
    expected = plain(any_target, PROMPT, chosen)
    generation = decode(any_target, KnowingDrafter(expected, len(PROMPT)), PROMPT, chosen)
    assert generation.token_ids == expected
    assert [step.num_emitted for step in generation.steps] == [5] * 4
    assert [step.num_accepted for step in generation.steps] == [4] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_always_wrong_gives_one(target, temperature):
    chosen = settings(16, temperature=temperature, shape=CHAIN)
    expected = plain(target, PROMPT, chosen)
    generation = decode(target, KnowingDrafter(expected, len(PROMPT), offset=1), PROMPT, chosen)
    assert generation.token_ids == expected
    assert [(step.num_emitted, step.num_accepted) for step in generation.steps] == [(1, 0)] * 15


# --- ends -----------------------------------------------------------------------------------------------------------


def first_seen(tokens):
    """Indices of tokens that do not occur before."""
    return [index for index, token in enumerate(tokens) if token not in tokens[:index]]


def test_an_end_token_inside_an_accepted_path_cuts_it(target):
    answer = plain(target, PROMPT, settings(20))
    index = next(index for index in first_seen(answer) if index in {1, 2, 3})  # of the first step's four draft tokens
    chosen = settings(20, shape=CHAIN, eos_ids=[answer[index]])
    generation = decode(target, KnowingDrafter(answer, len(PROMPT)), PROMPT, chosen)
    assert generation.token_ids == answer[: index + 1] == plain(target, PROMPT, chosen)
    assert generation.stop_reason == "eos"
    assert [(step.num_accepted, step.num_emitted) for step in generation.steps] == [(index, index)]


def test_an_end_token_as_the_bonus_token(target):
    answer = plain(target, PROMPT, settings(20))
    index = next(index for index in first_seen(answer) if index >= 2)
    shape = TreeShape(kind="chain", budget=index - 1, depth=index - 1, top_k=1)
    chosen = settings(20, shape=shape, eos_ids=[answer[index]])
    generation = decode(target, KnowingDrafter(answer, len(PROMPT)), PROMPT, chosen)
    assert generation.token_ids == answer[: index + 1]
    assert [(step.num_accepted, step.num_emitted) for step in generation.steps] == [(index - 1, index)]


@pytest.mark.parametrize("room", [2, 3, 5])
def test_the_length_limit_inside_an_accepted_path_cuts_it(target, room):
    answer = plain(target, PROMPT, settings(20))
    generation = decode(target, KnowingDrafter(answer, len(PROMPT)), PROMPT, settings(room, shape=CHAIN))
    assert generation.token_ids == answer[:room]
    assert generation.stop_reason == "length"
    assert [(step.num_accepted, step.num_emitted) for step in generation.steps] == [(room - 1, room - 1)]


def test_an_answer_may_end_with_its_first_token(target):
    first = plain(target, PROMPT, settings(1))
    assert len(first) == 1
    generation = decode(target, KnowingDrafter(first, len(PROMPT)), PROMPT, settings(9, eos_ids=first))
    assert (generation.token_ids, generation.stop_reason, generation.steps) == (first, "eos", [])
    assert decode(target, Autoregressive(), PROMPT, settings(1)).stop_reason == "length"


def test_end_tokens_are_the_targets_unless_said_otherwise():
    target = make_target()
    answer = plain(target, PROMPT, settings(12))
    index = first_seen(answer)[1]
    target.eos_ids = frozenset({answer[index]})
    assert plain(target, PROMPT, DecodeSettings(max_new_tokens=12)) == answer[: index + 1]
    assert plain(target, PROMPT, settings(12)) == answer


@pytest.mark.parametrize("shape", SHAPES)
def test_the_context_is_filled_and_not_exceeded(target, shape):
    prompt = make_prompt(target.max_positions - 7)
    chosen = settings(24, shape=shape)
    expected = decode(target, Autoregressive(), prompt, chosen)
    drafted = decode(target, AdversarialDrafter(expected.token_ids, len(prompt), 2), prompt, chosen)
    assert drafted.token_ids == expected.token_ids
    assert len(expected.token_ids) == 7
    assert expected.stop_reason == drafted.stop_reason == "context"


def test_guesses_past_the_end_need_no_positions():
    target = make_target("gpt2")  # a table of positions, no longer than the context
    prompt = make_prompt(target.max_positions - 4)
    chosen = settings(24)
    expected = plain(target, prompt, chosen)
    for seed in range(3):
        drafter = AdversarialDrafter(expected, len(prompt), seed)
        assert decode(target, drafter, prompt, chosen).token_ids == expected
    drafters = [AdversarialDrafter(expected, len(prompt), seed) for seed in range(2)]
    both = decode_together(target, drafters, [prompt] * 2, [chosen] * 2)
    assert [answer.token_ids for answer in both] == [expected] * 2


@pytest.mark.parametrize("extra", [0, 5])
def test_a_prompt_as_long_as_the_context_is_refused(target, extra):
    with pytest.raises(ConfigError, match="shorten the prompt"):
        decode(target, Autoregressive(), make_prompt(target.max_positions + extra), settings(4))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 2])
def test_logits_that_are_not_numbers_are_one_sentence(temperature, at):
    target = make_target()
    answer = plain(target, PROMPT, settings(20, temperature=temperature))
    spoilt = [token for index, token in enumerate(answer) if token not in [*PROMPT, *answer[:index]]][at - 1]
    target.embed_tokens.weight[spoilt if at else PROMPT[0]] = torch.nan
    with pytest.raises(ConfigError, match="nan: the target's logits are not numbers, use --dtype bf16 or fp32"):
        plain(target, PROMPT, settings(20, temperature=temperature))


def test_an_empty_prompt_is_refused(target):
    with pytest.raises(ConfigError, match="no tokens"):
        decode(target, Autoregressive(), [], settings(4))


# --- times and state ------------------------------------------------------------------------------------------------


def test_times_add_up(target):
    answer = plain(target, PROMPT, settings(20))
    generation = decode(target, AdversarialDrafter(answer, len(PROMPT), 0), PROMPT, settings(20))
    assert generation.prefill_s > 0
    parts = [(step.draft_ms, step.verify_ms, step.other_ms) for step in generation.steps]
    assert all(time >= 0 for step in parts for time in step)
    assert all(step[1] > 0 for step in parts)
    assert sum(map(sum, parts)) == pytest.approx(1e3 * generation.decode_s, rel=1e-6)


def test_autoregressive_decoding_is_the_loop_without_nodes(target):
    generation = decode(target, Autoregressive(), PROMPT, settings(12))
    assert [(step.num_nodes, step.depth, step.num_accepted, step.num_emitted) for step in generation.steps] == [
        (0, 0, 0, 1)
    ] * 11


def test_a_shorter_sequence_after_a_longer_one_is_decoded_as_if_it_were_the_first():
    used, fresh = make_target(), make_target()
    plain(used, make_prompt(60, 3), settings(40))
    answer = plain(fresh, PROMPT, settings(20))
    drafter = Recorder(AdversarialDrafter(answer, len(PROMPT), 0))
    assert decode(used, drafter, PROMPT, settings(20)).token_ids == answer
    again = Recorder(AdversarialDrafter(answer, len(PROMPT), 0))
    assert decode(fresh, again, PROMPT, settings(20)).token_ids == answer
    assert drafter.trees == again.trees


def test_a_wrong_cache_would_be_noticed(target):
    """The negative control: one spoilt key an accepted token changes the answer."""

    class Spoiling(KnowingDrafter):
        """Proposes two siblings, the second of them right, and then spoils its key."""

        def propose(self, state, shape, *, temperature, generator):
            right = self._answer[len(state.tokens) - self._prompt_length]
            return tree_of([(right + 1) % self._vocab, right], [-1, -1])

        def commit(self, state, num_accepted, features):
            for layer in state.cache.layers:
                layer.keys[:, :, state.cache.length - 1] *= -1

    chosen = settings(30, shape=CHAIN)
    answer = [*plain(target, PROMPT, settings(30)), 0]
    assert decode(target, Spoiling(answer, len(PROMPT)), PROMPT, chosen).token_ids != answer[:-1]


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_trees_do_not_change_the_answer_on_a_gpu(family, temperature):
    target = make_target(family, device="cuda", dtype=torch.float32)
    for seed in range(4):
        chosen = settings(28, temperature=temperature, seed=seed)
        expected = plain(target, PROMPT, chosen)
        drafter = AdversarialDrafter(expected, len(PROMPT), seed)
        assert decode(target, drafter, PROMPT, chosen).token_ids == expected
        assert drafter.num_accepted > 0
