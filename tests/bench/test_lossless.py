"""The comparison with the baseline, on a target whose logits are written down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vsdbench.bench.lossless import FLOAT32_ULPS, compare, is_comparable, logit_tolerance
from vsdbench.decoding.engine import DecodeSettings
from vsdbench.decoding.sampling import SamplingParams, inverse_cdf, keyed_uniform, target_probs

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


def test_a_keyed_draw_is_measured_by_its_distance_from_the_interval():
    settings = coupled(seed=5)
    target = Replay([0.0] * 10)
    uniform = keyed_uniform(5, len(PROMPT) + 1)
    drawn = int(uniform * 10)
    for token in range(10):
        if token == drawn:
            continue
        verdict, divergence = compare(target, PROMPT, [3, drawn], [3, token], settings)
        expected = token / 10 - uniform if token > drawn else uniform - (token + 1) / 10
        assert divergence.gap == pytest.approx(expected, abs=1e-6)
        assert verdict == "violation"


def test_a_draw_beside_the_edge_of_an_interval_is_a_near_tie():
    settings = coupled(seed=3)
    uniform = keyed_uniform(3, len(PROMPT))
    edge = uniform + 2e-5  # token 0 is drawn, but token 1 begins just behind
    logits = torch.tensor([edge, 1 - edge], dtype=torch.float64).log()
    assert inverse_cdf(target_probs(logits, settings.sampling), uniform) == 0
    verdict, divergence = compare(Replay(logits.tolist()), PROMPT, [0], [1], settings)
    assert verdict == "near_tie"
    assert divergence.gap == pytest.approx(2e-5, rel=0.02)


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
