"""The summary of a run: the one object that ``run --json`` prints and that tables, figures and reports are made of.

It is derived from records alone, so that it can be made again at any time, by any later version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from vsdbench.bench import checks, metrics, stats
from vsdbench.bench.batches import summarise_batches
from vsdbench.bench.diagnostics import METRICS, misalignment
from vsdbench.bench.image_controls import image_controls
from vsdbench.bench.paired import Frames
from vsdbench.errors import ConfigError
from vsdbench.store.batches import BatchRecord
from vsdbench.store.frames import to_frames
from vsdbench.store.records import Record

Summary: TypeAlias = dict[str, Any]
SUMMARY_SCHEMA = 1


def summarise(
    records: Sequence[Record],
    *,
    manifest: Mapping[str, Any] | None = None,
    seed: int = 0,
    num_resamples: int = stats.NUM_RESAMPLES,
    batches: Sequence[BatchRecord] = (),
) -> Summary:
    """Return the summary of one run as plain JSON data.

    ``results`` has, for every drafter x mode, a row over all prompts (``category`` null) and a row a category. A
    speedup is paired by prompt against the faster baseline of the same mode and temperature (by tokens/s over all
    prompts), which ``speedup_baseline`` names; ``speedups`` has it against each. ``controls`` are A/A comparisons of
    each baseline's first two repeats: an interval without 1 means that the clock cannot be trusted.
    ``minimum_detectable_effect`` has, for every mode, the smallest differences that the run could have shown.
    ``domain_speedup`` is for new domains like the suite's: against the same baseline the geometric mean of the
    categories' own means, with Student's t over categories (``domain_speedup_ci``) and a bootstrap of categories and of
    prompts within them (``domain_speedup_bootstrap_ci``); null in the rows of single categories, and where there is
    only one.
    ``diagnostics`` say how a drafter's preference and what was kept of its trees differ (``bench.diagnostics``), null
    where that was not recorded.
    ``image_controls`` is there only where drafters were shown other pictures than the target, and says what they lost
    (``bench.image_controls``).
    ``batches`` is there for runs with several batch sizes (``bench.batches``).

    Args:
        records: Of one run, not empty.
        manifest: The run's manifest; ``device`` and which drafters are controls are taken from it.
        seed: Of every bootstrap.
        num_resamples: Of every bootstrap.
        batches: Of the same run.

    Raises:
        ConfigError: No records, or records of several runs, targets or dtypes.
    """
    summary = summarise_frames(to_frames(records), manifest=manifest, seed=seed, num_resamples=num_resamples)
    return summary | {"batches": summarise_batches(batches)} if batches else summary


def summarise_frames(
    frames: Frames,
    *,
    manifest: Mapping[str, Any] | None = None,
    seed: int = 0,
    num_resamples: int = stats.NUM_RESAMPLES,
) -> Summary:
    """Return what ``summarise`` does, of records that are frames already; those are left as they are."""
    frame, steps = frames
    if frame.empty:
        raise ConfigError("The run has no records yet, so there is nothing to summarise; continue it with --resume.")
    suites = sorted(frame["suite"].unique())
    if len(suites) > 1:
        frame = frame.assign(category=frame["suite"] + "/" + frame["category"])
    summary: Summary = {
        "schema": SUMMARY_SCHEMA,
        "run_id": _only(frame, "run_id"),
        "suite": "+".join(suites),
        "target": _only(frame, "target"),
        "device": (manifest or {}).get("device"),
        "dtype": _only(frame, "dtype"),
        "num_prompts": int(frame["unit"].nunique()),
        "num_repeats": int(frame["repeat"].nunique()),
        "confidence": stats.CONFIDENCE,
        "baselines": [],
        "controls": checks.controls(frame),
        "minimum_detectable_effect": [],
        "results": [],
    }
    bootstrap = {"seed": seed, "num_resamples": num_resamples}
    for (mode, temperature), _ in frame.groupby(["mode", "temperature"], sort=True):
        _add_mode(summary, *metrics.select(frame, steps, mode=mode, temperature=temperature), bootstrap)
    if lost := image_controls((frame, steps), manifest or {}, **bootstrap):
        summary["image_controls"] = lost
    return summary


def summary_frame(summary: Summary) -> pd.DataFrame:
    """Return ``results`` as a frame, one row each, nested values as flat columns (the form of ``summary.parquet``)."""
    context = {name: summary[name] for name in ("run_id", "suite", "target", "device", "dtype")}
    return pd.DataFrame([context | flatten_result(row) for row in summary["results"]])


def flatten_result(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry of ``results`` with ``_lo``/``_hi`` for intervals and a column a share, count and baseline.

    The bins of the calibration become a list a column, as ``acceptance_by_depth`` is one.
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_ci"):
            flat |= _ends(name.removesuffix("_ci"), value)
        elif name == "speedups":
            for baseline, estimate in value.items():
                flat[f"speedup_vs_{baseline}"] = estimate["value"]
                flat |= _ends(f"speedup_vs_{baseline}", estimate["ci"])
        elif name == "diagnostics":
            flat |= _flat_diagnostics(value or dict.fromkeys(METRICS))
        elif isinstance(value, Mapping):
            flat |= {f"{name}_{part}": number for part, number in value.items()}
        else:
            flat[name] = value
    return flat


def _flat_diagnostics(found: Mapping[str, Any]) -> dict[str, Any]:
    flat = {f"diagnostics_{name}": value for name, value in found.items() if name != "calibration"}
    for name in ("confidence", "accepted", "count"):
        bins = found["calibration"]
        flat[f"diagnostics_calibration_{name}"] = bins and [entry[name] for entry in bins]
    return flat


def _add_mode(summary: Summary, records: pd.DataFrame, steps: pd.DataFrame, bootstrap: dict[str, int]) -> None:
    """Append the baselines, the detectable effect and the results of one mode and temperature."""
    context = {"mode": _only(records, "mode"), "temperature": float(records["temperature"].iloc[0])}
    baselines = dict(list(records[records["kind"] == "baseline"].groupby("method", sort=False)))
    throughput = {name: metrics.tokens_per_s(rows) for name, rows in baselines.items()}
    for name, value in throughput.items():
        lossless = metrics.lossless_counts(baselines[name])
        summary["baselines"].append({"name": name, **context, "tokens_per_s": value, "lossless": lossless})
    summary["minimum_detectable_effect"].append(context | checks.detectable(records, steps))
    timed = {name: value for name, value in throughput.items() if value is not None}
    fastest = max(timed, key=lambda name: timed[name]) if timed else None
    turns = {name: metrics.by_turn(rows) for name, rows in baselines.items()}
    for method in records.loc[records["kind"] == "drafter", "method"].unique():
        whole = _Part.of_drafter(*metrics.select(records, steps, method=method), turns)
        identity = {"drafter": method, "objective": _only(whole.records, "objective"), **context}
        summary["results"].append(
            identity | {"category": None} | _result(whole, fastest, bootstrap) | _domains(whole, fastest, bootstrap)
        )
        for category, part in whole.by_category():
            summary["results"].append(identity | {"category": category} | _result(part, fastest, bootstrap))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What a drafter did in one mode, or the part of it that is one category; what is by prompt is made but once.

    Attributes:
        records: Its rows.
        steps: Their steps.
        by_prompt: ``metrics.emitted_and_steps`` of them.
        log_ratios: Against each baseline, by prompt.
        categories: By prompt.
    """

    records: pd.DataFrame
    steps: pd.DataFrame
    by_prompt: pd.DataFrame
    log_ratios: Mapping[Any, pd.Series[float]]
    categories: pd.Series[str]

    @classmethod
    def of_drafter(cls, records: pd.DataFrame, steps: pd.DataFrame, baselines: Mapping[Any, pd.DataFrame]) -> _Part:
        """Return all of a drafter; ``baselines`` are ``metrics.by_turn`` of each."""
        ours = metrics.by_turn(records)
        return cls(
            records=records,
            steps=steps,
            by_prompt=metrics.emitted_and_steps(records, steps),
            log_ratios={name: stats.log_ratios_of_turns(ours, turns) for name, turns in baselines.items()},
            categories=records.drop_duplicates("unit").set_index("unit")["category"],
        )

    def by_category(self) -> Iterator[tuple[str, _Part]]:
        """Yield each category, sorted, with the part that belongs to its prompts."""
        by_prompt = _split(self.by_prompt, self.categories)
        log_ratios = {name: _split(ratios, self.categories) for name, ratios in self.log_ratios.items()}
        for category in sorted(self.categories.unique()):
            records, steps = metrics.select(self.records, self.steps, category=category)
            yield (
                category,
                _Part(
                    records=records,
                    steps=steps,
                    by_prompt=by_prompt.get(category, self.by_prompt.iloc[:0]),
                    log_ratios={n: log_ratios[n].get(category, all_.iloc[:0]) for n, all_ in self.log_ratios.items()},
                    categories=self.categories[self.categories == category],
                ),
            )


