"""How sure we are: intervals over prompts, because prompts are what a suite samples and repeats are not.

The speedup of a method is analysed as the log-ratio of seconds a token, baseline over method, one value a prompt
(repeats averaged, turns pooled). "On this suite" is a BCa bootstrap over prompts; "on new domains" treats categories as
the sample. Every function that draws takes a seed. What is undefined is None, never NaN.

What is resampled here is a ratio of sums over prompts (a mean is one, over a sum of ones), so a resample need only say
how often each prompt was drawn, and all statistics of as many prompts share the same resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from vsdbench.bench import metrics

Floats: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
_BATCH = 250_000  # counts held at once, few enough for a processor's cache
_MAX_KEPT = 20_000_000  # counts kept for the next statistic of as many units, two bytes each
_ROUNDING = 1e-12  # by which the same units, added up in another order, may differ


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


def as_list(interval: Interval | None) -> list[float] | None:
    """Return an interval as JSON has it."""
    return None if interval is None else list(interval)


def ratio_interval(
    numerator: Floats,
    denominator: Floats,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval | None:
    """Return the BCa interval of sum(numerator) / sum(denominator) over units resampled jointly.

    Two units give the percentile interval (see ``BCa``), fewer give None. With no variation it is the value twice. For
    few units it is too short: what is printed went through ``widened``.

    Args:
        numerator: ``[n]``, one entry a unit.
        denominator: Likewise.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples.
    """
    if len(numerator) < 2:
        return None
    columns = np.stack([numerator, denominator], axis=1)
    total = columns.sum(axis=0)
    sums = np.concatenate([counts @ columns for counts in resamples(len(columns), seed, num_resamples)])
    drawn = np.sort(_ratio(sums))
    tails = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    correction = BCa.of(drawn, float(_ratio(total)), _ratio(total - columns))
    return _quantiles(drawn, tails if correction is None else correction.tails(tails))


def widened(value: float, ends: Interval, num_units: int, confidence: float = CONFIDENCE) -> Interval:
    """Return a bootstrap's ``ends`` with their distances from ``value`` as long as so few units need them.

    Resampling takes the spread of ``n`` units for the truth: it is short by sqrt((n - 1) / n), and it uses normal
    quantiles where Student's are due (Hesterberg 2015, The American Statistician 69, 371). It cannot reach beyond the
    largest unit either, so that of four prompts one arm wins all of in an eighth of all experiments it would be sure.
    The factor is 1.22 for 10 units, 1.05 for 40 and 1.02 for 80. Ratios are widened as logarithms.
    """
    upper = (1 + confidence) / 2
    factor = float(special.stdtrit(num_units - 1, upper) / special.ndtri(upper))
    factor *= math.sqrt(num_units / (num_units - 1))
    return value - factor * max(value - ends[0], 0.0), value + factor * max(ends[1] - value, 0.0)


@dataclass(frozen=True, slots=True)
class BCa:
    """Efron's correction of a bootstrap's tails for its bias and its acceleration (JASA 82, 1987)."""

    bias: float
    acceleration: float

    @classmethod
    def of(cls, drawn: Floats, value: float, left_out: Floats) -> BCa | None:
        """Return the correction; None where it has no value, so that percentiles are taken as they are.

        Three units are the least that the acceleration can be estimated from. A resample that holds the units of the
        sample itself has its value but for rounding, whatever the order in which they were added: half of those count
        as below. (Of three units they are 2 in 9, so an interval must not hang on the last bit of each.)

        Args:
            drawn: ``[R]`` the statistic of each resample, sorted.
            value: That of the sample.
            left_out: ``[n]`` that of the sample without each of its units.
        """
        slack = _ROUNDING * max(abs(float(drawn[0])), abs(float(drawn[-1])))
        first = np.searchsorted(drawn, value - slack, side="left")
        last = np.searchsorted(drawn, value + slack, side="right")
        below = float(first + last) / (2 * len(drawn))
        deviations = left_out.mean() - left_out
        squares = float(np.sum(deviations**2))
        if len(left_out) < 3 or squares == 0 or not 0 < below < 1:
            return None
        return cls(float(special.ndtri(below)), float(np.sum(deviations**3)) / (6 * math.pow(squares, 1.5)))

    def tails(self, tails: Floats) -> Floats:
        """Return the shares of the bootstrap that stand for the shares ``tails``."""
        z = self.bias + special.ndtri(tails)
        bent: Floats = special.ndtr(self.bias + z / (1 - self.acceleration * z))
        return bent


def resamples(n: int, seed: int, num_resamples: int) -> Iterator[Floats]:
    """Yield batches ``[R, n]`` of how often each unit is drawn, by ``default_rng(seed).integers(n)``, row by row.

    A batch is to be used before the next one is asked for, which is written over it.
    """
    if n * num_resamples > _MAX_KEPT or n > np.iinfo(np.uint16).max:
        batches: Any = _draw(n, seed, num_resamples)
    else:
        batches = _kept(n, seed, num_resamples)
    buffer = np.empty((min(num_resamples, max(1, _BATCH // n)), n))
    for counts in batches:
        buffer[: len(counts)] = counts
        yield buffer[: len(counts)]


@functools.lru_cache(maxsize=16)
def _kept(n: int, seed: int, num_resamples: int) -> tuple[NDArray[np.uint16], ...]:
    return tuple(counts.astype(np.uint16) for counts in _draw(n, seed, num_resamples))


def _draw(n: int, seed: int, num_resamples: int) -> Iterator[NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    batch = max(1, _BATCH // n)
    for start in range(0, num_resamples, batch):
        yield _counts(rng, n, min(batch, num_resamples - start))


def _counts(rng: np.random.Generator, n: int, size: int) -> NDArray[np.intp]:
    """Return ``[size, n]``: how often each of ``n`` units is among ``n`` that are drawn with replacement."""
    drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)


def mean_estimate(values: NDArray[np.floating[Any]], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """Return the mean of ``values [n]``, one a prompt, with its BCa interval, ``widened``."""
    if not len(values):
        return Estimate(value=None, ci=None, num_units=0)
    value = float(np.mean(values))
    ones = np.ones(len(values))
    ci = ratio_interval(np.asarray(values, dtype=np.float64), ones, seed=seed, num_resamples=num_resamples)
    return Estimate(value=value, ci=ci and widened(value, ci, len(values)), num_units=len(values))


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


def speedup(log_ratios: pd.Series[float], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """Return how many times as fast a method decodes a token as its reference: exp of the mean paired log-ratio.

    Args:
        log_ratios: Of the two, by prompt.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples.
    """
    return mean_estimate(log_ratios.to_numpy(np.float64), seed=seed, num_resamples=num_resamples).map(math.exp)


def pooled_tau(by_prompt: pd.DataFrame, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """Return ``metrics.tau`` with the BCa interval of that ratio of sums, ``widened``, prompts resampled as wholes.

    Args:
        by_prompt: As ``metrics.emitted_and_steps`` gives it.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples.
    """
    sums = by_prompt[["num_emitted", "num_steps"]].to_numpy(np.float64)
    if not len(sums):
        return Estimate(value=None, ci=None, num_units=0)
    value = math.log(_ratio(sums.sum(axis=0)))
    ci = ratio_interval(sums[:, 0], sums[:, 1], seed=seed, num_resamples=num_resamples)
    logs = ci and widened(value, (math.log(ci[0]), math.log(ci[1])), len(sums))
    return Estimate(value=value, ci=logs, num_units=len(sums)).map(math.exp)


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
    return t_estimate(log_ratios(first, second).to_numpy(np.float64), confidence).map(math.exp)


def category_interval(values: pd.Series[float], categories: pd.Series[str]) -> Estimate:
    """Return the mean of category means with the t interval over categories: "on new domains like these".

    Args:
        values: One a prompt, e.g. ``log_ratios``.
        categories: Category of each prompt, with the same index.
    """
    return t_estimate(values.groupby(categories.reindex(values.index)).mean().to_numpy(np.float64))


def two_level_bootstrap(
    values: pd.Series[float],
    categories: pd.Series[str],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Return the mean of category means; categories are resampled, then prompts within each (percentiles, ``widened``).

    Args:
        values: One a prompt, e.g. ``log_ratios``.
        categories: Category of each prompt, with the same index.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples.
    """
    groups = [group.to_numpy(np.float64) for _, group in values.groupby(categories.reindex(values.index))]
    if not groups:
        return Estimate(value=None, ci=None, num_units=0)
    value = float(np.mean([np.mean(group) for group in groups]))
    if len(groups) < 2:
        return Estimate(value=value, ci=None, num_units=len(groups))
    sizes = tuple(map(len, groups))
    kept = num_resamples * sum(sizes) <= _MAX_KEPT * len(groups)
    draws = (_kept_of_groups if kept else _draw_of_groups)(sizes, seed, num_resamples)
    means = np.empty((num_resamples, len(groups)))
    for group, (where, counts) in zip(groups, draws, strict=True):
        means[where] = counts @ group / len(group)
    tails = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    ci = widened(value, _quantiles(means.mean(axis=1), tails), len(groups))
    return Estimate(value=value, ci=ci, num_units=len(groups))


