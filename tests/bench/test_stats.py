"""Intervals cover what they claim to on synthetic data, and say None rather than NaN where they are undefined."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from vsdbench.bench import metrics, stats
from vsdbench.store.frames import to_frames


def coverage(draw, estimate, truth, *, num_experiments=300):
    hits = 0
    for experiment in range(num_experiments):
        low, high = estimate(draw(np.random.default_rng(experiment)), experiment).ci
        hits += low <= truth <= high
    return hits / num_experiments


@pytest.mark.parametrize("num_prompts", [6, 10, 40])
def test_speedup_interval_covers(num_prompts):
    """Log-ratios with skewed noise around log 1.5: the exponential of the interval holds 1.5, of few prompts too."""
    got = coverage(
        lambda rng: math.log(1.5) + 0.15 * (rng.gamma(4, size=num_prompts) - 4) / 2,
        lambda values, seed: stats.mean_estimate(values, seed=seed, num_resamples=999).map(math.exp),
        truth=1.5,
        num_experiments=500,
    )
    assert 0.92 <= got <= 0.98


def test_prompts_as_the_sample_under_cover_where_categories_differ_but_categories_do_not():
    """The reason for the category interval: with spread between categories, prompts alone are too sure."""

    def draw(rng):
        categories = np.repeat(np.arange(8), 10)
        values = 0.3 + 0.2 * rng.normal(size=8)[categories] + 0.1 * rng.normal(size=80)
        return pd.Series(values), pd.Series(categories.astype(str))

    by_prompt = coverage(
        draw, lambda data, seed: stats.mean_estimate(data[0].to_numpy(), seed=seed, num_resamples=499), truth=0.3
    )
    by_category = coverage(draw, lambda data, seed: stats.category_interval(*data), truth=0.3)
    two_level = coverage(
        draw, lambda data, seed: stats.two_level_bootstrap(*data, seed=seed, num_resamples=499), truth=0.3
    )
    assert by_prompt < 0.75
    assert 0.91 <= by_category <= 0.99
    assert 0.92 <= two_level <= 0.99


def speed_frames(make_record, ratios, **fields):
    """A baseline at 0.1 s a token and a method that is ``ratios[i]`` times as fast on prompt i."""
    ours = [
        make_record(num_output_tokens=11, decode_s=1.0 / ratio, prompt_id=f"p{i}") for i, ratio in enumerate(ratios)
    ]
    theirs = [make_record(num_output_tokens=11, decode_s=1.0, prompt_id=f"p{i}") for i in range(len(ratios))]
    return to_frames(ours)[0], to_frames(theirs)[0]


def test_speedup_is_the_geometric_mean_of_ratios(make_record):
    got = stats.speedup(stats.log_ratios(*speed_frames(make_record, [1.0, 2.0, 4.0])), seed=0)
    assert got.value == pytest.approx(2.0)
    assert got.num_units == 3
    assert 0.0 < got.ci[0] < 2.0 < got.ci[1]


def test_speedup_of_the_other_way_round_is_the_inverse(make_record):
    ours, theirs = speed_frames(make_record, [1.1, 1.7, 1.4, 2.2])
    there, back = (stats.speedup(stats.log_ratios(*pair), seed=0) for pair in ((ours, theirs), (theirs, ours)))
    assert there.value == pytest.approx(1 / back.value)


def test_log_ratios_are_above_zero_where_the_method_is_faster(make_record):
    values = stats.log_ratios(*speed_frames(make_record, [2.0, 0.5]))
    assert values.to_dict() == pytest.approx({"tiny/p0": math.log(2), "tiny/p1": -math.log(2)})


def test_an_interval_repeats_with_its_seed_and_only_with_it():
    values = np.random.default_rng(0).normal(size=20)
    first, again, other = (stats.mean_estimate(values, seed=seed).ci for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first == pytest.approx(other, abs=0.05)


def ratio(numerator, denominator, axis=-1):
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def test_bca_is_what_scipy_gives():
    values = np.random.default_rng(0).gamma(2.0, size=30)
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=500, method="BCa", rng=np.random.default_rng(1))
    ends = expected.confidence_interval
    assert stats.ratio_interval(values, np.ones(30), seed=1, num_resamples=500) == pytest.approx(tuple(ends), rel=1e-9)
    mean, wider = values.mean(), scipy_stats.t.ppf(0.975, 29) / scipy_stats.norm.ppf(0.975) * math.sqrt(30 / 29)
    got = stats.mean_estimate(values, seed=1, num_resamples=500)
    assert got.ci == pytest.approx((mean - wider * (mean - ends[0]), mean + wider * (ends[1] - mean)), rel=1e-9)


def test_draws_that_are_kept_change_nothing(monkeypatch):
    """Numbers resampled jointly; with what was drawn before, without it, and as scipy does it itself."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(40, 90, size=150).astype(float), rng.integers(20, 40, size=150).astype(float)]
    expected = scipy_stats.bootstrap(samples, ratio, paired=True, n_resamples=999, rng=np.random.default_rng(1))
    for _ in range(2):
        got = stats.ratio_interval(*samples, seed=1, num_resamples=999)
        assert got == pytest.approx(tuple(expected.confidence_interval), rel=1e-9)
    monkeypatch.setattr(stats, "_MAX_KEPT", 0)
    monkeypatch.setattr(stats, "_BATCH", 1000)  # and in many batches
    assert stats.ratio_interval(*samples, seed=1, num_resamples=999) == pytest.approx(got, rel=1e-12)


