"""Interval ends and p-values of the reference reports, by formulas written down once more (``recompute``).

Resamples are drawn as docs/measuring.md says, so that ends agree to ten digits. Speedups on new domains are the
exception: the order of their draws is nobody's business, so theirs are held against a bootstrap of other draws.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from tests.report.recompute import (
    NUM_RESAMPLES,
    TAILS,
    adjusted,
    against_reference,
    bca,
    faster_baseline,
    few_units,
    log_ratios,
    speedup_interval,
    tau_interval,
)
from tests.report.recorded import (
    ABLATIONS,
    CONTESTS,
    RUNS,
    baselines,
    categories,
    chosen,
    drafters,
    reference,
    table,
    tables,
)

contests = pytest.mark.parametrize("name", CONTESTS)


def ends(row, column):
    return [float(row[f"{column} low"]), float(row[f"{column} high"])]


def close(expected):
    return pytest.approx(list(expected), rel=1e-9, abs=1e-9)


def test_bca_is_what_scipy_makes_of_the_same_resamples():
    """The independent lines, held against a third party."""
    values = np.random.default_rng(5).gamma(2.0, size=12)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=NUM_RESAMPLES, method="BCa", rng=np.random.default_rng(0), batch=NUM_RESAMPLES
    ).confidence_interval
    assert bca(lambda v: v.mean(axis=-1), values) == close(theirs)


@pytest.mark.parametrize("name", [name for name in RUNS if "trees" in tables(name)])
def test_intervals_of_automatic_trees(name):
    for row in table(name, "trees"):
        own, plain = (chosen(name, method, float(row["T"])) for method in (row["drafter"], "autoregressive"))
        assert ends(row, "τ measured") == close(tau_interval(own))
        assert ends(row, "speedup measured") == close(speedup_interval(own, plain))


@pytest.mark.parametrize("name", RUNS)
def test_intervals_of_the_main_table(name):
    for row in table(name, "main"):
        of = chosen(name, row["drafter"], row["T"])
        assert ends(row, "τ") == close(tau_interval(of))
        for baseline in baselines(name):
            plain = chosen(name, baseline, row["T"])
            assert ends(row, f"speedup vs {baseline}") == close(speedup_interval(of, plain))


@contests
def test_intervals_by_category(name):
    for row in table(name, "tau-by-category"):
        for drafter in drafters(name):
            assert ends(row, drafter) == close(tau_interval(chosen(name, drafter, row["T"], row["category"])))
    for row in table(name, "speedup-by-category"):
        plain = chosen(name, faster_baseline(name, row["T"]), row["T"])
        for drafter in drafters(name):
            of = chosen(name, drafter, row["T"], row["category"])
            assert ends(row, drafter) == close(speedup_interval(of, plain))


@contests
def test_intervals_on_new_domains(name):
    category = categories(name)
    for row in table(name, "domains"):
        plain = chosen(name, faster_baseline(name, row["T"]), row["T"])
        ratios = log_ratios(chosen(name, row["drafter"], row["T"]), plain)
        groups = [
            np.array([value for prompt, value in ratios.items() if category[prompt] == which])
            for which in sorted(set(category.values()))
        ]
        means = [group.mean() for group in groups]
        half = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
        assert ends(row, "speedup, t") == close(np.exp([np.mean(means) - half, np.mean(means) + half]))
        narrow = np.mean(means) + (np.log(ends(row, "speedup, bootstrap")) - np.mean(means)) / few_units(len(means))
        held_against_other_draws(np.exp(narrow), groups)


def held_against_other_draws(printed, groups):
    """The share of another bootstrap below each end is 2.5 % or 97.5 %, to within what both vary by.

    A quantile of R draws lies at a share of the truth that varies by sqrt(p (1 - p) / R); five such errors pass.
    """
    num_draws = 10_000
    rng = np.random.default_rng(12345)
    drawn = rng.integers(len(groups), size=(num_draws, len(groups)))
    resampled = [group[rng.integers(len(group), size=(*drawn.shape, len(group)))].mean(axis=-1) for group in groups]
    means = np.exp(np.choose(drawn, resampled).mean(axis=1))
    error = math.sqrt(TAILS[0] * TAILS[1] * (1 / NUM_RESAMPLES + 1 / num_draws))
    assert [np.mean(means < end) for end in printed] == pytest.approx(list(TAILS), abs=5 * error)


@pytest.mark.parametrize("name", ABLATIONS)
def test_intervals_and_p_values_of_the_ablation(name):
    for row in table(name, "ablation"):
        assert ends(row, "τ") == close(tau_interval(chosen(name, row["arm"], row["T"])))
        for measure, column, p_column in (("tau", "τ", "p"), ("speed", "speed", "p ")):
            if row["arm"] != reference(name):
                found = against_reference(name, row["arm"], row["T"], measure)
                assert ends(row, f"change of {column}, %") == close(found.ci_pct)
                p = adjusted(name, row["T"], measure)[row["arm"]]
                assert float(row[p_column]) == pytest.approx(p, rel=1e-6, abs=1e-9)