def _split(by_prompt: Any, categories: pd.Series[str]) -> dict[str, Any]:  # noqa: ANN401 - a frame or a series
    """Return what is by prompt, by category."""
    return dict(list(by_prompt.groupby(categories.reindex(by_prompt.index))))


def _result(part: _Part, fastest: object, bootstrap: dict[str, int]) -> dict[str, Any]:
    """Return one entry of ``results``."""
    records, steps = part.records, part.steps
    tau = stats.pooled_tau(part.by_prompt, **bootstrap)
    speedups = {name: _json(stats.speedup(ratios, **bootstrap)) for name, ratios in part.log_ratios.items()}
    headline = speedups.get(fastest, {"value": None, "ci": None})
    return {
        "num_prompts": int(records["unit"].nunique()),
        "tau": tau.value,
        "tau_ci": stats.as_list(tau.ci),
        "speedup": headline["value"],
        "speedup_ci": headline["ci"],
        "speedup_baseline": fastest,
        "speedups": speedups,
        "domain_speedup": None,
        "domain_speedup_ci": None,
        "domain_speedup_bootstrap_ci": None,
        "tokens_per_s": metrics.tokens_per_s(records),
        "acceptance_by_depth": metrics.acceptance_by_depth(steps),
        "time_share": metrics.time_share(records, steps),
        "lossless": metrics.lossless_counts(records),
        "tau_definitions": metrics.tau_definitions(records, steps, part.by_prompt),
        "diagnostics": misalignment(records["diagnostics"]),
    }


def _domains(part: _Part, fastest: object, bootstrap: dict[str, int]) -> dict[str, Any]:
    """Return the entries of a result that take categories for a sample of domains; none for a single category."""
    if fastest is None or part.categories.nunique() < 2:
        return {}
    ratios = part.log_ratios[fastest]
    by_t = stats.category_interval(ratios, part.categories).map(math.exp)
    resampled = stats.two_level_bootstrap(ratios, part.categories, **bootstrap).map(math.exp)
    return {
        "domain_speedup": by_t.value,
        "domain_speedup_ci": stats.as_list(by_t.ci),
        "domain_speedup_bootstrap_ci": stats.as_list(resampled.ci),
    }


def _only(frame: pd.DataFrame, column: str) -> str | None:
    values = frame[column].unique().tolist()
    if len(values) != 1:
        raise ConfigError(f"A summary needs records of one {column}, got {values}; summarise each run by itself.")
    return None if pd.isna(values[0]) else str(values[0])


def _json(estimate: stats.Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci": stats.as_list(estimate.ci)}


def _ends(name: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval if interval is not None else (None, None)
    return {f"{name}_lo": low, f"{name}_hi": high}