def test_the_order_of_three_prompts_does_not_move_an_interval():
    """Two of nine resamples hold all three and have the sample's own mean, though added up they differ by a bit."""
    values = np.array([0.1, 0.7, 0.3])
    orders = [values[list(order)] for order in itertools.permutations(range(3))]
    assert len({float(np.mean(order)) for order in orders}) > 1
    drawn = np.sort([np.mean(resample) for resample in itertools.product(values, repeat=3)])
    left_out = np.array([0.5, 0.2, 0.4])
    biases = {round(stats.BCa.of(drawn, float(np.mean(order)), left_out).bias, 9) for order in orders}
    below = sum(round(sum(resample), 9) < 1.1 for resample in itertools.product(values, repeat=3))
    assert biases == {round(float(scipy_stats.norm.ppf((below + 3) / 27)), 9)}


@pytest.mark.parametrize(
    ("values", "value", "ci"),
    [
        ([], None, None),
        ([0.5], 0.5, None),
        ([0.5, 0.5], 0.5, (0.5, 0.5)),
        ([0.25] * 5, 0.25, (0.25, 0.25)),
        # Both ends are a unit; Student's quantile for one degree of freedom and sqrt(2) away from the mean.
        ([0.0, 1.0], 0.5, (-4.0840, 5.0840)),
    ],
)
def test_few_prompts_and_no_variance_are_graceful(values, value, ci):
    got = stats.mean_estimate(np.array(values, dtype=float), seed=0)
    assert (got.value, got.ci) == (value, ci and pytest.approx(ci, abs=1e-4))


def test_pooled_tau_weighs_prompts_by_their_steps(make_record):
    good, bad = (7, 4, 3, 4, 1, 1, 0), (7, 4, 0, 1, 1, 1, 0)
    records, steps = to_frames(
        [
            make_record(steps=[good] * 2, prompt_id="a"),
            make_record(steps=[bad] * 30, prompt_id="b"),
            make_record(steps=[good, bad], prompt_id="c"),
            make_record(num_output_tokens=1, prompt_id="no-steps"),
        ]
    )
    got = stats.pooled_tau(metrics.emitted_and_steps(records, steps), seed=0)
    assert got.value == pytest.approx((8 + 30 + 5) / 34)
    assert got.num_units == 3
    assert 0.0 < got.ci[0] <= got.value <= got.ci[1]


