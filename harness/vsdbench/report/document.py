"""What a report says, in order: the sections of one run, an ablation or several runs, each only if it has content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vsdbench.ablation.contest import is_contest
from vsdbench.report import about, checks, costs, effects, examples, results
from vsdbench.report.facts import Mode, Run
from vsdbench.report.model import Document, Section, Table, fixed, listed, named, spelled
from vsdbench.report.sources import REFERENCES


def build(runs: Sequence[Run], *, title: str | None, files: str) -> Document:
    """Return the report of one run or of several.

    Args:
        runs: At least one, read by ``load_run``; several have labels.
        title: Of the document; made from the runs if None.
        files: Folder of tables and figures, as the text names it.
    """
    found = [
        about.setup(runs),
        effects.comparison(runs),
        *effects.ablation(runs),
        results.main_results(runs) if _is_contest(runs) else None,
        costs.acceptance(runs),
        costs.budget(runs),
        costs.chosen_trees(runs),
        costs.pareto(runs),
        costs.time_shares(runs),
        costs.batches(runs),
        examples.accepted_spans(runs),
        checks.other_pictures(runs),
        checks.losslessness(runs),
        checks.misalignment(runs),
        about.training(runs),
        about.published(runs),
        costs.definitions(runs) if _is_contest(runs) else None,
        checks.limitations(runs),
        about.reproduction(runs, files),
    ]
    return Document(
        title=title or _title(runs),
        subtitle=_subtitle(runs),
        summary=_summary(runs),
        sections=tuple(section for section in found if section is not None),
        appendix=_appendix(runs),
        extra_tables=_extra_tables(runs),
        references=REFERENCES,
        timestamp=max(int(run.date.timestamp()) for run in runs),
    )


def _is_contest(runs: Sequence[Run]) -> bool:
    """Return whether the table of single drafters belongs in the text (an ablation has one of its arms instead)."""
    return any(run.analysis is None for run in runs)


def _appendix(runs: Sequence[Run]) -> Section | None:
    tables = [costs.acceptance_table(runs), costs.time_table(runs)]
    if len(runs) == 1 and runs[0].categories:
        tables.append(results.category_table(runs[0], "speedup"))
    known = tuple(table for table in tables if table is not None)
    return Section("Numbers of the figures", known, inline=True) if known else None


def _extra_tables(runs: Sequence[Run]) -> tuple[Table, ...]:
    tables: list[Table] = []
    if not _is_contest(runs):
        tables += [results.main_table(runs), about.drafters_table(runs), costs.definitions_table(runs)]
    elif any(run.analysis for run in runs):
        tables.append(about.drafters_table(runs))
    return tuple(tables)


def _title(runs: Sequence[Run]) -> str:
    suites = listed(list(dict.fromkeys(run.suite for run in runs)))
    if len(runs) > 1:
        return f"{spelled(len(runs)).capitalize()} runs of speculative decoding compared: {suites}"
    if runs[0].analysis is not None:
        return f"{_question(runs[0].analysis)} (suite {suites})"
    return f"Speculative decoding measured on {suites}"


def _question(analysis: Mapping[str, Any]) -> str:
    parts = f"which parts of {analysis['reference']} help"
    if not is_contest(analysis["arms"]):
        return f"{parts[0].upper()}{parts[1:]}? An ablation"
    has_parts = any(arm["disabled"] for arm in analysis["arms"])
    number = spelled(sum(not arm["control"] for arm in analysis["arms"])).capitalize()
    return f"Which objective makes decoding faster{f', and {parts}' if has_parts else ''}? {number} arms compared"


def _subtitle(runs: Sequence[Run]) -> str:
    targets = listed(list(dict.fromkeys(str(run.summary["target"]) for run in runs)))
    where = list(dict.fromkeys(f"{run.summary['device'] or ''} {run.summary['dtype']}".strip() for run in runs))
    dates = sorted({f"{run.date:%Y-%m-%d}" for run in runs if run.date.year > 1970})
    spans = f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else "".join(dates)
    runs_named = listed([f"{run.label} = {named(run.name)}" if run.label else named(run.name) for run in runs])
    return " · ".join(filter(None, [targets, listed(where), spans, f"run{'s' if len(runs) > 1 else ''} {runs_named}"]))


def _summary(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the result in plain words: the headline with its interval, what it rests on, whether to trust it."""
    paragraphs = [text for run in runs if run.analysis is not None for text in _of_ablation(run)]
    paragraphs += [" ".join(_headline(run, mode) for mode in run.modes) for run in runs if run.analysis is None]
    starts = {run.label: f"In run {run.label}, " if run.label else "" for run in runs}
    trust = [f"{checks.lossless_words(run)} {checks.control_words(run, starts[run.label])}".strip() for run in runs]
    return tuple(text for text in [*paragraphs, *trust] if text.strip())


def _of_ablation(run: Run) -> list[str]:
    analysis = run.analysis or {}
    reference = next(arm for arm in analysis["arms"] if arm["name"] == analysis["reference"])
    num_seeds = len(reference["seeds"])
    of_seeds = f"{num_seeds} training seeds" if num_seeds > 1 else "one training seed"
    interval = _interval(reference.get("tau_ci"))
    start = (
        f"{named(analysis['reference'])} reaches τ = {fixed(reference['tau'], 2)}{interval} over {of_seeds} and "
        f"{run.summary['num_prompts']} prompts."
    )
    return [" ".join([start, *effects.findings(analysis)])]


def _headline(run: Run, mode: Mode) -> str:
    """Return the fastest drafter of a mode: how fast, against what, at which tau, and how sure that it is that."""
    mine = [row for row in run.in_mode(mode) if row["drafter"] not in run.misled]
    rows = [row for row in mine if row["speedup"] is not None]
    how = "With greedy decoding (T = 0)" if mode[0] == "greedy" else f"At T = {mode[1]:g}"
    where = f"In run {run.label}, {how[0].lower()}{how[1:]}" if run.label else how
    if not rows:
        known = [row for row in mine if row["tau"] is not None]
        if not known:
            return ""
        best = max(known, key=lambda row: float(row["tau"]))
        return (
            f"{where}, {named(best['drafter'])} has the largest τ, "
            f"{fixed(best['tau'], 2)}{_interval(best['tau_ci'])}; no "
            "baseline was measured beside it."
        )
    best = max(rows, key=lambda row: float(row["speedup"]))
    speed = run.throughput(best["speedup_baseline"], mode)
    count = f"the fastest of {len(rows)} drafters" if len(rows) > 1 else "the only drafter"
    others = [
        f"{fixed(estimate['value'], 2)} times as fast as {named(name)}"
        for name, estimate in best["speedups"].items()
        if name != best["speedup_baseline"] and estimate["value"] is not None
    ]
    beside = f" ({', '.join(others)})" if others else ""
    return " ".join(filter(None, [
        f"{where}, {count}, {named(best['drafter'])}, decodes {fixed(best['speedup'], 2)} times as fast"
        f"{_interval(best['speedup_ci'], '95 % interval ')} as the faster baseline, "
        f"{named(best['speedup_baseline'])} at "
        f"{fixed(speed or 0.0, 1)} tokens/s{beside}, with τ = {fixed(best['tau'], 2)}{_interval(best['tau_ci'])}.",
        results.verdict(run, mode),
    ]))  # fmt: skip


def _interval(ends: Sequence[float] | None, what: str = "") -> str:
    return "" if ends is None else f" ({what}{fixed(ends[0], 2)} to {fixed(ends[1], 2)})"
