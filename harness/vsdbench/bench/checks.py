"""What a run can and cannot show: was the machine quiet enough, and how small a difference would have been seen.

Both are derived from the records like every other number: the A/A control from a baseline's repeats, the minimum
detectable effect from how differently two drafters do on the prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vsdbench.bench import metrics, stats
from vsdbench.errors import GateError

POWER = 0.8
CONTROL_CONFIDENCE = 0.99
"""Of quiet runs, how many have controls that all hold 1: a false alarm costs a whole run, so it must be rare."""
_ROUNDING = 1e-9  # of an interval's end, where the times of both repeats are equal


def controls(records: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the A/A control of every baseline x mode x temperature that has two repeats.

    Their intervals are simultaneous: in 99 % of quiet runs all of them hold 1, however many there are (Bonferroni).
    ``holds`` is None where a single prompt leaves the interval undefined: then nothing is claimed.

    Args:
        records: The records frame of one run.
    """
    groups = records[records["kind"] == "baseline"].groupby(["mode", "temperature", "method"], sort=False)
    repeated = [rows for _, rows in groups if rows["repeat"].nunique() >= 2]
    confidence = 1 - (1 - CONTROL_CONFIDENCE) / max(len(repeated), 1)
    found = []
    for rows in repeated:
        control = stats.same_method_control(rows, confidence=confidence)
        if control is None:
            continue
        found.append(
            {
                "name": str(rows["method"].iloc[0]),
                "mode": str(rows["mode"].iloc[0]),
                "temperature": float(rows["temperature"].iloc[0]),
                "value": control.value,
                "ci": stats.as_list(control.ci),
                "confidence": confidence,
                "num_prompts": control.num_units,
                "holds": None if control.ci is None else _holds_one(*control.ci),
            }
        )
    return found


