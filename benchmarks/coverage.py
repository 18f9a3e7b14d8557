"""How often do intervals hold the truth? Every kind that is printed, on synthetic runs whose truth is known.

The numbers are drawn as runs have them: skewed over prompts, counts that are whole, training seeds crossed with
prompts, categories that differ. A nominal 95 % should be 93 to 97 % at the sizes of the shipped suites.

    python benchmarks/coverage.py --experiments 2000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vsdbench.bench import paired, script, stats

TRUTH = 0.3
"""Of every log-ratio."""
NUM_RESAMPLES = 1999
"""Fewer than reports have: ends then scatter more, which costs a tenth of a point at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One interval: what it is called, and one experiment that says whether it held."""

    name: str
    holds: Callable[[np.random.Generator, int], bool]


def skewed(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return draws of mean 0, deviation 1 and skewness 1."""
    return (rng.gamma(4, size=shape) - 4) / 2


def speedup(num_prompts: int) -> Kind:
    """Return the interval of a speedup: BCa over prompts, widened."""

    def holds(rng: np.random.Generator, seed: int) -> bool:
        return inside(stats.mean_estimate(TRUTH + 0.15 * skewed(rng, num_prompts), **drawing(seed)).ci, TRUTH)

    return Kind(name=f"speedup, {num_prompts} prompts", holds=holds)


def tau(num_prompts: int) -> Kind:
    """Return the interval of tau, a ratio of sums: long answers have a lower tau here."""
    sizes = np.arange(5, 60)
    truth = float((sizes * (3 - sizes / 60)).sum() / sizes.sum())

    def holds(rng: np.random.Generator, seed: int) -> bool:
        steps = rng.integers(5, 60, size=num_prompts).astype(float)
        emitted = np.round(steps * (3 - steps / 60 + 0.3 * rng.normal(size=num_prompts)))
        by_prompt = pd.DataFrame({"num_emitted": emitted, "num_steps": steps})
        return inside(stats.pooled_tau(by_prompt, **drawing(seed)).ci, truth)

    return Kind(name=f"tau, {num_prompts} prompts", holds=holds)


def difference(num_seeds: int, num_prompts: int, of_seeds: float) -> Kind:
    """Return the interval of a paired difference over seeds and prompts; ``of_seeds`` is the spread between seeds."""
    names = [f"p{i:03}" for i in range(num_prompts)]

    def holds(rng: np.random.Generator, seed: int) -> bool:
        values = TRUTH + of_seeds * rng.normal(size=(num_seeds, 1)) + 0.1 * skewed(rng, 1, num_prompts)
        values = values + 0.1 * rng.normal(size=(num_seeds, num_prompts))
        found = paired.mean_difference([pd.Series(row, index=names) for row in values], **drawing(seed))
        return inside(found.ci_pct, 100 * math.expm1(TRUTH))

    spread = f", seeds spread by {of_seeds:g}" if num_seeds > 1 else ""
    return Kind(
        name=f"difference, {num_seeds} seed{'s' if num_seeds > 1 else ''} x {num_prompts} prompts{spread}", holds=holds
    )


def domains(estimate: Callable[..., stats.Estimate], name: str, *, draws: bool = False) -> Kind:
    """Return an interval for new domains: 8 categories, that differ, of 10 prompts each."""

    def holds(rng: np.random.Generator, seed: int) -> bool:
        categories = np.repeat(np.arange(8), 10)
        values = TRUTH + 0.2 * rng.normal(size=8)[categories] + 0.1 * rng.normal(size=80)
        options = drawing(seed) if draws else {}
        return inside(estimate(pd.Series(values), pd.Series(categories.astype(str)), **options).ci, TRUTH)

    return Kind(name=f"new domains, {name}, 8 categories x 10 prompts", holds=holds)


def drawing(seed: int) -> dict[str, int]:
    """Return the arguments of an interval that resamples."""
    return {"seed": seed, "num_resamples": NUM_RESAMPLES}


def inside(ends: stats.Interval | None, truth: float) -> bool:
    """Return whether an interval holds the truth."""
    return ends is not None and ends[0] <= truth <= ends[1]


KINDS = (
    *(speedup(n) for n in (10, 40, 80)),
    *(tau(n) for n in (10, 40, 80)),
    *(difference(1, n, 0.0) for n in (10, 40, 80)),
    *(difference(seeds, 40, spread) for seeds in (3, 5) for spread in (0.0, 0.02, 0.1)),
    domains(stats.category_interval, "Student's t"),
    domains(stats.two_level_bootstrap, "bootstrap", draws=True),
)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    parser.add_argument("--experiments", type=int, default=2000, help="of every kind (default: 2000)")
    return parser.parse_args()


def main() -> int:
    """Count and print."""
    options = parse()
    found = {}
    for kind in KINDS:
        held = sum(kind.holds(np.random.default_rng(number), number) for number in range(options.experiments))
        found[kind.name] = held / options.experiments
        if not options.json:
            error = math.sqrt(found[kind.name] * (1 - found[kind.name]) / options.experiments)
            print(f"{kind.name:<58} {100 * found[kind.name]:5.1f} % +- {100 * error:.1f}", flush=True)
    if options.json:
        print(json.dumps({"experiments": options.experiments, "confidence": stats.CONFIDENCE, "coverage": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
