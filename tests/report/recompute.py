"""Numbers of the reference reports from their records, by numpy and scipy alone: nothing here imports the program."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import yaml
from scipy import optimize, stats

ROOT = Path(__file__).parents[2]
RUNS = {
    "quickstart": "quickstart-cpu-2026-11-24",
    "mtbench-hour": "mtbench-hour-cpu-2026-11-25",
    "ablation-hour": "ablation-hour-cpu-2026-11-25",
}
CONTESTS = ("quickstart", "mtbench-hour")
ABLATION = "ablation-hour"
NUM_RESAMPLES = 9999
"""Of every interval, drawn by ``default_rng(0)``: the README says so."""
TAILS = np.array([0.025, 0.975])


# --- files ---------------------------------------------------------------------------------------------------------


def folder(name):
    return ROOT / "results/reference" / RUNS[name]


@cache
def answers(name):
    return [json.loads(line) for line in (folder(name) / "records.jsonl").read_text(encoding="utf-8").splitlines()]


@cache
def manifest(name):
    return json.loads((folder(name) / "manifest.json").read_text(encoding="utf-8"))


@cache
def config(name):
    return yaml.safe_load((folder(name) / "config.yaml").read_text(encoding="utf-8"))


@cache
def source(name):
    """The text that the PDF is set from, with plain spaces."""
    text = (ROOT / "reports/reference" / name / "report.typ").read_text(encoding="utf-8")
    return text.replace("\u00a0", " ")


def table(name, of):
    text = (ROOT / "reports/reference" / name / "tables" / f"{of}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def tables(name):
    return {path.stem for path in (ROOT / "reports/reference" / name / "tables").glob("*.csv")}


def drafters(name):
    return [method["name"] for method in manifest(name)["methods"] if method["kind"] == "drafter"]


def baselines(name):
    return [method["name"] for method in manifest(name)["methods"] if method["kind"] == "baseline"]


def temperatures(name):
    return sorted({a["temperature"] for a in answers(name)})


def chosen(name, method, temperature, category=None):
    """The answers of a method, or of all seeds of an arm."""
    found = [
        a for a in answers(name)
        if method in {a["method"], a["method"].partition("@")[0]} and a["temperature"] == float(temperature)
        and category in {None, "all", a["category"]}
    ]  # fmt: skip
    assert found
    return found


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


def shown_arms():
    """Those that the figures of the ablation have room for: the reference, the controls, the largest changes of tau."""
    names = [arm["name"] for arm in manifest(ABLATION)["ablation"]["arms"]]
    control = ["continual-kl", "onpolicy-rkl", "warm-start"]
    rest = [name for name in names if name not in {"vsd", *control}]
    size = {name: abs(tau(chosen(ABLATION, name, 0)) / tau(chosen(ABLATION, "vsd", 0)) - 1) for name in rest}
    shown = {"vsd", *control, *sorted(rest, key=lambda name: -size[name])[:4]}
    return [name for name in names if name in shown]


# --- intervals over prompts ----------------------------------------------------------------------------------------


def bca(statistic, *samples):
    """Ends of Efron's BCa interval; two units have none, so theirs is the percentile interval.

    Args:
        statistic: Of arrays, over their last axis.
        samples: One value a unit each.
    """
    columns = np.array(samples, dtype=float)
    n = columns.shape[1]
    drawn = statistic(*columns[:, resamples(n)])
    if n < 3:
        return np.quantile(drawn, TAILS)
    bias = z0(drawn, statistic(*columns))
    left_out = np.array([statistic(*np.delete(columns, unit, axis=1)) for unit in range(n)])
    return np.quantile(drawn, bent(TAILS, bias, acceleration(left_out)))


@cache
def resamples(n):
    """The units of every resample, as the README says that they are drawn."""
    return np.random.default_rng(0).integers(n, size=(NUM_RESAMPLES, n))


def z0(drawn, value):
    """BCa's bias: how much of the bootstrap lies below the value, equal ones (but for rounding) as halves."""
    equal = np.isclose(drawn, value, rtol=1e-12, atol=1e-12)
    return stats.norm.ppf(np.mean((drawn < value) & ~equal) + np.mean(equal) / 2)