def noise(summary: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every control of a summary whose interval does not hold 1."""
    return [
        f"A/A control: {control['name']} at T = {control['temperature']:g} was {control['value']:.3f} times as fast in "
        f"its first repeat as in its second [{control['ci'][0]:.3f}, {control['ci'][1]:.3f}], where 1 must lie inside: "
        "the machine was too noisy, so do not trust this run's speedups; repeat it with nothing else running."
        for control in summary["controls"]
        if control["holds"] is False
    ]


def enforce(summaries: Sequence[Mapping[str, Any]], *, strict: bool) -> None:
    """Raise for runs whose answers are not lossless, and under ``strict`` for those whose clock cannot be trusted.

    Args:
        summaries: Of runs that are finished and kept.
        strict: Whether an A/A control that does not hold 1 is a failure.

    Raises:
        GateError: Says how many answers violate, a drafter's or the other baseline's, or which control does not hold.
    """
    judged = [row for summary in summaries for row in summary["results"] if row["category"] is None]
    judged += [row for summary in summaries for row in summary.get("batches", [])]
    violations = sum(row["lossless"]["violations"] for row in judged)
    if violations:
        raise GateError(
            f"{violations} answers differ from the baseline's by more than rounding explains: the speedups above are "
            "not lossless; see the divergences in the run's records, and repeat with --dtype fp32."
        )
    for baseline in (baseline for summary in summaries for baseline in summary["baselines"]):
        if violations := baseline["lossless"]["violations"]:
            raise GateError(
                f"{violations} answers of '{baseline['name']}' differ from plain decoding's by more than rounding "
                "explains, so one of the two does not decode this target as it should: nothing above can be trusted; "
                "see the divergences in the run's records, and repeat with --dtype fp32."
            )
    noisy = [sentence for summary in summaries for sentence in noise(summary)]
    if strict and noisy:
        raise GateError(f"{noisy[0]} (The records are kept.)")


def detectable(records: pd.DataFrame, steps: pd.DataFrame) -> dict[str, Any]:
    """Return the smallest change in speed and in tau between two drafters that this suite shows with 80 % power.

    It follows from how the paired log-ratio of two drafters spreads over prompts (two-sided t test at 5 %, one
    training seed each); the median over pairs of trained drafters is given, over pairs of any drafters where fewer
    than two were trained. A lone drafter is held against the fastest baseline, whose tau does not vary.

    Args:
        records: Records of one mode and temperature.
        steps: Their steps.
    """
    drafters, between = _comparable(records)
    chosen = [metrics.select(records, steps, method=name) for name in drafters]
    times = [_log_times(part[0]) for part in chosen]
    taus = [_log_tau_parts(*part) for part in chosen]
    if len(chosen) == 1:
        taus.append(taus[0] * 0)
        times += [_log_times(rows) for rows in _fastest_baseline(records)]
    return {
        "power": POWER,
        "speedup_pct": _median_effect(times),
        "tau_pct": _median_effect(taus),
        "num_prompts": int(records["unit"].nunique()),
        "between": between,
    }


def detectable_line(summary: Mapping[str, Any]) -> str | None:
    """Return one line about ``minimum_detectable_effect`` of a summary; None where nothing could be told."""
    parts = detectable_effects(summary)
    if not parts:
        return None
    between = summary["minimum_detectable_effect"][0]["between"]
    return (
        f"Smallest difference between {between} that these {summary['num_prompts']} prompts show with "
        f"{100 * POWER:g} % power: {'; '.join(parts)}."
    )


def detectable_effects(summary: Mapping[str, Any]) -> list[str]:
    """Return ``minimum_detectable_effect`` in words, a mode each: ``1.2 % in speed and 0.9 % in τ at T = 0``."""
    parts = []
    for entry in summary["minimum_detectable_effect"]:
        known = [(entry["speedup_pct"], "in speed"), (entry["tau_pct"], "in τ")]
        told = [f"{value:.1f} % {what}" for value, what in known if value is not None]
        if told:
            parts.append(f"{' and '.join(told)} at T = {entry['temperature']:g}")
    return parts


def _holds_one(low: float, high: float) -> bool:
    return low <= 1 + _ROUNDING and high >= 1 - _ROUNDING


def _comparable(records: pd.DataFrame) -> tuple[list[str], str]:
    """Return the drafters whose differences are looked at, and what to call them."""
    methods = records[records["kind"] == "drafter"].drop_duplicates("method")
    trained = methods[methods["objective"].notna()]
    if len(trained) >= 2:
        return trained["method"].tolist(), "trained drafters"
    return methods["method"].tolist(), "drafters" if len(methods) >= 2 else "the drafter and the baseline"


def _fastest_baseline(records: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the rows of the baseline with the highest throughput, or nothing."""
    groups = [rows for _, rows in records[records["kind"] == "baseline"].groupby("method")]
    return sorted(groups, key=lambda rows: metrics.tokens_per_s(rows) or 0.0)[-1:]


def _log_times(records: pd.DataFrame) -> pd.Series[float]:
    """Return log seconds a token by prompt."""
    seconds = metrics.seconds_per_token(records)
    return pd.Series(np.log(seconds.to_numpy(np.float64)), index=seconds.index)


def _log_tau_parts(records: pd.DataFrame, steps: pd.DataFrame) -> pd.Series[float]:
    """Return each prompt's part in log(sum of emitted / sum of steps), to first order; the mean of the parts is 0."""
    sums = metrics.emitted_and_steps(records, steps)
    parts: pd.Series[float] = sums["num_emitted"] / sums["num_emitted"].mean()
    return parts - sums["num_steps"] / sums["num_steps"].mean()


def _median_effect(values: list[pd.Series[float]]) -> float | None:
    """Return the median over pairs of series of the change in per cent that their paired difference can show."""
    effects = []
    for one, other in itertools.combinations(values, 2):
        differences = (one - other).dropna().to_numpy(np.float64)
        effect = stats.minimum_detectable_effect(differences.astype(np.float64), power=POWER)
        if effect is not None:
            effects.append(effect)
    return 100 * math.expm1(float(np.median(effects))) if effects else None
