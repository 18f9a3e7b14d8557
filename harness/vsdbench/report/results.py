"""The parts of a report that say what came out: tables and figures of accepted length, speed and time."""

from __future__ import annotations

from collections.abc import Sequence

from vsdbench.report.facts import Mode, Row, Run, merged
from vsdbench.report.figures import PAGE, category_figure, speedup_figure
from vsdbench.report.model import (
    MISSING,
    Block,
    Cell,
    Picture,
    Section,
    Table,
    estimate,
    fixed,
    listed,
    named,
    number,
    words,
)  # fmt: skip

_MAX_DRAFTERS = 14
"""Drafters that one figure can show; with more, the table is all there is."""


# --- main ----------------------------------------------------------------------------------------------------------


def main_results(runs: Sequence[Run]) -> Section:
    """Return the main table, and speed by category where the suite has several."""
    blocks: list[Block] = [_reading(runs), main_table(runs)]
    single = runs[0] if len(runs) == 1 else None
    if single is not None and single.categories and single.view["results"]:
        blocks += _by_category(single)
    elif len(_drafters(runs)) <= _MAX_DRAFTERS and any(r["speedup"] is not None for r in merged(runs)["results"]):
        blocks.append(
            Picture(
                name="speedup",
                title="Speedup against the faster baseline",
                note="With 95 % intervals over prompts; the dashed line is plain decoding.",
                alt="Bars of the speedup of every drafter in every mode.",
                figure=speedup_figure(merged(runs), PAGE),
                wide=True,
            )
        )
    return Section("Results", tuple(blocks))


def main_table(runs: Sequence[Run]) -> Table:
    """Return one row a drafter x temperature: tau, the speedup against each baseline, throughput."""
    names = list(dict.fromkeys(b["name"] for run in runs for b in run.summary["baselines"]))
    rows: list[tuple[Cell, ...]] = []
    rules: list[int] = []
    for run in runs:
        for mode in run.modes:
            rules += [len(rows)] if rows else []
            rows += [_main_row(run, mode, row, names) for row in run.in_mode(mode)]
    several = len(runs) > 1
    identity = ("drafter", *(("run", "suite") if several else ()), "T")
    speedups = tuple(f"speedup vs {name}" for name in names)
    return Table(
        name="main",
        title="Accepted length and speed" + ("" if several else f", suite {named(runs[0].suite)}"),
        columns=(*identity, "τ", *speedups, "tokens/s"),
        rows=tuple(rows),
        note="Brackets: 95 % intervals over prompts. Bold: the best of its temperature, where the interval of its "
        "paired difference from the second best excludes 0; without bold the two are not told apart.",
        num_left=len(identity) - 1,
        rules=tuple(rules),
        wide=True,
    )


def _main_row(run: Run, mode: Mode, row: Row, baselines: Sequence[str]) -> tuple[Cell, ...]:
    best = {
        measure: leader.best == row["drafter"] and leader.certain
        for (of, measure), leader in run.leaders.items()
        if of == mode
    }
    speedups = [row["speedups"].get(name, {"value": None, "ci": None}) for name in baselines]
    return (
        words(row["drafter"]),
        *((words(run.label), words(run.suite)) if run.label else ()),
        words(f"{row['temperature']:g}"),
        estimate(row["tau"], row["tau_ci"], strong=best.get("tau", False)),
        *(estimate(s["value"], s["ci"], strong=best.get("speedup", False)) for s in speedups),
        number(row["tokens_per_s"], 1),
    )


def _reading(runs: Sequence[Run]) -> str:
    """Return the text beside the main table: how fast the baselines are, and which differences are real."""
    parts = []
    for run in runs:
        where = f"In run {run.label}, p" if run.label else "P"
        for mode in run.modes:
            speeds = [(b["tokens_per_s"], b["name"]) for b in run.summary["baselines"]
                      if (b["mode"], b["temperature"]) == mode and b["tokens_per_s"]]  # fmt: skip
            if speeds:
                said = listed([f"{fixed(speed, 1)} tokens/s as {named(name)}" for speed, name in sorted(speeds)[::-1]])
                parts.append(f"{where}lain decoding at T = {mode[1]:g} runs at {said}.")
        several = len({b["name"] for b in run.summary["baselines"]}) > 1
    faster = " The speedup that counts is the one over the faster of the two." if several else ""
    return f"[[table:main]] has all drafters. {' '.join(parts)}{faster} {' '.join(_verdicts(runs))}".strip()


def _verdicts(runs: Sequence[Run]) -> list[str]:
    return [text for run in runs for mode in run.modes if (text := verdict(run, mode, "tau")) is not None]


