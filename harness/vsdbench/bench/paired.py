"""Is one arm better than another? Paired differences whose intervals count training seeds and prompts as two levels.

Every seed's drafter decodes the same prompts, so the two levels are crossed: a difference x[seed, prompt] is made of a
part of the seed, a part of the prompt and a rest. Prompts are many and skewed, so they are resampled (BCa, its
distances widened for few prompts). Seeds are few, and a bootstrap over three of anything is too sure by far (it draws
one seed three times in one of nine resamples), so the spread between seeds enters by Student's t on seeds - 1 degrees
of freedom. What seeds differ by only because they met finitely many prompts is subtracted first, since the prompts'
interval holds it already. The two half-widths are joined as the root of the sum of their squares, end by end (MOVER:
Zou & Donner 2008, Statistics in Medicine 27, 1693); without spread between seeds the prompts' interval remains. On
synthetic data of known truth 95 % intervals of 3 or 5 seeds x 40 prompts hold it in 94 to 97 % of experiments whichever
part is the larger, of 1 seed x 3 to 40 prompts in 93 to 95 %, of 2 very different seeds in 91 %.

The p-value is 1 - the confidence at which the interval just touches "no change", so the two never disagree.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from vsdbench.bench.stats import (
    CONFIDENCE,
    NUM_RESAMPLES,
    BCa,
    Floats,
    Interval,
    as_list,
    log_ratios,
    resamples,
    widened,
)

Frames: TypeAlias = tuple[pd.DataFrame, pd.DataFrame]
"""``(records, steps)`` as ``store.frames.to_frames`` gives them, of one method and mode."""
ALPHA = 0.05
"""A difference whose (adjusted) p-value is below this is called established: its 95 % interval leaves out 0."""
_Statistic: TypeAlias = Callable[[Floats], tuple[Floats, Floats]]
"""Weights of prompts ``[R, P]`` to the log-ratio of each seed ``[R, S]`` and of all seeds together ``[R]``."""

_BISECTIONS = 30  # p to 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How an arm differs from the reference arm, on the prompts (and turns) of both.

    Attributes:
        change_pct: 100 * (ratio - 1), above 0 where ours is the better; None where there is nothing to compare.
        ci_pct: 95 % interval; None where fewer than two prompts leave it undefined.
        p_value: Two-sided, against "no change"; the interval excludes 0 where it is below 0.05.
        num_prompts: Prompts that every seed of both arms decoded.
        num_seeds: Training seeds; with one, the interval is over prompts only.
    """

    change_pct: float | None = None
    ci_pct: Interval | None = None
    p_value: float | None = None
    num_prompts: int = 0
    num_seeds: int = 0

    def entries(self, measure: str) -> dict[str, Any]:
        """Return it as plain JSON data: ``delta_MEASURE_pct``, ``delta_MEASURE_ci`` and ``p_MEASURE``."""
        return {
            f"delta_{measure}_pct": self.change_pct,
            f"delta_{measure}_ci": as_list(self.ci_pct),
            f"p_{measure}": self.p_value,
        }


