"""The figures of a report that the terminal has no use for: cost against accepted length, budgets, time, differences.

Sizes are those of the printed page: one column, unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vsdbench.bench.paired import ALPHA
from vsdbench.bench.summary import Summary
from vsdbench.report.figures import COLUMN, OKABE_ITO, Layout, empty, legend, looks, mode_label, styled

_INTERVAL: dict[str, Any] = {"elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8, "zorder": 3}
_PARTS = (("draft", "#0072B2", ""), ("verify", "#BBBBBB", ""), ("other", "#000000", ""))
_EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5}
FEWEST_IN_A_BIN = 10
"""Draft tokens: a share of fewer says nothing of calibration."""
_HALF_A_LINE = 0.05
"""Share of a panel's height that half a line of small type takes."""
_PLACES = 5
"""Along a ray, where its name may stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One row of a forest plot: a change in per cent with its interval; ``certain`` fills the marker."""

    name: str
    value: float
    interval: Sequence[float] | None
    certain: bool
    control: bool = False


def step_cost(row: Mapping[str, Any], baseline_tokens_per_s: float) -> float | None:
    """Return what a draft-and-verify step costs in steps of plain decoding: tau / (pooled speedup)."""
    if not row["tokens_per_s"] or row["tau"] is None:
        return None
    return float(row["tau"] * baseline_tokens_per_s / row["tokens_per_s"])


def pareto_figure(summary: Summary) -> Figure:
    """Return tau over the cost of a step, a panel a mode; lines through the origin are lines of equal speedup.

    What no other drafter beats in both is joined by a line.
    """
    rows = [row for row in summary["results"] if row["category"] is None]
    styles = looks(summary)
    points = [(row, cost) for row in rows if (cost := _cost(summary, row)) is not None]
    modes = list(dict.fromkeys((row["mode"], row["temperature"]) for row, _ in points))
    with styled(COLUMN):
        figure = empty(COLUMN.width_in, list(dict.fromkeys(row["drafter"] for row, _ in points)), COLUMN)
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            chosen = [(row, cost) for row, cost in points if (row["mode"], row["temperature"]) == mode]
            for row, cost in chosen:
                look = styles[row["drafter"]]
                axes.errorbar(
                    cost, row["tau"], yerr=_arms(row["tau"], row["tau_ci"]), color=look["color"], marker=look["marker"],
                    linestyle="none", label=row["drafter"], markersize=5, **_EDGE, **_INTERVAL,
                )  # fmt: skip
            _frontier(axes, [(cost, row["tau"]) for row, cost in chosen])
            axes.set(title=mode_label(*mode), xlabel="cost of a step, in plain steps")
        ends = [row["tau_ci"] or [row["tau"], row["tau"]] for row, _ in points]
        lowest, highest = min(low for low, _ in ends), max(high for _, high in ends)
        cheapest, dearest = min(cost for _, cost in points), max(cost for _, cost in points)
        pad = max(0.05, 0.15 * (dearest - cheapest))
        for axes in panels:
            axes.set(xlim=(cheapest - pad, dearest + pad), ylim=(0.95 * lowest, 1.05 * highest))
        for axes, mode in zip(panels, modes, strict=True):
            bars = [(cost, *(row["tau_ci"] or [row["tau"]] * 2)) for row, cost in points
                    if (row["mode"], row["temperature"]) == mode]  # fmt: skip
            _equal_speedups(axes, bars, margin=0.07 * len(modes))
        panels[0].set_ylabel("τ, tokens per step")
        legend(figure, panels, COLUMN)
    return figure


def budget_figure(summary: Summary, groups: Mapping[str, Sequence[tuple[str, int]]]) -> Figure:
    """Return tau and speedup over the tree budget, a line a drafter, the first mode with all of a group.

    Args:
        summary: Of the run.
        groups: Name of a drafter to its (method, tree budget) pairs.
    """
    mode = (summary["results"][0]["mode"], summary["results"][0]["temperature"])
    rows = {
        r["drafter"]: r for r in summary["results"] if r["category"] is None and (r["mode"], r["temperature"]) == mode
    }
    styles = looks(summary)
    with styled(COLUMN):
        figure = empty(COLUMN.width_in, list(groups), COLUMN)
        panels = figure.subplots(1, 2)
        for name, members in groups.items():
            look = styles[members[0][0]]
            for axes, measure in zip(panels, ("tau", "speedup"), strict=True):
                known = [(budget, rows[method]) for method, budget in members if rows[method][measure] is not None]
                values = [row[measure] for _, row in known]
                errors = [_arms(row[measure], row[f"{measure}_ci"]) or [[0.0], [0.0]] for _, row in known]
                axes.errorbar(
                    [budget for budget, _ in known], values, yerr=np.concatenate([np.array(e) for e in errors], axis=1),
                    color=look["color"], marker=look["marker"], linestyle=look["dashes"], label=name, linewidth=1.0,
                    markersize=4.5, **_EDGE, **_INTERVAL,
                )  # fmt: skip
        budgets = sorted({budget for members in groups.values() for _, budget in members})
        for axes, label in zip(panels, ("τ, tokens per step", _speedup_name(rows)), strict=True):
            axes.set(xlabel="tree budget, draft tokens", ylabel=label, xticks=_apart(budgets))
            axes.margins(x=0.15)
            axes.grid(axis="y", color="0.9", linewidth=0.5)
        legend(figure, list(panels), COLUMN)
    return figure


