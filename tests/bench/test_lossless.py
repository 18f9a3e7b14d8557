"""The comparison with the baseline, on a target whose logits are written down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vsdbench.bench.lossless import FLOAT32_ULPS, compare, is_comparable, logit_tolerance, noisy_logits
from vsdbench.decoding.engine import DecodeSettings
from vsdbench.decoding.sampling import SamplingParams, coupled_token, keyed_noise, target_scores

PROMPT = [7, 8, 9]
GREEDY = DecodeSettings(max_new_tokens=8)


class Replay:
    """A target that answers every prefill with the same logits and notes the prefix."""

    def __init__(self, logits, dtype=torch.float32):
        self.logits, self.dtype, self.prefixes = torch.tensor(logits), dtype, []

    def prefill(self, tokens, max_length):
        assert max_length >= len(tokens)
        self.prefixes.append(list(tokens))
        return SimpleNamespace(next_logits=self.logits)


def coupled(seed):
    return DecodeSettings(max_new_tokens=8, rule="coupled", sampling=SamplingParams(temperature=1.0), seed=seed)


def test_equal_answers_need_no_replay():
    target = Replay([0.0])
    assert compare(target, PROMPT, [1, 2], (1, 2), GREEDY) == ("equal", None)
    assert target.prefixes == []


def test_a_near_tie_is_where_rounding_decides():
    target = Replay([0.0, 10.0, 10.0 - 1e-4, 3.0])
    verdict, divergence = compare(target, PROMPT, [3, 1, 0], [3, 2, 0], GREEDY)
    assert verdict == divergence.kind == "near_tie"
    assert divergence.gap == pytest.approx(1e-4, rel=0.05)
    assert (divergence.index, divergence.reference_token, divergence.token) == (1, 1, 2)
    assert target.prefixes == [[*PROMPT, 3]]


def test_the_same_gap_is_a_tie_in_bfloat16_only():
    logits = [0.0, 16.0, 15.75]
    assert compare(Replay(logits, torch.bfloat16), PROMPT, [1], [2], GREEDY)[0] == "near_tie"
    assert compare(Replay(logits), PROMPT, [1], [2], GREEDY)[0] == "violation"
    assert compare(Replay([0.0, 16.0, 15.0], torch.bfloat16), PROMPT, [1], [2], GREEDY)[0] == "violation"


@pytest.mark.parametrize("logits", [[0.0, 5.0, 1.0], [0.0, 1.0, 5.0]])
def test_a_gap_either_way_is_a_violation(logits):
    verdict, divergence = compare(Replay(logits), PROMPT, [1, 1], [2, 1], GREEDY)
    assert verdict == divergence.kind == "violation"
    assert divergence.gap == logits[1] - logits[2]
    assert divergence.index == 0


@pytest.mark.parametrize(("reference", "output"), [([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2]), ([1], [])])
def test_a_missed_end_is_a_violation_without_a_gap(reference, output):
    target = Replay([0.0])
    verdict, divergence = compare(target, PROMPT, reference, output, GREEDY)
    index = min(len(reference), len(output))
    assert verdict == "violation"
    assert (divergence.index, divergence.gap) == (index, None)
    assert divergence.reference_token == (reference[index] if index < len(reference) else None)
    assert divergence.token == (output[index] if index < len(output) else None)
    assert target.prefixes == []


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.3, top_p=0.7),
        SamplingParams(temperature=1, top_k=5),
    ],
)
def test_a_keyed_draw_is_the_argmax_of_the_noisy_logits(params):
    logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    for position in range(100):
        drawn = coupled_token(target_scores(logits, params), 9, position)
        assert int(noisy_logits(logits, params, 9, position).argmax()) == drawn


def test_a_keyed_draw_is_measured_by_the_distance_of_noisy_logits():
    settings = coupled(seed=5)
    noise = keyed_noise(5, len(PROMPT) + 1, 10)
    drawn = int(noise.argmax())
    for token in set(range(10)) - {drawn}:
        verdict, divergence = compare(Replay([0.0] * 10), PROMPT, [3, drawn], [3, token], settings)
        assert divergence.gap == pytest.approx(noise[drawn] - noise[token])
        assert verdict == "violation"


def test_a_draw_between_two_that_are_as_good_as_tied_is_a_near_tie():
    settings = coupled(seed=3)
    first, second = -keyed_noise(3, len(PROMPT), 2)
    logits = [first + 1e-5, second]  # the noise makes up for the rest
    assert coupled_token(target_scores(torch.tensor(logits), settings.sampling), 3, len(PROMPT)) == 0
    verdict, divergence = compare(Replay(logits), PROMPT, [0], [1], settings)
    assert verdict == "near_tie"
    assert divergence.gap == pytest.approx(1e-5, rel=0.05)


def test_a_token_that_truncation_leaves_out_is_as_far_as_it_is_from_being_let_in():
    params = SamplingParams(temperature=1.0, top_k=2)
    logits = torch.tensor([5.0, 4.0, 4.0 - 1e-5, -20.0])
    for seed in range(20):
        noisy = noisy_logits(logits, params, seed, 0)
        assert float(noisy.max() - noisy[3]) >= 24.0
        assert float(noisy.max() - noisy[2]) >= 1e-5 * 0.9
        assert int(noisy.argmax()) in {0, 1}


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
def test_rules_with_numbers_of_their_own_are_not_compared(rule):
    settings = DecodeSettings(max_new_tokens=8, rule=rule, sampling=SamplingParams(temperature=1.0))
    assert not is_comparable(settings)
    assert compare(Replay([0.0]), PROMPT, [1], [2], settings) == ("unchecked", None)


def test_tolerance_grows_with_the_logit_and_the_dtype():
    assert logit_tolerance(16.0, torch.bfloat16) == 0.5
    assert logit_tolerance(0.1, torch.bfloat16) == logit_tolerance(1.0, torch.bfloat16)
    assert logit_tolerance(32.0, torch.float16) == 2 * logit_tolerance(16.0, torch.float16)
    assert logit_tolerance(2.0, torch.float32) == pytest.approx(2 * FLOAT32_ULPS * 2**-23)
    assert logit_tolerance(2.0, torch.float64) < logit_tolerance(2.0, torch.float32)