def tau_difference(
    ours: Sequence[Frames], theirs: Sequence[Frames], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Difference:
    """Return by how much tau (emitted / steps, pooled over seeds, prompts, turns and repeats) differs.

    Args:
        ours: One training seed each; ``ours[i]`` is compared with ``theirs[i]``.
        theirs: Likewise. A side of one member (an untrained control) meets every seed of the other.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples of the prompts.

    Raises:
        ValueError: No members, or numbers of them that cannot be paired.
    """
    tables = [[_counts(*frames) for frames in side] for side in _sides(ours, theirs)]
    common = _common(table for side in tables for table in side)
    units = sorted(common.unique(level="unit"))
    if not units:
        return Difference(num_seeds=len(tables[0]))
    sums = [
        np.stack([table.loc[common].groupby(level="unit").sum().loc[units].to_numpy(np.float64) for table in side], -1)
        for side in tables
    ]  # each [P, 2, S]: tokens emitted and steps by prompt and seed

    def statistic(weights: Floats) -> tuple[Floats, Floats]:
        drawn = [np.tensordot(weights, side, axes=1) for side in sums]  # [R, 2, S]
        return _log_ratio(*drawn), _log_ratio(*(side.sum(axis=-1) for side in drawn))

    return _difference(statistic, len(units), seed=seed, num_resamples=num_resamples)


def speedup_difference(
    ours: Sequence[Frames], theirs: Sequence[Frames], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Difference:
    """Return by how much ours decodes faster: exp of the mean over seeds and prompts of the paired log-ratio of times.

    A time is decode seconds a token of a prompt (repeats averaged, turns pooled). It means something only where both
    arms were measured in one run, block by block; ``mean_difference`` takes log-ratios made in another way.

    Args:
        ours: One training seed each; ``ours[i]`` is compared with ``theirs[i]``.
        theirs: Likewise. A side of one member (an untrained control) meets every seed of the other.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples of the prompts.

    Raises:
        ValueError: No members, or numbers of them that cannot be paired.
    """
    pairs = zip(*_sides(ours, theirs), strict=True)
    return mean_difference([log_ratios(mine[0], other[0]) for mine, other in pairs], seed, num_resamples)


def mean_difference(
    log_ratios: Sequence[pd.Series[float]], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Difference:
    """Return exp of the mean of ``log_ratios`` over seeds and the prompts that all seeds have, as a change in per cent.

    Args:
        log_ratios: One series a training seed, a value a prompt, indexed by prompt.
        seed: Of the resampling.
        num_resamples: Bootstrap resamples of the prompts.
    """
    common = sorted(_common(log_ratios))
    if not common:
        return Difference(num_seeds=len(log_ratios))
    values = np.stack([series.loc[common].to_numpy(np.float64) for series in log_ratios], axis=-1)  # [P, S]

    def statistic(weights: Floats) -> tuple[Floats, Floats]:
        by_seed = weights @ values / weights.sum(axis=1, keepdims=True)
        return by_seed, by_seed.mean(axis=1)

    return _difference(statistic, len(common), seed=seed, num_resamples=num_resamples)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values adjusted for their number (Holm 1979): the largest of (m - i) p_(i) so far, at most 1.

    Args:
        p_values: None where a comparison was not possible: it stays None and does not count.

    >>> holm([0.04, None, 0.01, 0.03])
    [0.06, None, 0.03, 0.06]
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    scaled = (min(1.0, (len(known) - rank) * p) for rank, (p, _) in enumerate(known))
    for (_, index), value in zip(known, itertools.accumulate(scaled, max), strict=True):
        adjusted[index] = value
    return adjusted


# --- frames --------------------------------------------------------------------------------------------------------


def _sides(ours: Sequence[Frames], theirs: Sequence[Frames]) -> tuple[Sequence[Frames], Sequence[Frames]]:
    """Return both sides with one member a seed; a side of one is repeated."""
    num_seeds = max(len(ours), len(theirs))
    if not ours or not theirs or {len(ours), len(theirs)} - {1, num_seeds}:
        raise ValueError(f"{len(ours)} members cannot be paired with {len(theirs)}: give equal numbers, or one")
    return [list(side) * (num_seeds if len(side) == 1 else 1) for side in (ours, theirs)]  # type: ignore[return-value]


def _counts(records: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Return tokens emitted and steps by (unit, turn), repeats pooled; answers without a step are left out."""
    by_record = steps.groupby("record")["num_emitted"].agg(["sum", "size"])
    where = records.loc[by_record.index, ["unit", "turn"]]
    return by_record.join(where).groupby(["unit", "turn"]).sum()


def _common(tables: Any) -> Any:  # noqa: ANN401 - pandas' stubs have no one type for a level or a multi-level index
    return functools.reduce(lambda left, right: left.intersection(right), (table.index for table in tables))


def _log_ratio(ours: Floats, theirs: Floats) -> Floats:
    """Return log(tau of ours / tau of theirs) of sums ``[R, 2, ...]`` (tokens emitted, steps)."""
    result: Floats = np.log(ours[:, 0]) - np.log(ours[:, 1]) - np.log(theirs[:, 0]) + np.log(theirs[:, 1])
    return result


# --- interval ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uncertainty:
    """What an interval of any level is made of, on the scale of log-ratios.

    Attributes:
        value: The estimate.
        resamples: ``[R]`` its values over resampled prompts, sorted.
        correction: Of the tails; None where BCa is undefined and percentiles are taken.
        seed_error: Standard error that the seeds add; 0 with one seed.
        num_prompts: P.
        num_seeds: S.
    """

    value: float
    resamples: Floats
    correction: BCa | None
    seed_error: float
    num_prompts: int
    num_seeds: int

    def interval(self, alpha: float) -> Interval:
        """Return the interval of confidence ``1 - alpha``; it grows as ``alpha`` falls and always holds the value."""
        tails = np.array([alpha / 2, 1 - alpha / 2])
        low, high = np.quantile(self.resamples, tails if self.correction is None else self.correction.tails(tails))
        low, high = widened(self.value, (float(low), float(high)), self.num_prompts, 1 - alpha)
        half = self.seed_error * special.stdtrit(self.num_seeds - 1, 1 - alpha / 2) if self.seed_error else 0.0
        return self.value - math.hypot(self.value - low, half), self.value + math.hypot(high - self.value, half)

    def p_value(self) -> float:
        """Return the largest alpha whose interval holds 0, no less than the resamples can tell."""
        inside, outside = 2 / (len(self.resamples) + 1), 1.0
        if self.value == 0:
            return outside
        if not self._holds_zero(inside):
            return inside
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self._holds_zero(middle) else (inside, middle)
        return inside

    def _holds_zero(self, alpha: float) -> bool:
        low, high = self.interval(alpha)
        return low <= 0 <= high


def _difference(statistic: _Statistic, num_prompts: int, *, seed: int, num_resamples: int) -> Difference:
    by_seed, together = (part[0] for part in statistic(np.ones((1, num_prompts))))
    ci, p_value = None, None
    if num_prompts >= 2:
        uncertainty = _uncertainty(statistic, num_prompts, seed, num_resamples)
        low, high = uncertainty.interval(1 - CONFIDENCE)
        ci, p_value = (_percent(low), _percent(high)), uncertainty.p_value()
    return Difference(
        change_pct=_percent(together), ci_pct=ci, p_value=p_value, num_prompts=num_prompts, num_seeds=len(by_seed)
    )


def _uncertainty(statistic: _Statistic, n: int, seed: int, num_resamples: int) -> _Uncertainty:
    by_seed, together = (part[0] for part in statistic(np.ones((1, n))))
    drawn = [statistic(weights) for weights in resamples(n, seed, num_resamples)]
    distribution = np.sort(np.concatenate([part[1] for part in drawn]))
    return _Uncertainty(
        value=float(together),
        resamples=distribution,
        correction=BCa.of(distribution, float(together), statistic(1.0 - np.eye(n))[1]),
        seed_error=_seed_error(by_seed, np.concatenate([part[0] for part in drawn]), n),
        num_prompts=n,
        num_seeds=len(by_seed),
    )


def _seed_error(by_seed: Floats, drawn: Floats, n: int) -> float:
    """Return the standard error that the seeds' own spread adds to the mean over them.

    Args:
        by_seed: ``[S]`` log-ratio of each seed.
        drawn: ``[R, S]`` the same on resampled prompts, whose variance within a seed that does not go with the other
            seeds' is what seeds would differ by even if they were equal.
        n: Prompts.
    """
    num_seeds = len(by_seed)
    if num_seeds < 2:
        return 0.0
    covariance: NDArray[np.float64] = np.cov(drawn, rowvar=False) * n / (n - 1)
    own = np.trace(covariance) / num_seeds
    shared = (covariance.sum() - np.trace(covariance)) / (num_seeds * (num_seeds - 1))
    return math.sqrt(max(float(np.var(by_seed, ddof=1) - (own - shared)), 0.0) / num_seeds)


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)
