"""Differences between arms: intervals over seeds and prompts cover what they claim, p-values agree with them."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from vsdbench.bench import metrics, paired, stats
from vsdbench.store.frames import to_frames


def experiment(rng, num_seeds, num_prompts, spread, *, centre=0.0):
    """Log-ratios of crossed levels: a part of the seed, a skewed part of the prompt, a rest; the mean is ``centre``."""
    of_seed, of_prompt, rest = spread
    skewed = (rng.gamma(4, size=(1, num_prompts)) - 4) / 2  # mean 0, deviation 1, skewness 1
    values = centre + of_seed * rng.normal(size=(num_seeds, 1)) + of_prompt * skewed
    values = values + rest * rng.normal(size=(num_seeds, num_prompts))
    return [pd.Series(row, index=[f"p{i:03}" for i in range(num_prompts)]) for row in values]


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize(
    "spread",
    [
        pytest.param((0.0, 0.10, 0.10), id="seeds-alike"),
        pytest.param((0.02, 0.10, 0.10), id="seeds-as-prompts"),
        pytest.param((0.10, 0.10, 0.10), id="seeds-dominate"),
        pytest.param((0.0, 0.02, 0.10), id="all-is-rest"),
    ],
)
def test_interval_covers_whichever_level_is_the_larger(num_seeds, spread):
    """At a nominal 95 %; the truth is a change of +5 %, for new seeds on new prompts."""
    hits = 0
    for number in range(300):
        values = experiment(np.random.default_rng(number), num_seeds, 40, spread, centre=math.log(1.05))
        low, high = paired.mean_difference(values, seed=number, num_resamples=400).ci_pct
        hits += low <= 5.0 <= high
    assert 0.92 <= hits / 300 <= 0.98


@pytest.mark.parametrize("num_prompts", [3, 10])
def test_few_prompts_do_not_make_sure(num_prompts):
    """Of three prompts one arm wins all in a quarter of the experiments, where resampling alone would be certain."""
    found = [
        paired.mean_difference(
            experiment(np.random.default_rng(number), 1, num_prompts, (0, 0.1, 0.1)), seed=number, num_resamples=200
        )
        for number in range(200)
    ]
    assert 0.90 <= np.mean([low <= 0 <= high for low, high in (got.ci_pct for got in found)]) <= 0.98
    assert np.mean([got.p_value < 0.01 for got in found]) < 0.04


def test_resampling_seeds_would_not_cover():
    """The reason for Student's t between seeds: percentiles over three resampled seeds and 40 prompts are too sure."""
    hits = 0
    for number in range(200):
        rng = np.random.default_rng(number)
        values = np.stack(experiment(rng, 3, 40, (0.10, 0.10, 0.10)))
        seeds, prompts = rng.integers(3, size=(400, 3)), rng.integers(40, size=(400, 40))
        means = values[seeds[:, :, None], prompts[:, None, :]].mean(axis=(1, 2))
        low, high = np.quantile(means, [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 200 < 0.88


def counted(rng, log_tau, *, num_steps=12):
    """Frames of a drafter with about ``exp(log_tau[p])`` tokens a step on prompt p."""
    prompts = np.arange(len(log_tau))
    emitted = 1 + rng.binomial(5, np.minimum((np.exp(log_tau) - 1) / 5, 1)[:, None], size=(len(prompts), num_steps))
    records = pd.DataFrame({"unit": [f"p{i:03}" for i in prompts], "turn": 0})
    return records, pd.DataFrame({"record": np.repeat(prompts, num_steps), "num_emitted": emitted.ravel()})


def test_tau_interval_covers_counts_as_they_are_drawn():
    """The truth is no change: both arms draw their seeds' strengths from one distribution."""
    hits = 0
    for number in range(200):
        rng = np.random.default_rng(number)
        prompts = math.log(2.2) + 0.15 * rng.normal(size=40)
        arms = [[counted(rng, prompts + 0.03 * rng.normal()) for _ in range(3)] for _ in range(2)]
        low, high = paired.tau_difference(*arms, seed=number, num_resamples=400).ci_pct
        hits += low <= 0 <= high
    assert 0.91 <= hits / 200 <= 0.985


def timed(make_record, seconds, **fields):
    """Frames with ``seconds[p]`` for the ten decoded tokens of prompt p."""
    return to_frames(
        [make_record(num_output_tokens=11, decode_s=s, prompt_id=f"p{i}", **fields) for i, s in enumerate(seconds)]
    )


def assert_interval(got, value, ends):
    """A difference is ``value`` as a ratio, its interval about ``ends``."""
    assert got.change_pct == pytest.approx(100 * (value - 1))
    width = math.log(ends[1] / ends[0])
    assert np.log1p(np.array(got.ci_pct) / 100) == pytest.approx(np.log(ends), abs=width / 25)


def test_one_seed_gives_the_bca_interval_over_prompts(make_record):
    rng = np.random.default_rng(0)
    ours, theirs = (timed(make_record, rng.gamma(4, size=25)) for _ in range(2))
    got = paired.speedup_difference([ours], [theirs])
    expected = stats.speedup(stats.log_ratios(ours[0], theirs[0]), seed=0)
    assert_interval(got, expected.value, expected.ci)
    assert (got.num_prompts, got.num_seeds) == (25, 1)


def test_one_seed_of_tau_gives_the_ratio_of_pooled_sums():
    rng = np.random.default_rng(1)
    ours, theirs = (counted(rng, centre + 0.2 * rng.normal(size=20)) for centre in (1.0, 0.8))
    got = paired.tau_difference([ours], [theirs])
    sums = [metrics.emitted_and_steps(*side).to_numpy(np.float64).T for side in (ours, theirs)]

    def ratio(*parts, axis=-1):
        emitted, steps, other_emitted, other_steps = (part.sum(axis=axis) for part in parts)
        return (emitted / steps) / (other_emitted / other_steps)

    samples = [*sums[0], *sums[1]]
    bootstrap = scipy_stats.bootstrap(samples, ratio, paired=True, rng=np.random.default_rng(0))
    value, (low, high) = np.log(ratio(*samples)), np.log(bootstrap.confidence_interval)
    wider = scipy_stats.t.ppf(0.975, 19) / scipy_stats.norm.ppf(0.975) * math.sqrt(20 / 19)
    assert_interval(got, np.exp(value), np.exp([value - wider * (value - low), value + wider * (high - value)]))


def test_seeds_are_pooled_by_hand(make_record):
    """Ours: 8 tokens in 3 steps and 4 in 2; theirs: 3 in 3 and 2 in 2."""

    def one(*emitted):
        return to_frames([make_record(steps=[(7, 5, n - 1, n, 1.0, 1.0, 0.0) for n in emitted])])

    got = paired.tau_difference([one(4, 3, 1), one(3, 1)], [one(1, 1, 1), one(1, 1)])
    assert got.change_pct == pytest.approx(100 * (12 / 5 - 1))
    assert (got.ci_pct, got.p_value, got.num_prompts, got.num_seeds) == (None, None, 1, 2)


def test_spread_between_seeds_widens_the_interval_by_students_t():
    """No spread between prompts: what remains is the t interval over three seeds."""
    by_seed = np.array([0.02, 0.05, 0.11])
    values = [pd.Series(np.full(10, value), index=range(10)) for value in by_seed]
    half = 4.302652729911275 * by_seed.std(ddof=1) / math.sqrt(3)  # t quantile, 2 degrees of freedom
    got = paired.mean_difference(values)
    assert got.ci_pct == pytest.approx((100 * math.expm1(0.06 - half), 100 * math.expm1(0.06 + half)))
    t = 0.06 / (by_seed.std(ddof=1) / math.sqrt(3))
    assert got.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)  # Student's t of 2 degrees, two-sided


@given(
    centre=st.floats(-0.2, 0.2),
    spread=st.tuples(*[st.floats(0.01, 0.2)] * 3),
    num_seeds=st.integers(1, 4),
    num_prompts=st.integers(2, 12),
    number=st.integers(0, 1000),
)
def test_p_value_and_interval_agree(centre, spread, num_seeds, num_prompts, number):
    values = experiment(np.random.default_rng(number), num_seeds, num_prompts, spread, centre=centre)
    got = paired.mean_difference(values, num_resamples=200)
    low, high = got.ci_pct
    assert low <= got.change_pct <= high
    if abs(got.p_value - 0.05) > 1e-6:
        assert (got.p_value < 0.05) == (not low <= 0 <= high)
    assert 2 / 201 <= got.p_value <= 1
    swapped = paired.mean_difference([-series for series in values], num_resamples=200)
    assert swapped.p_value == pytest.approx(got.p_value, abs=1e-6)


def test_p_value_is_found_as_often_as_it_says():
    """Where nothing changed, p is below 0.2 in a fifth of the experiments."""
    found = sum(
        paired.mean_difference(
            experiment(np.random.default_rng(number), 3, 40, (0.02, 0.10, 0.10)), seed=number, num_resamples=400
        ).p_value < 0.2
        for number in range(400)
    )  # fmt: skip
    assert 0.12 <= found / 400 <= 0.26


def test_a_control_of_one_member_meets_every_seed(make_record):
    rng = np.random.default_rng(2)
    seeds = [timed(make_record, rng.gamma(50, size=12)) for _ in range(3)]
    control = timed(make_record, rng.gamma(50, size=12))
    for function in (paired.speedup_difference, paired.tau_difference):
        there = function(seeds, [control])
        assert there == function(seeds, [control] * 3)
        assert there.num_seeds == 3
        assert function([control], seeds).num_seeds == 3
    with pytest.raises(ValueError, match="3 members cannot be paired with 2"):
        paired.tau_difference(seeds, seeds[:2])
    with pytest.raises(ValueError, match="0 members"):
        paired.tau_difference([], seeds)


def test_only_prompts_and_turns_of_all_count(make_record):
    """A slow second turn that one arm never reached, and a prompt that one seed lacks, leave no trace."""
    both = [1.0, 2.0, 4.0]
    ours, theirs = timed(make_record, both), timed(make_record, [2 * s for s in both])
    late = [make_record(num_output_tokens=11, decode_s=500.0, prompt_id="p0", turn=1)]
    rows = [make_record(num_output_tokens=11, decode_s=s, prompt_id=f"p{i}") for i, s in enumerate(both)]
    step = (7, 5, 4, 5, 1.0, 1.0, 0.0)
    longer = to_frames([*rows, *late])
    got = paired.speedup_difference([longer, ours], [theirs, theirs])
    assert got.change_pct == pytest.approx(100)
    assert got.num_prompts == 3
    few = to_frames([make_record(steps=[step], prompt_id="a"), make_record(steps=[step] * 9, prompt_id="a", turn=1)])
    other = to_frames([make_record(steps=[(7, 5, 0, 1, 1.0, 1.0, 0.0)], prompt_id=p) for p in "ab"])
    got = paired.tau_difference([few], [other])
    assert (got.change_pct, got.num_prompts) == (pytest.approx(400), 1)
    nothing = paired.tau_difference([few], [to_frames([make_record(steps=[step], prompt_id="z")])])
    assert (nothing.change_pct, nothing.ci_pct, nothing.p_value, nothing.num_prompts) == (None, None, None, 0)


def test_no_variation_is_graceful(make_record):
    same = timed(make_record, [1.0, 2.0, 3.0])
    got = paired.speedup_difference([same], [same])
    assert (got.change_pct, got.ci_pct, got.p_value) == (0, (0, 0), 1)
    twice = timed(make_record, [2.0, 4.0, 6.0])
    got = paired.speedup_difference([same], [twice])
    assert got.ci_pct == pytest.approx((100, 100))
    assert got.p_value == pytest.approx(2 / 10_000)  # what 9999 resamples can tell


def test_a_seed_gives_the_same_interval():
    values = experiment(np.random.default_rng(0), 3, 20, (0.1, 0.1, 0.1))
    assert paired.mean_difference(values, seed=1) == paired.mean_difference(values, seed=1)
    assert paired.mean_difference(values, seed=1) != paired.mean_difference(values, seed=2)


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ([], []),
        ([None], [None]),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.02, 0.02, 0.5], [0.06, 0.06, 0.5]),
        ([0.9, 0.4, None], [0.9, 0.8, None]),
        ([0.6, 0.7], [1.0, 1.0]),
    ],
)
def test_holm_by_hand(given_values, expected):
    assert paired.holm(given_values) == pytest.approx(expected)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12), st.randoms(use_true_random=False))
def test_holm_properties(values, random):
    adjusted = paired.holm(values)
    assert [a is None for a in adjusted] == [v is None for v in values]
    known = sorted((v, a) for v, a in zip(values, adjusted, strict=True) if v is not None)
    for value, after in known:
        assert value <= after <= min(1.0, max(value, len(known) * value)) + 1e-15
    assert [a for _, a in known] == sorted(a for _, a in known)
    if known:
        assert known[0][1] == pytest.approx(min(1.0, len(known) * known[0][0]))
    order = list(range(len(values)))
    random.shuffle(order)
    assert paired.holm([values[i] for i in order]) == [adjusted[i] for i in order]