@pytest.mark.parametrize("num_prompts", [10, 40])
def test_pooled_tau_interval_covers_a_ratio_of_sums(num_prompts):
    """Long answers have lower tau here, so that the pooled value differs from the mean over prompts."""

    def draw(rng):
        steps = rng.integers(5, 60, size=num_prompts).astype(float)
        emitted = np.round(steps * (3 - steps / 60 + 0.3 * rng.normal(size=num_prompts)))
        return pd.DataFrame({"num_emitted": emitted, "num_steps": steps})

    sizes = np.arange(5, 60)
    truth = (sizes * (3 - sizes / 60)).sum() / sizes.sum()
    got = coverage(draw, lambda table, seed: stats.pooled_tau(table, seed=seed, num_resamples=999), truth)
    assert 0.91 <= got <= 0.99


def test_same_method_control_compares_the_first_two_repeats(make_record):
    rows = [
        make_record(num_output_tokens=11, decode_s=seconds, prompt_id=f"p{i}", repeat=repeat)
        for i in range(5)
        for repeat, seconds in ((0, 1.0), (1, 1.25), (2, 50.0))
    ]
    frame = to_frames(rows)[0]
    assert stats.same_method_control(frame).value == pytest.approx(1.25)
    assert stats.same_method_control(frame[frame["repeat"] == 1]) is None


def test_control_of_an_honest_clock_holds_one(make_run):
    frame = to_frames(make_run(num_prompts=30))[0]
    low, high = stats.same_method_control(frame[frame["method"] == "autoregressive"]).ci
    assert low < 1 < high


def test_category_interval_by_hand():
    values = pd.Series([0.1, 0.3, 0.4, 0.9], index=list("abcd"))
    categories = pd.Series(["x", "x", "y", "z"], index=list("abcd"))
    got = stats.category_interval(values, categories)
    means = np.array([0.2, 0.4, 0.9])
    half = 4.302652729911275 * means.std(ddof=1) / math.sqrt(3)  # t quantile, 2 degrees of freedom
    assert got.value == pytest.approx(0.5)
    assert got.ci == pytest.approx((0.5 - half, 0.5 + half))
    assert got.num_units == 3
    one = stats.category_interval(values[:2], categories[:2])
    assert (one.value, one.ci, one.num_units) == (pytest.approx(0.2), None, 1)
    assert stats.category_interval(values[:0], categories[:0]).value is None


def test_two_level_bootstrap_edges():
    values, categories = pd.Series([0.1, 0.3, 0.4]), pd.Series(["x", "x", "y"])
    got = stats.two_level_bootstrap(values, categories, seed=0)
    assert got.value == pytest.approx(0.3)
    # Lowest: category x twice, its low prompt in all four draws, is rarer than 2.5 %; three of four is next. Widened.
    wider = scipy_stats.t.ppf(0.975, 1) / scipy_stats.norm.ppf(0.975) * math.sqrt(2)
    assert got.ci == pytest.approx((0.3 - wider * 0.15, 0.3 + wider * 0.1))
    assert stats.two_level_bootstrap(values[:2], categories[:2], seed=0).ci is None
    assert stats.two_level_bootstrap(values[:0], categories[:0], seed=0).value is None


def test_minimum_detectable_effect_is_found_with_that_power():
    rng = np.random.default_rng(0)
    pilot = rng.normal(size=40)
    pilot = 0.2 * (pilot - pilot.mean()) / pilot.std(ddof=1)
    effect = stats.minimum_detectable_effect(pilot, power=0.8)
    found = scipy_stats.ttest_1samp(effect + 0.2 * rng.normal(size=(4000, 40)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.025)
    assert stats.minimum_detectable_effect(pilot[:1]) is None


def test_estimates_map_both_ends():
    got = stats.Estimate(value=0.0, ci=(-1.0, 1.0), num_units=3).map(math.exp)
    assert got.ci == pytest.approx((math.exp(-1), math.e))
    assert stats.Estimate(value=None, ci=None, num_units=0).map(math.exp).value is None
