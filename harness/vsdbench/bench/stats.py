"""How sure we are: intervals over prompts, because prompts are what a suite samples and repeats are not.

The speedup of a method is analysed as the log-ratio of seconds a token, baseline over method, one value a prompt
(repeats averaged, turns pooled). "On this suite" is a BCa bootstrap over prompts; "on new domains" treats categories as
the sample. Every function that draws takes a seed. What is undefined is None, never NaN.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vsdbench.bench import metrics

Floats: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
_MAX_ELEMENTS = 2_000_000  # resampled values held at once
_MAX_KEPT = 20_000_000  # draws kept for the next statistic of as many units, two bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: None where there is nothing to estimate from.
        ci: Lower and upper end; None where a single unit (or none) leaves it undefined.
        num_units: Prompts (or categories) it rests on.
    """

    value: float | None
    ci: Interval | None
    num_units: int

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate with a monotone increasing ``function`` applied to the value and both ends."""
        ci = None if self.ci is None else (function(self.ci[0]), function(self.ci[1]))
        return Estimate(value=None if self.value is None else function(self.value), ci=ci, num_units=self.num_units)


def bootstrap_interval(
    samples: Sequence[Floats],
    statistic: Callable[..., Any],
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval | None:
    """Return the BCa interval of ``statistic(*samples, axis=...)`` over units resampled jointly.

    Three units are the least that BCa's acceleration can be estimated from: two give the percentile interval, fewer
    give None. Where BCa has no value (the jackknife or the resamples do not vary) the percentile interval of the same
    resamples is given; with no variation at all that is the value twice.

    Args:
        samples: Arrays ``[n]``, one entry a unit each.
        statistic: Vectorised over ``axis``.
        seed: Of the resampling.
        confidence: Two-sided level.
        num_resamples: Bootstrap resamples.
    """
    n = len(samples[0])
    if n < 2:
        return None
    batches = _resamples(n, seed, num_resamples)
    drawn = [statistic(*(sample.take(rows) for sample in samples), axis=-1) for rows in batches]
    distribution: Any = _Distribution(np.concatenate(drawn))  # scipy's stubs want the class that it hides
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            tuple(samples),
            statistic,
            n_resamples=0,
            bootstrap_result=distribution,
            batch=max(1, _MAX_ELEMENTS // n),
            vectorized=True,
            paired=True,
            confidence_level=confidence,
            method="BCa" if n >= 3 else "percentile",
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = _percentiles(result.bootstrap_distribution, confidence)
    return low, high


@dataclass(frozen=True, slots=True)
class _Distribution:
    """A bootstrap distribution in the form in which scipy takes one that is there already."""

    bootstrap_distribution: Floats


def _resamples(n: int, seed: int, num_resamples: int) -> Iterator[NDArray[np.intp]]:
    """Yield batches of resampled units ``[R, n]``; most statistics of a run share them, so they are drawn once."""
    if n * num_resamples > _MAX_KEPT or n > np.iinfo(np.uint16).max:
        yield from _draw(n, seed, num_resamples)
    else:
        for rows in _kept(n, seed, num_resamples):
            yield rows.astype(np.intp)


@functools.lru_cache(maxsize=16)
def _kept(n: int, seed: int, num_resamples: int) -> tuple[NDArray[np.uint16], ...]:
    return tuple(rows.astype(np.uint16) for rows in _draw(n, seed, num_resamples))


def _draw(n: int, seed: int, num_resamples: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    batch = max(1, _MAX_ELEMENTS // n)
    for start in range(0, num_resamples, batch):
        yield rng.integers(n, size=(min(batch, num_resamples - start), n))


def mean_estimate(values: NDArray[np.floating[Any]], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """Return the mean of ``values [n]``, one a prompt, with its BCa interval."""
    value = float(np.mean(values)) if len(values) else None
    ci = bootstrap_interval([np.asarray(values, dtype=np.float64)], np.mean, seed=seed, num_resamples=num_resamples)
    return Estimate(value=value, ci=ci, num_units=len(values))


def log_ratios(method: pd.DataFrame, reference: pd.DataFrame) -> pd.Series[float]:
    """Return log(seconds a token of ``reference`` / that of ``method``) by prompt: above 0 where the method is faster.

    Args:
        method: Rows of the records frame.
        reference: Rows of the records frame, of the same mode.
    """
    return log_ratios_of_turns(metrics.by_turn(method), metrics.by_turn(reference))


def log_ratios_of_turns(method: pd.DataFrame, reference: pd.DataFrame) -> pd.Series[float]:
    """Return what ``log_ratios`` does, of two frames that ``metrics.by_turn`` gave."""
    paired = metrics.paired_seconds_per_token(method, reference)
    seconds = paired.to_numpy(np.float64)
    values: pd.Series[float] = pd.Series(np.log(seconds[:, 1] / seconds[:, 0]), index=paired.index)
    return values


def speedup(
    method: pd.DataFrame, reference: pd.DataFrame, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Return how many times as fast ``method`` decodes a token as ``reference``: exp of the mean paired log-ratio."""
    turns = metrics.by_turn(method), metrics.by_turn(reference)
    return speedup_of_turns(*turns, seed=seed, num_resamples=num_resamples)


