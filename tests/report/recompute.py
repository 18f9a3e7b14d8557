"""Numbers of the reference reports from their records, by numpy and scipy alone: nothing here imports the program."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache, cached_property
from itertools import combinations

import numpy as np
from scipy import optimize, stats
from tests.report.recorded import (
    ABLATIONS,
    answers,
    arms,
    baselines,
    by_seed,
    changed_arms,
    chosen,
    control_arms,
    drafters,
    methods,
    reference,
    temperatures,
)

NUM_RESAMPLES = 9999
"""Of every interval, drawn by ``default_rng(0)``: docs/measuring.md says so."""
TAILS = np.array([0.025, 0.975])
MAX_ARMS = 8
"""Lines of a figure."""


# --- values --------------------------------------------------------------------------------------------------------


def tau(of):
    return sum(sum(a["steps"]["num_emitted"]) for a in of) / sum(len(a["steps"]["num_emitted"]) for a in of)


def tokens_per_s(of):
    return sum(a["num_output_tokens"] - 1 for a in of) / sum(a["decode_s"] for a in of)


def counts(of):
    """Tokens emitted and steps by prompt, those of all repeats and seeds together."""
    by_prompt = defaultdict(lambda: np.zeros(2))
    for a in of:
        by_prompt[a["prompt_id"]] += sum(a["steps"]["num_emitted"]), len(a["steps"]["num_emitted"])
    return dict(by_prompt)


def seconds_per_token(of):
    """By prompt, repeats together."""
    seconds, tokens = defaultdict(float), defaultdict(int)
    for a in of:
        seconds[a["prompt_id"]] += a["decode_s"]
        tokens[a["prompt_id"]] += a["num_output_tokens"] - 1
    return {prompt: seconds[prompt] / tokens[prompt] for prompt in seconds if tokens[prompt]}


def log_ratios(ours, theirs):
    """By prompt: above 0 where ours is the faster."""
    ours, theirs = seconds_per_token(ours), seconds_per_token(theirs)
    return {prompt: math.log(theirs[prompt] / ours[prompt]) for prompt in sorted(ours.keys() & theirs.keys())}


def mean_log_ratio(ours, theirs):
    return float(np.mean(list(log_ratios(ours, theirs).values())))


def faster_baseline(name, temperature):
    return max(baselines(name), key=lambda method: tokens_per_s(chosen(name, method, temperature)))


def shown(name):
    """What figures draw: every drafter; of an ablation the reference, the controls and the largest changes of tau."""
    if name not in ABLATIONS:
        return drafters(name)
    first = temperatures(name)[0]
    size = {arm: abs(against_reference(name, arm, first, "tau").change_pct) for arm in changed_arms(name)}
    drawn = {reference(name), *control_arms(name)}
    drawn |= set(sorted(size, key=lambda arm: -size[arm])[: MAX_ARMS - len(drawn)])
    return [arm for arm in arms(name) if arm in drawn]


# --- intervals over prompts ----------------------------------------------------------------------------------------


def bca(statistic, *samples):
    """Ends of Efron's BCa interval; of two units, or without any spread, it is the percentile interval.

    Args:
        statistic: Of arrays, over their last axis.
        samples: One value a unit each.
    """
    columns = np.array(samples, dtype=float)
    n = columns.shape[1]
    drawn = statistic(*columns[:, resamples(n)])
    left_out = np.array([statistic(*np.delete(columns, unit, axis=1)) for unit in range(n)])
    return np.quantile(drawn, bent(TAILS, *correction(drawn, statistic(*columns), left_out)))


@cache
def resamples(n):
    """The units of every resample, as docs/measuring.md says that they are drawn."""
    return np.random.default_rng(0).integers(n, size=(NUM_RESAMPLES, n))


@cache
def times_drawn(n):
    """How often each unit is in every resample, ``[R, n]``."""
    return np.array([np.bincount(row, minlength=n) for row in resamples(n)], dtype=float)


def correction(drawn, value, left_out):
    """BCa's bias and acceleration; two zeros, which bend nothing, where either has no value.

    The bias is how much of the bootstrap lies below the value, equal ones (but for rounding) as halves.
    """
    equal = np.isclose(drawn, value, rtol=1e-12, atol=1e-12)
    below = np.mean((drawn < value) & ~equal) + np.mean(equal) / 2
    deviations = left_out.mean() - left_out
    squares = (deviations**2).sum()
    if len(left_out) < 3 or squares == 0 or below in {0, 1}:
        return 0.0, 0.0
    return stats.norm.ppf(below), (deviations**3).sum() / (6 * squares**1.5)


def bent(tails, bias, a):
    z = bias + stats.norm.ppf(tails)
    return stats.norm.cdf(bias + z / (1 - a * z))


def few_units(n, alpha=0.05):
    """By what a bootstrap's distances are too short for n units (Hesterberg 2015)."""
    return stats.t.ppf(1 - alpha / 2, n - 1) / stats.norm.ppf(1 - alpha / 2) * math.sqrt(n / (n - 1))


