import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tests.decoding.enumeration import reference_probs
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vsdbench.decoding.sampling import (
    NotNumbersError,
    SamplingParams,
    Uniforms,
    coupled_token,
    greedy_token,
    inverse_cdf,
    keyed_noise,
    noisiest,
    target_probs,
)

PARAMS = [
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=1.3),
    SamplingParams(temperature=1.0, top_k=7),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.6),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, top_k=10_000, top_p=1.0),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
    ],
)
def test_params_out_of_range_are_refused_with_their_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        SamplingParams(**{field: value})


def test_temperature_zero_has_no_distribution():
    with pytest.raises(ValueError, match="argmax"):
        target_probs(torch.zeros(3), SamplingParams())


@pytest.mark.parametrize("params", PARAMS)
def test_target_probs_agree_with_transformers_and_with_plain_loops(params):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (6, 50)))
    scores = TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k is not None:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p is not None:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    probs = target_probs(logits, params)
    torch.testing.assert_close(probs, scores.softmax(-1), rtol=1e-12, atol=0)
    for row in range(6):
        np.testing.assert_allclose(probs[row].numpy(), reference_probs(logits[row].numpy(), params), rtol=1e-10)
        assert torch.equal(probs[row], target_probs(logits[row], params))  # a row alone is the row in a batch


def test_top_p_comes_after_top_k():
    # Softmax of the logs is [0.4, 0.3, 0.2, 0.1]. Top-k 2 leaves [4/7, 3/7], of which top-p 0.55 keeps the first; the
    # other order would keep both.
    probs = target_probs(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), SamplingParams(temperature=1, top_k=2, top_p=0.55))
    assert probs.tolist() == [1, 0, 0, 0]


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    assert (target_probs(logits, SamplingParams(temperature=1, top_p=0.69)) > 0).tolist() == [True, True, False, False]
    assert (target_probs(logits, SamplingParams(temperature=1, top_p=0.71)) > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probs_are_never_narrower_than_float32(dtype):
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    probs = target_probs(logits, SamplingParams(temperature=0.7, top_p=0.95))
    assert probs.dtype == torch.float32
    assert torch.equal(probs, target_probs(logits.float(), SamplingParams(temperature=0.7, top_p=0.95)))


def given_bits(bits):
    """Numbers that begin with these bits, whatever the generator says."""
    uniforms = Uniforms(0, 0, len(bits))
    uniforms.high = np.array(bits, dtype=np.uint32)
    return uniforms


def test_keyed_noise_is_gumbel_noise_along_and_across_seeds():
    table = np.array([[keyed_noise(seed, position, 1)[0] for position in range(100)] for seed in range(100)])
    assert np.unique(table).size == table.size
    assert stats.kstest(table.ravel(), "gumbel_r").pvalue > 1e-3
    assert stats.kstest(keyed_noise(0, 0, 50_000), "gumbel_r").pvalue > 1e-3
    uniform = np.exp(-np.exp(-table))
    for pairs in (uniform[:, 1:] - uniform[:, :-1], uniform[1:] - uniform[:-1], uniform[1:, :-1] - uniform[:-1, 1:]):
        counts = np.histogram(pairs % 1.0, bins=20, range=(0, 1))[0]  # a difference of independent uniforms, mod 1
        assert stats.chisquare(counts).pvalue > 1e-3


def test_keyed_noise_depends_on_the_key_alone():
    assert keyed_noise(7, 3, 5).tolist() == keyed_noise(7, 3, 9)[:5].tolist()
    assert keyed_noise(2**64 + 7, 3, 5).tolist() == keyed_noise(7, 3, 5).tolist()
    assert keyed_noise(-1, 3, 5).tolist() == keyed_noise(2**64 - 1, 3, 5).tolist()
    assert keyed_noise(1, 0, 5).tolist() != keyed_noise(0, 1, 5).tolist()
    assert np.corrcoef([keyed_noise(0, position, 4000) for position in range(5)])[0, 1:].max() < 0.06


def test_numbers_are_those_of_their_bits_and_noise_is_finite():
    uniforms = given_bits([0, 1, 2**31, 2**32 - 1])
    numbers, noise = uniforms.at(), uniforms.noise()
    assert (np.floor(numbers * 2.0**32) == uniforms.high).all()
    assert 0 < numbers.min() < numbers.max() < 1
    assert np.isfinite(noise).all()
    assert noise.tolist() == sorted(noise.tolist(), reverse=True)
    assert uniforms.at(np.array([3, 1])).tolist() == numbers[[3, 1]].tolist()
    assert np.isfinite(uniforms.rough_noise(np.arange(4))).all()
    np.testing.assert_allclose(Uniforms(1, 2, 999).rough_noise(np.arange(999)), keyed_noise(1, 2, 999), atol=1e-3)


def test_bits_behind_the_first_are_uniform_and_of_their_own():
    uniforms = Uniforms(3, 4, 50_000)
    low = np.mod(uniforms.at() * 2.0**32, 1.0)
    assert stats.kstest(low, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(low, uniforms.high)[0, 1]) < 0.02
    assert abs(np.corrcoef(low, np.mod(Uniforms(3, 5, 50_000).at() * 2.0**32, 1.0))[0, 1]) < 0.02
    assert abs(np.corrcoef(low[1:], low[:-1])[0, 1]) < 0.02


def test_coupled_draws_neither_read_nor_change_global_generators():
    torch.manual_seed(1)
    before, python_before, first = torch.get_rng_state(), random.getstate(), coupled_token(torch.zeros(9), 5, 6)
    assert torch.equal(before, torch.get_rng_state())
    assert python_before == random.getstate()
    torch.manual_seed(2)
    assert coupled_token(torch.zeros(9), 5, 6) == first


def test_coupled_token_follows_the_distribution_over_positions():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    counts = np.bincount([coupled_token(probs.log(), 11, position) for position in range(4000)], minlength=5)
    assert counts[1] == 0
    assert stats.chisquare(counts[[0, 2, 3, 4]], 4000 * probs[[0, 2, 3, 4]].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 40.0])