def time_figure(summary: Summary) -> Figure:
    """Return where decode time goes, a bar a drafter, a panel a mode: the drafter, the target, everything else."""
    rows = [r for r in summary["results"] if r["category"] is None and r["time_share"]["draft"] is not None]
    modes = list(dict.fromkeys((row["mode"], row["temperature"]) for row in rows))
    names = list(dict.fromkeys(row["drafter"] for row in rows))
    with styled(COLUMN):
        figure = empty(COLUMN.width_in, [], COLUMN)
        figure.set_figheight(0.75 + 0.19 * len(names))
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            shares = {r["drafter"]: r["time_share"] for r in rows if (r["mode"], r["temperature"]) == mode}
            left = np.zeros(len(names))
            for part, colour, hatch in _PARTS:
                widths = np.array([100 * shares[name][part] if name in shares else 0.0 for name in names])
                axes.barh(
                    names, widths, left=left, height=0.66, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4,
                    label=_part_name(part),
                )  # fmt: skip
                for y, (start, width) in enumerate(zip(left, widths, strict=True)):
                    if width >= 8:
                        ink = "black" if part == "verify" else "white"
                        axes.text(start + width / 2, y, f"{width:.0f}", color=ink, ha="center", va="center", fontsize=6)
                left += widths
            axes.set(title=mode_label(*mode), xlabel="% of decode time", xlim=(0, 100), xticks=(0, 50, 100))
            axes.tick_params(axis="y", length=0)
        panels[0].invert_yaxis()
        legend(figure, panels, COLUMN)
    return figure


def forest_figure(panels: Mapping[str, Sequence[Effect]], *, layout: Layout = COLUMN, title: str = "") -> Figure:
    """Return changes in per cent with intervals around 0, a panel a measure, a row an arm (the same in every panel).

    Filled marks are certain; controls are squares and stand apart, below.

    Args:
        panels: Measure to its effects.
        layout: The size.
        title: Above all panels.
    """
    controls = {effect.name: effect.control for effects in panels.values() for effect in effects}
    places = _places(controls)
    lowest = max(places.values())
    with styled(layout):
        figure = empty(layout.width_in, [], layout)
        figure.set_figheight(layout.letter_in * (12.5 + 3.65 * (lowest + 1)))
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (measure, effects) in zip(drawn, panels.items(), strict=True):
            axes.axvline(0, color="0.35", linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            for effect in effects:
                colour = OKABE_ITO[7] if effect.control else OKABE_ITO[0]
                axes.errorbar(
                    effect.value, places[effect.name], xerr=_arms(effect.value, effect.interval),
                    fmt="s" if effect.control else "o", color=colour, markersize=80 * layout.letter_in,
                    markerfacecolor=colour if effect.certain else "white", markeredgecolor=colour, markeredgewidth=0.9,
                    **_INTERVAL,
                )  # fmt: skip
            axes.set(xlabel=f"change of {measure}, %", ylim=(lowest + 0.6, -0.6))
            axes.set_yticks(list(places.values()), list(places))
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", color="0.93", linewidth=0.5)
        if title:
            figure.suptitle(title, fontsize="medium")
    return figure


def arm_panels(entry: Mapping[str, Any], reference: str) -> dict[str, list[Effect]]:
    """Return the panels of an ablation's forest plot: every arm's change of tau and of speed from the reference.

    Args:
        entry: One of the ``modes`` that ``ablation.analysis.analyse`` gives.
        reference: Name of the reference arm, which is left out.

    Returns:
        Measures for which any arm has a change, those that have one.
    """
    panels = {
        label: [
            Effect(
                name=arm["name"],
                value=arm[f"delta_{measure}_pct"],
                interval=arm[f"delta_{measure}_ci"],
                certain=arm[f"p_{measure}_holm"] is not None and arm[f"p_{measure}_holm"] < ALPHA,
                control=arm["control"],
            )
            for arm in entry["arms"]
            if arm["name"] != reference and arm[f"delta_{measure}_pct"] is not None
        ]
        for label, measure in (("τ", "tau"), ("speed", "speedup"))
    }
    return {label: effects for label, effects in panels.items() if effects}


def calibration_figure(bins: Mapping[str, Sequence[Mapping[str, Any]]], summary: Summary) -> Figure:
    """Return the share of draft tokens kept over the drafter's confidence in them, a line a drafter."""
    styles = looks(summary)
    with styled(COLUMN):
        figure = empty(COLUMN.width_in, list(bins), COLUMN)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle=(0, (4, 2)))
        for name, entries in bins.items():
            look = styles[name]
            known = [(e["confidence"], e["accepted"]) for e in entries if e["count"] >= FEWEST_IN_A_BIN]
            if known:
                axes.plot(
                    *zip(*known, strict=True), color=look["color"], marker=look["marker"], linestyle=look["dashes"],
                    label=name, linewidth=1.0, markersize=4, **_EDGE,
                )  # fmt: skip
        axes.set(xlabel="draft confidence", ylabel="share kept", xlim=(0, 1), ylim=(0, 1))
        legend(figure, [axes], COLUMN)
    return figure