def acceleration(left_out):
    deviations = left_out.mean() - left_out
    return (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)


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
        weights = np.array([np.bincount(row, minlength=n) for row in resamples(n)], dtype=float)
        by_seed, drawn = of(weights)
        seeds, value = of(np.ones((1, n)))
        self.value, self.drawn = value[0], drawn
        self.bias = z0(drawn, self.value)
        self.a = acceleration(of(1 - np.eye(n))[1])
        self.num_seeds = seeds.shape[1]
        self.seed_error = 0.0
        if self.num_seeds > 1:
            covariance = np.cov(by_seed.T) * n / (n - 1)
            within = np.diag(covariance).mean() - covariance[~np.eye(self.num_seeds, dtype=bool)].mean()
            self.seed_error = math.sqrt(max(0.0, seeds[0].var(ddof=1) - within) / self.num_seeds)

    def interval(self, alpha):
        tails = np.array([alpha / 2, 1 - alpha / 2])
        low, high = np.quantile(self.drawn, bent(tails, self.bias, self.a))
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

    @property
    def p(self):
        """The level at which an end touches 0: no less than 9,999 resamples can tell, 1 if every interval holds 0."""
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
    prompts = sorted(counts(ours[0]))
    sides = [np.array([[counts(of)[p] for of in side] for p in prompts]) for side in (ours, theirs)]  # [P, S, 2]

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


def by_seed(arm):
    """The answers of an arm and of the reference, one entry a training seed; the warm start meets every seed."""
    ours = [arm if arm == "warm-start" else f"{arm}@{seed}" for seed in (0, 1, 2)]
    return [[chosen(ABLATION, method, 0) for method in side] for side in (ours, [f"vsd@{seed}" for seed in (0, 1, 2)])]


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
    trained = [m["name"] for m in manifest(name)["methods"] if m["objective"] is not None]
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
    """The A/A intervals of all baselines and temperatures: together they hold 1 in 99 % of quiet runs."""
    if len({a["repeat"] for a in answers(name)}) < 2:
        return []
    of = [chosen(name, method, temperature) for method in baselines(name) for temperature in temperatures(name)]
    found = []
    for answers_of in of:
        first, second = ([a for a in answers_of if a["repeat"] == repeat] for repeat in (0, 1))
        values = list(log_ratios(first, second).values())
        half = stats.t.ppf(1 - 0.01 / len(of) / 2, len(values) - 1) * stats.sem(values)
        found.append((math.exp(np.mean(values) - half), math.exp(np.mean(values) + half)))
    return found


# --- text ----------------------------------------------------------------------------------------------------------


def printed_rows(name):
    """By table: its rows as they are set, a cell being its text, both ends of its interval, and whether it is bold."""
    tables = re.findall(
        r'#data-table\(\n  key: "([a-z0-9-]+)".*?\n  rows: \(\n(.*?)  \),\n\)', source(name), flags=re.DOTALL
    )
    cell = re.compile(r'cell\("((?:[^"\\]|\\.)*)"(?:, ends: \("([^"]*)", "([^"]*)"\))?(, bold: true)?')
    return {key: [cell.findall(line) for line in rows.splitlines()] for key, rows in tables}


def prose(name):
    """All text but the rows of tables, commands and sources; what it refers to is left out."""
    text = re.sub(r"\n  header: .*?\n\)", "", source(name), flags=re.DOTALL)
    text = re.sub(r"#(commands|references)\(.*", "", text)
    text = re.sub(r'(ref\(label|read|key: )\(?"[^"]*"', "", text)
    return "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text.partition("#show")[2]))


def number(text):
    """The number of a printed cell."""
    return float(text.translate({0x2212: "-", 0x202F: None, ord("+"): None}))


def fixed(value, digits):
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def signed(value):
    """A change, one decimal."""
    return ("+" if value >= 0.05 else "") + fixed(value, 1)


def listed(items):
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