def _draw_of_groups(
    sizes: tuple[int, ...], seed: int, num_resamples: int
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.uint32]]]:
    """Yield for each group which draws ``[R, G]`` are of it, and how often each of its units is drawn in those."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sizes), size=(num_resamples, len(sizes)))
    for index, n in enumerate(sizes):
        where = drawn == index  # each draw of a group gets units of its own
        yield where, _counts(rng, n, int(where.sum())).astype(np.uint32)


@functools.lru_cache(maxsize=2)
def _kept_of_groups(sizes: tuple[int, ...], seed: int, num_resamples: int) -> tuple[Any, ...]:
    return tuple(_draw_of_groups(sizes, seed, num_resamples))


def minimum_detectable_effect(values: Floats, *, power: float = 0.8) -> float | None:
    """Return the smallest true mean that a two-sided paired t test at 5 % would find with probability ``power``.

    In the unit of ``values``: for log-ratios, ``exp`` of it is the smallest speedup that this suite can show.

    Args:
        values: ``[n]`` paired differences, one a prompt, that give the spread.
        power: Probability of finding the effect.
    """
    n = len(values)
    if n < 2:
        return None
    quantiles = special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) + special.stdtrit(n - 1, power)
    return float(quantiles * np.std(values, ddof=1) / math.sqrt(n))


def t_estimate(values: NDArray[np.floating[Any]], confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean of ``values [n]`` with its Student t interval."""
    if len(values) < 2:
        return Estimate(value=float(values[0]) if len(values) else None, ci=None, num_units=len(values))
    half = special.stdtrit(len(values) - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / math.sqrt(len(values))
    value = float(np.mean(values))
    return Estimate(value=value, ci=(value - float(half), value + float(half)), num_units=len(values))


def _ratio(sums: Floats) -> Floats:
    """Return numerator over denominator of sums ``[..., 2]``."""
    return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def _quantiles(distribution: Floats, tails: Floats) -> Interval:
    low, high = np.quantile(distribution, tails)
    return float(low), float(high)