# --- parts ---------------------------------------------------------------------------------------------------------


def _apart(values: Sequence[int]) -> list[int]:
    """Return those of sorted ``values`` whose labels have room on an axis of half a column, the first among them.

    >>> _apart([7, 11, 14]), _apart([2, 3, 4, 7, 32, 60])
    ([7, 11, 14], [2, 32, 60])
    """
    chosen = list(values[:1])
    for value in values[1:]:
        if value - chosen[-1] >= 0.12 * (values[-1] - values[0]):
            chosen.append(value)
    return chosen


def _cost(summary: Summary, row: Mapping[str, Any]) -> float | None:
    name = row["speedup_baseline"]
    speeds = [b["tokens_per_s"] for b in row.get("baselines", summary["baselines"])
              if (b["name"], b["mode"], b["temperature"]) == (name, row["mode"], row["temperature"])]  # fmt: skip
    return step_cost(row, speeds[0]) if speeds and speeds[0] else None


def _arms(value: float, interval: Sequence[float] | None) -> list[list[float]] | None:
    """Return the two lengths of an error bar."""
    return None if interval is None else [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _places(controls: Mapping[str, bool]) -> dict[str, float]:
    """Return the height of each row of a forest plot, from the top, with a gap where controls begin."""
    places: dict[str, float] = {}
    gap, before = 0.0, False
    for index, (name, control) in enumerate(controls.items()):
        gap += 0.6 if index and control and not before else 0.0
        places[name] = index + gap
        before = control
    return places


def _frontier(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Join the points that none other beats in both cost and tau."""
    best = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    axes.plot(*zip(*sorted(best), strict=True), color="0.6", linewidth=0.8, zorder=1)


def _equal_speedups(axes: Axes, bars: Sequence[tuple[float, float, float]], *, margin: float) -> None:
    """Draw rays of equal speedup, each named inside the frame where it is farthest from all intervals.

    Args:
        axes: With its limits set.
        bars: Cost, lower and upper end of the interval of each point.
        margin: Share of the width that half a name takes.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    across, up = margin * (right - left), _HALF_A_LINE * (top - bottom)

    def room(x: float, y: float) -> float:
        return min(
            ((x - cost) / (right - left)) ** 2 + (max(low - y, 0.0, y - high) / (top - bottom)) ** 2
            for cost, low, high in bars
        )

    for speedup in (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0):
        start, end = max(left, bottom / speedup), min(right, top / speedup)
        if end - start < 0.1 * (right - left):
            continue
        axes.plot([start, end], [speedup * start, speedup * end], color="0.82", linewidth=0.7, zorder=0)
        ends = (min(right - across, (top - up) / speedup), max(left + across, (bottom + up) / speedup))
        if ends[0] < ends[1]:
            continue
        places = np.linspace(*ends, num=_PLACES).tolist()
        where = max(places, key=lambda x, ray=speedup: room(x, ray * x))  # type: ignore[misc]
        axes.text(
            where, speedup * where, f"{speedup:g}\N{MULTIPLICATION SIGN}", ha="center", va="center", fontsize=5.5,
            color="0.4", zorder=0.5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _speedup_name(rows: Mapping[str, Mapping[str, Any]]) -> str:
    names = {row["speedup_baseline"] for row in rows.values() if row["speedup_baseline"]}
    return f"speedup vs {names.pop()}" if len(names) == 1 else "speedup"


def _part_name(part: str) -> str:
    return {"draft": "drafter", "verify": "target", "other": "rest"}[part]