def widened(value, ends, n):
    """Ends about a value on the same scale, as far from it as n units need."""
    return value + few_units(n) * (np.asarray(ends) - value)


def tau_interval(of):
    emitted, steps = np.array([pair for _, pair in sorted(counts(of).items())]).T
    ends = bca(lambda e, s: e.sum(axis=-1) / s.sum(axis=-1), emitted, steps)
    return np.exp(widened(math.log(tau(of)), np.log(ends), len(steps)))


def speedup_interval(ours, theirs):
    values = list(log_ratios(ours, theirs).values())
    return np.exp(widened(np.mean(values), bca(lambda v: v.mean(axis=-1), values), len(values)))


# --- paired differences --------------------------------------------------------------------------------------------


class Difference:
    """A log-ratio of two arms with the interval of any level: prompts by BCa, seeds by Student's t, joined by MOVER.

    Args:
        of: Weights of prompts ``[R, P]`` to the log-ratio of each seed ``[R, S]`` and of all together ``[R]``.
        num_prompts: P.
    """

    def __init__(self, of, num_prompts):
        n = self.n = num_prompts
        by_seed, drawn = of(times_drawn(n))
        seeds, value = of(np.ones((1, n)))
        self.value, self.drawn = value[0], drawn
        self.correction = correction(drawn, self.value, of(1 - np.eye(n))[1])
        self.num_seeds = seeds.shape[1]
        self.seed_error = 0.0
        if self.num_seeds > 1:
            covariance = np.cov(by_seed.T) * n / (n - 1)
            within = np.diag(covariance).mean() - covariance[~np.eye(self.num_seeds, dtype=bool)].mean()
            self.seed_error = math.sqrt(max(0.0, seeds[0].var(ddof=1) - within) / self.num_seeds)

    def interval(self, alpha):
        tails = np.array([alpha / 2, 1 - alpha / 2])
        low, high = np.quantile(self.drawn, bent(tails, *self.correction))
        wider = few_units(self.n, alpha)
        seeds = self.seed_error * stats.t.ppf(1 - alpha / 2, self.num_seeds - 1) if self.num_seeds > 1 else 0.0
        below, above = max(0.0, self.value - low), max(0.0, high - self.value)
        return self.value - math.hypot(wider * below, seeds), self.value + math.hypot(wider * above, seeds)

    @property
    def change_pct(self):
        return 100 * math.expm1(self.value)

    @property
    def ci_pct(self):
        return tuple(100 * math.expm1(end) for end in self.interval(0.05))

    @cached_property
    def p(self):
        """The level at which an end touches 0: no less than 9,999 resamples can tell, 1 if every interval holds 0."""
        if self.value == 0:
            return 1.0
        side = 0 if self.value > 0 else 1
        least, most = 2 / (NUM_RESAMPLES + 1), 1 - 1e-9
        if self.interval(least)[side] * self.value > 0:
            return least
        if self.interval(most)[side] * self.value < 0:
            return 1.0
        return optimize.brentq(lambda alpha: self.interval(alpha)[side], least, most, xtol=1e-12)

    @property
    def certain(self):
        return self.interval(0.05)[0] > 0