def speedup_of_turns(
    method: pd.DataFrame, reference: pd.DataFrame, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Return what ``speedup`` does, of two frames that ``metrics.by_turn`` gave."""
    values = log_ratios_of_turns(method, reference).to_numpy(np.float64)
    return mean_estimate(values, seed=seed, num_resamples=num_resamples).map(math.exp)


def pooled_tau(
    records: pd.DataFrame, steps: pd.DataFrame, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Return ``metrics.tau`` with the BCa interval of that ratio of sums, prompts resampled with all their steps."""
    sums = metrics.emitted_and_steps(records, steps)
    samples = [sums["num_emitted"].to_numpy(np.float64), sums["num_steps"].to_numpy(np.float64)]
    ci = bootstrap_interval(samples, _ratio_of_sums, seed=seed, num_resamples=num_resamples)
    return Estimate(value=metrics.tau(steps), ci=ci, num_units=len(sums))


def tau_ratio(
    method: tuple[pd.DataFrame, pd.DataFrame],
    reference: tuple[pd.DataFrame, pd.DataFrame],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Return pooled tau of ``method`` over that of ``reference`` on the prompts of both, with the paired BCa interval.

    Args:
        method: ``(records, steps)``.
        reference: ``(records, steps)`` of the same mode.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples.
    """
    ours, theirs = metrics.emitted_and_steps(*method), metrics.emitted_and_steps(*reference)
    both = ours.join(theirs.add_prefix("reference_"), how="inner").sort_index()
    samples = [both[name].to_numpy(np.float64) for name in both.columns]
    value = float(_ratio_of_ratios(samples[0], samples[1], samples[2], samples[3])) if len(both) else None
    ci = bootstrap_interval(samples, _ratio_of_ratios, seed=seed, num_resamples=num_resamples)
    return Estimate(value=value, ci=ci, num_units=len(both))


def same_method_control(records: pd.DataFrame, *, confidence: float = CONFIDENCE) -> Estimate | None:
    """Return the "speedup" of a method's first repeat over its second (A/A): its interval should hold 1.

    The interval is Student's t over the prompts' log-ratios: times of equal work differ symmetrically, and a control
    of few prompts must not raise more false alarms than it says, as resampling would.

    Args:
        records: Rows of one method and mode.
        confidence: Two-sided level.

    Returns:
        None where there are fewer than two repeats; no interval with a single prompt.
    """
    repeats = sorted(records["repeat"].unique())
    if len(repeats) < 2:
        return None
    first, second = (records[records["repeat"] == repeat] for repeat in repeats[:2])
    return _t_estimate(log_ratios(first, second).to_numpy(np.float64), confidence).map(math.exp)


def category_interval(
    values: pd.Series[float], categories: pd.Series[str], *, confidence: float = CONFIDENCE
) -> Estimate:
    """Return the mean of category means with the t interval over categories: "on new domains like these".

    Args:
        values: One a prompt, e.g. ``log_ratios``.
        categories: Category of each prompt, with the same index.
        confidence: Two-sided level.
    """
    return _t_estimate(values.groupby(categories.reindex(values.index)).mean().to_numpy(np.float64), confidence)


def two_level_bootstrap(
    values: pd.Series[float],
    categories: pd.Series[str],
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Return the mean of category means; categories are resampled, then prompts within each (percentile interval).

    Args:
        values: One a prompt, e.g. ``log_ratios``.
        categories: Category of each prompt, with the same index.
        seed: Of the resampling.
        confidence: Two-sided level.
        num_resamples: Bootstrap resamples.
    """
    groups = [group.to_numpy(np.float64) for _, group in values.groupby(categories.reindex(values.index))]
    if not groups:
        return Estimate(value=None, ci=None, num_units=0)
    value = float(np.mean([np.mean(group) for group in groups]))
    if len(groups) < 2:
        return Estimate(value=value, ci=None, num_units=len(groups))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(groups), size=(num_resamples, len(groups)))
    means = np.empty(drawn.shape)
    for index, group in enumerate(groups):
        where = drawn == index  # each draw of a category gets prompts of its own
        picks = rng.integers(len(group), size=(int(where.sum()), len(group)))
        means[where] = group[picks].mean(axis=1)
    return Estimate(value=value, ci=_percentiles(means.mean(axis=1), confidence), num_units=len(groups))


def minimum_detectable_effect(
    values: Floats, *, num_units: int | None = None, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Return the smallest true mean that a two-sided paired t test would find with probability ``power``.

    In the unit of ``values``: for log-ratios, ``exp`` of it is the smallest speedup that this suite can show.

    Args:
        values: ``[n]`` paired differences, one a prompt, that give the spread.
        num_units: Prompts of the test to be planned; as many as ``values`` if None.
        alpha: Two-sided level of the test.
        power: Probability of finding the effect.
    """
    n = len(values) if num_units is None else num_units
    if len(values) < 2 or n < 2:
        return None
    quantiles = stats.t.ppf(1 - alpha / 2, n - 1) + stats.t.ppf(power, n - 1)
    return float(quantiles * np.std(values, ddof=1) / math.sqrt(n))


def _t_estimate(values: NDArray[np.floating[Any]], confidence: float) -> Estimate:
    """Return the mean of ``values [n]`` with its Student t interval."""
    if len(values) < 2:
        return Estimate(value=float(values[0]) if len(values) else None, ci=None, num_units=len(values))
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    value = float(np.mean(values))
    return Estimate(value=value, ci=(value - float(half), value + float(half)), num_units=len(values))


def _ratio_of_sums(numerator: Floats, denominator: Floats, axis: int = -1) -> Floats:
    return np.asarray(numerator.sum(axis=axis) / denominator.sum(axis=axis), dtype=np.float64)


def _ratio_of_ratios(
    emitted: Floats, steps: Floats, other_emitted: Floats, other_steps: Floats, axis: int = -1
) -> Floats:
    return _ratio_of_sums(emitted, steps, axis) / _ratio_of_sums(other_emitted, other_steps, axis)


def _percentiles(distribution: Floats, confidence: float) -> Interval:
    low, high = np.quantile(distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