def verdict(run: Run, mode: Mode, measure: str = "speedup") -> str | None:
    """Return in words how the best drafter of a mode, by speed or by tau, compares with the second best."""
    leader = run.leaders.get((mode, measure))
    if leader is None or leader.ahead.change_pct is None:
        return None
    where = f" in run {run.label}" if run.label else ""
    ahead = leader.ahead
    change_text = f"{fixed(leader.ahead.change_pct, 1)} %"
    interval = (
        "" if ahead.ci_pct is None else f" (95 % interval {fixed(ahead.ci_pct[0], 1)} to {fixed(ahead.ci_pct[1], 1)})"
    )
    said = "whose interval excludes 0" if leader.certain else f"that {ahead.num_prompts} prompts do not establish"
    return (
        f"At T = {mode[1]:g}{where} {named(leader.best)} "
        + (
            f"is {change_text}{interval} faster than the next, {named(leader.second)}"
            if measure == "speedup"
            else f"has the largest τ, {change_text}{interval} above the next, {named(leader.second)}"
        )
        + f", a difference {said}."
    )


def _by_category(run: Run) -> list[Block]:
    """Return a figure of speed by category of the first mode, and a table of tau by category."""
    blocks: list[Block] = []
    drafters = _drafters([run])
    measured = any(row["speedup"] is not None for row in run.view["results"])
    for mode in run.modes if measured and len(drafters) <= _MAX_DRAFTERS else ():
        label = mode[0] if mode[0] == "greedy" else f"{mode[0]}-t{mode[1]:g}".replace(".", "-")
        blocks.append(
            Picture(
                name=f"speedup-by-category-{label}",
                title=f"Speedup by category, T = {mode[1]:g}",
                note="Against the faster baseline, 95 % intervals over prompts; the dashed line is plain decoding.",
                alt="Bars of the speedup of every drafter, grouped by category of prompts, all prompts first.",
                figure=category_figure(run.summary, mode=mode[0], temperature=mode[1], layout=PAGE),
                wide=True,
            )
        )
    counts = run.frames[0].drop_duplicates("unit")["category"].value_counts()
    sizes = sorted({int(n) for n in counts})
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    text = (
        f"A category has only {size} prompts, so its interval is wide; "
        f"{'[[figure:' + blocks[0].name + ']] and ' if blocks and isinstance(blocks[0], Picture) else ''}"
        "[[table:tau-by-category]] show where drafting pays, not which drafter wins there."
    )
    domains = domain_table(run)
    if domains.rows:
        text += (
            " [[table:domains]] asks another question: how fast would a drafter be on domains that the suite does not "
            "have, if its categories are a fair sample of them."
        )
        return [text, *blocks, category_table(run, "tau"), domains]
    return [text, *blocks, category_table(run, "tau")]


def domain_table(run: Run) -> Table:
    """Return one row a drafter x temperature: the speedup with categories taken for a sample of domains."""
    rows = [row for row in run.rows if row["domain_speedup"] is not None]
    return Table(
        name="domains",
        title="Speedup on new domains",
        columns=("drafter", "T", "speedup, t", "speedup, bootstrap"),
        rows=tuple(
            (
                words(row["drafter"]),
                words(f"{row['temperature']:g}"),
                estimate(row["domain_speedup"], row["domain_speedup_ci"]),
                estimate(row["domain_speedup"], row["domain_speedup_bootstrap_ci"]),
            )
            for row in rows
        ),
        note=f"Against the faster baseline: the geometric mean of {len(run.categories)} categories' own means. "
        "Brackets: 95 % intervals, by Student's t over categories and by resampling them and prompts within them, "
        "widened for few categories.",
    )


def category_table(run: Run, measure: str) -> Table:
    """Return one row a category x temperature, a column a drafter; the CSV has the intervals.

    Args:
        run: With several categories.
        measure: ``tau`` or ``speedup``.
    """
    drafters = list(dict.fromkeys(row["drafter"] for row in run.view["results"]))
    found = {(r["temperature"], r["category"], r["drafter"]): r for r in run.summary["results"]}
    rows: list[tuple[Cell, ...]] = []
    rules: list[int] = []
    for mode in run.modes:
        rules += [len(rows)] if rows else []
        for category in (*run.categories, None):
            cells = [found.get((mode[1], category, name)) for name in drafters]
            values = [
                Cell(text=MISSING) if row is None or row[measure] is None else _without_ends(row, measure)
                for row in cells
            ]
            rows.append((words(category or "all"), words(f"{mode[1]:g}"), *values))
    many = sum(len(name) + 2 for name in drafters) > 46
    return Table(
        name=f"{measure}-by-category",
        title=f"{'Accepted length (τ)' if measure == 'tau' else 'Speedup against the faster baseline'} by category",
        columns=("category", "T", *drafters),
        rows=tuple(rows),
        note="Intervals are in the CSV file.",
        rules=tuple(rules),
        wide=many,
    )


def _without_ends(row: Row, measure: str) -> Cell:
    ci = row[f"{measure}_ci"]
    return Cell(text=fixed(row[measure], 2), number=row[measure], interval=None if ci is None else (ci[0], ci[1]))


def _drafters(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(row["drafter"] for row in merged(runs)["results"]))