def test_a_coupled_draw_is_a_race_of_exponential_times(dtype, spread):
    """Only a few of the times are computed, which must not change who is first."""
    generator = torch.Generator().manual_seed(0)
    for position in range(50):
        logits = spread * torch.randn(1000, generator=generator, dtype=dtype)
        logits[position::7] = -math.inf
        times = np.exp(-keyed_noise(3, position, 1000)) / logits.double().softmax(0).clamp_min(1e-300).numpy()
        assert coupled_token(logits, 3, position) == int(times.argmin())


@pytest.mark.parametrize(
    ("bits", "winner"),
    [
        ([2**31] * 4, 0),
        ([2**31, 0, 2**31, 2**31], 1),
        ([2**32 - 1, 0, 2**31, 2**31], 1),
        ([2**32 - 1, 2**31, 2**31, 2**31], 0),
        ([0, 0, 2**31, 0], 0),
    ],
)
def test_the_winner_of_a_coupled_draw_is_found_whatever_its_number(bits, winner):
    scores, uniforms = torch.tensor([0.0, -21.0, -30.0, -200.0]), given_bits(bits)
    assert noisiest(scores, uniforms) == winner == int((scores.numpy() + uniforms.noise()).argmax())


def test_a_coupled_draw_does_not_move_with_the_rounding_of_other_probabilities():
    """Drawing by the running sum fails this: traces of rounding before a rare token shift its interval."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.cat([torch.full((2,), 0.4), torch.full((50_000,), 0.2 / 50_000)]).double()
    nudged = probs * (1 + 1e-7 * torch.randn(len(probs), generator=generator, dtype=torch.float64))
    drawn = [[coupled_token(these.log(), 1, i) for i in range(300)] for these in (probs, nudged)]
    assert drawn[0] == drawn[1]
    uniforms = np.linspace(0.801, 0.999, 300)
    assert [inverse_cdf(probs, u) for u in uniforms] != [inverse_cdf(nudged, u) for u in uniforms]


@pytest.mark.parametrize("scores", [[-math.inf, -math.inf], [math.nan, 1.0], [math.inf, 1.0]])
def test_a_coupled_draw_refuses_what_are_no_numbers(scores):
    with pytest.raises(NotNumbersError, match="The largest logit of a next token is"):
        coupled_token(torch.tensor(scores), 0, 0)


def test_inverse_cdf_at_the_edges():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    almost_one = math.nextafter(1.0, 0.0)
    assert inverse_cdf(probs, 0.0) == 1
    assert inverse_cdf(probs, math.nextafter(0.25, 0)) == 1
    assert inverse_cdf(probs, 0.25) == 3
    assert inverse_cdf(probs, almost_one) == 4
    assert inverse_cdf(probs * 1e-200, almost_one) == 4
    assert inverse_cdf(probs * 7, 0.25) == 3
    assert inverse_cdf(torch.tensor([0.0, 5e-324, 0.0], dtype=torch.float64), almost_one) == 1


@pytest.mark.parametrize("probs", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_inverse_cdf_refuses_what_is_no_distribution(probs):
    with pytest.raises(NotNumbersError, match="sum to"):
        inverse_cdf(torch.tensor(probs), 0.5)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 1 / 3, 1.0, 7.0]), min_size=1, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_inverse_cdf_is_the_plain_loop_and_never_a_zero(weights, uniform):
    if not any(weights):
        weights = [*weights, 1.0]
    token = inverse_cdf(torch.tensor(weights, dtype=torch.float64), uniform)
    assert weights[token] > 0
    cumulative, passed = np.cumsum(weights), []
    for candidate, value in enumerate(cumulative):
        if value > uniform * cumulative[-1]:
            passed.append(candidate)
    assert token == (passed[0] if passed else int(np.argmax(cumulative == cumulative[-1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_greedy_token_is_the_first_of_the_largest(dtype):
    for seed in range(20):
        logits = torch.randint(0, 40, (5000,), generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert greedy_token(logits) == int((logits == logits.max()).nonzero()[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_greedy_choice_among_what_are_no_numbers_is_refused(value):
    with pytest.raises(NotNumbersError, match=f"is {value}: the target's logits are not numbers"):
        greedy_token(torch.tensor([1.0, value, 0.0]))