def tau_difference(ours, theirs):
    """Of answers a seed each, all of the same prompts."""
    sides = [[counts(of) for of in side] for side in (ours, theirs)]
    prompts = sorted(sides[0][0])
    sides = [np.array([[of[p] for of in side] for p in prompts]) for side in sides]  # [P, S, 2]

    def log_tau(weights, side, together):
        sums = np.einsum("rp,psk->rsk", weights, side)
        sums = sums.sum(axis=1, keepdims=True) if together else sums
        return np.log(sums[..., 0] / sums[..., 1])

    def of(weights):
        by_seed, pooled = (log_tau(weights, sides[0], t) - log_tau(weights, sides[1], t) for t in (False, True))
        return by_seed, pooled[:, 0]

    return Difference(of, len(prompts))


def speed_difference(ours, theirs):
    """Of answers a seed each, all of the same prompts."""
    pairs = [log_ratios(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    values = np.array([[ratios[p] for ratios in pairs] for p in pairs[0]])  # [P, S]

    def of(weights):
        by_seed = weights @ values / weights.sum(axis=1, keepdims=True)
        return by_seed, by_seed.mean(axis=1)

    return Difference(of, len(values))


def holm(p_values):
    """Holm's step down: the i-th smallest of m times m - i, never below the one before it, never above 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


@cache
def against_reference(name, arm, temperature, measure):
    """By how much an arm differs from the reference of its ablation."""
    return (tau_difference if measure == "tau" else speed_difference)(*by_seed(name, arm, temperature))


@cache
def adjusted(name, temperature, measure):
    """Holm's p-values by arm: of those in which a part is changed and, by themselves, of the controls."""
    return {
        arm: p
        for group in (changed_arms(name), control_arms(name))
        for arm, p in zip(group, holm([against_reference(name, a, temperature, measure).p for a in group]), strict=True)
    }


@cache
def lead(name, temperature, measure):
    """The best drafter of a contest, the second best, and by how much it is ahead."""
    of = {method: chosen(name, method, temperature) for method in drafters(name)}
    if measure == "tau":
        first, second = sorted(of, key=lambda method: -tau(of[method]))[:2]
        return first, second, tau_difference([of[first]], [of[second]])
    plain = chosen(name, faster_baseline(name, temperature), temperature)
    first, second = sorted(of, key=lambda method: -mean_log_ratio(of[method], plain))[:2]
    return first, second, speed_difference([of[first]], [of[second]])


# --- what a run can show -------------------------------------------------------------------------------------------


def detectable_pct(name, temperature):
    """The smallest difference in speed and in tau between trained drafters that shows with 80 % power, in per cent."""
    trained = [method for method, told in methods(name).items() if told["objective"] is not None]
    of = [chosen(name, method, temperature) for method in trained]
    times = [{p: math.log(s) for p, s in seconds_per_token(answers_of).items()} for answers_of in of]
    parts = []
    for answers_of in of:
        emitted, steps = np.array(list(counts(answers_of).values())).T
        parts.append(dict(zip(counts(answers_of), emitted / emitted.mean() - steps / steps.mean(), strict=True)))
    return [100 * math.expm1(np.median([smallest(*pair) for pair in combinations(of, 2)])) for of in (times, parts)]


def smallest(one, other):
    """What a two-sided paired t test at 5 % finds in four of five experiments."""
    differences = [one[prompt] - other[prompt] for prompt in one.keys() & other.keys()]
    n = len(differences)
    return (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * np.std(differences, ddof=1) / math.sqrt(n)


def controls(name):
    """By baseline its A/A intervals, a temperature each: all together they hold 1 in 99 % of quiet runs."""
    twice = [b for b in baselines(name) if len({a["repeat"] for a in answers(name) if a["method"] == b}) > 1]
    if not twice:
        return {}
    share = 0.01 / len(twice) / len(temperatures(name))
    return {b: [same_twice(chosen(name, b, temperature), share) for temperature in temperatures(name)] for b in twice}


def same_twice(of, alpha):
    """The interval of the first repeat's speed over the second's."""
    first, second = ([a for a in of if a["repeat"] == repeat] for repeat in (0, 1))
    values = list(log_ratios(first, second).values())
    half = stats.t.ppf(1 - alpha / 2, len(values) - 1) * stats.sem(values)
    return math.exp(np.mean(values) - half), math.exp(np.mean(values) + half)
