"""The summary as figures: vector (SVG, text as paths) and raster (PNG), the same bytes each time from the same numbers.

Colours are Okabe and Ito's (distinct under colour blindness); hatches, markers and dashes tell the methods apart in
grey. Nothing touches matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vsdbench.bench.summary import Summary

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "|||", "---", "+++")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
DPI = 200
_WIDTH_IN, _HEIGHT_IN = 6.5, 3.2


def style() -> dict[str, Any]:
    """Return the rcParams of every figure; fonts are those that come with matplotlib, so that machines agree."""
    return {
        **sns.plotting_context("paper"),
        **sns.axes_style("ticks"),
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 0.6,
        "svg.fonttype": "path",
        "svg.hashsalt": "vsdbench",
        "figure.dpi": DPI,
    }


@contextmanager
def _styled() -> Iterator[None]:
    """Hold matplotlib's parameters at ``style()``."""
    rc: Any = style()  # matplotlib types the keys one by one
    with rc_context(rc):
        yield


def write_figures(summary: Summary, directory: Path) -> list[Path]:
    """Write every figure that the summary has numbers for, as SVG and PNG, and return their paths.

    ``speedup`` (method x mode), ``speedup_by_category_<mode>`` where there are several categories (with the
    temperature where a mode has several), ``acceptance_by_depth``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with _styled():
        overall = [row for row in summary["results"] if row["category"] is None]
        if any(row["speedup"] is not None for row in overall):
            written += save(speedup_figure(summary), directory / "speedup")
        for mode, temperature in _modes(overall):
            rows = [row for row in summary["results"] if (row["mode"], row["temperature"]) == (mode, temperature)]
            if len({row["category"] for row in rows}) > 2 and any(row["speedup"] is not None for row in rows):
                stem = f"speedup_by_category_{mode}" + (f"_t{temperature:g}" if mode == "stochastic" else "")
                written += save(category_figure(summary, mode=mode, temperature=temperature), directory / stem)
        if any(row["acceptance_by_depth"] for row in overall):
            written += save(acceptance_figure(summary), directory / "acceptance_by_depth")
    return written


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.svg`` and ``stem.png`` without dates or versions in them, and return both paths."""
    svg, png = stem.with_name(stem.name + ".svg"), stem.with_name(stem.name + ".png")
    with _styled():
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return [svg, png]


def speedup_figure(summary: Summary) -> Figure:
    """Return bars of the headline speedup, a group a mode, a bar a method, with intervals and a line at 1."""
    rows = [row for row in summary["results"] if row["category"] is None]
    return _bars(summary, rows, [(_mode_label(*mode), mode) for mode in _modes(rows)], key=("mode", "temperature"))


def category_figure(summary: Summary, *, mode: str, temperature: float) -> Figure:
    """Return bars of the headline speedup of one mode, a group a category (all prompts first), a bar a method."""
    rows = [row for row in summary["results"] if (row["mode"], row["temperature"]) == (mode, temperature)]
    categories = list(dict.fromkeys(row["category"] for row in rows))
    groups = [("all" if category is None else category, (category,)) for category in categories]
    return _bars(summary, rows, groups, key=("category",), title=_mode_label(mode, temperature))


def acceptance_figure(summary: Summary) -> Figure:
    """Return the acceptance rate at each depth of the draft, a line a method, a panel a mode."""
    rows = [row for row in summary["results"] if row["category"] is None and row["acceptance_by_depth"]]
    modes, styles = _modes(rows), _styles(summary)
    with _styled():
        figure = _figure(
            _WIDTH_IN * min(1.0, 0.3 + 0.35 * len(modes)), list(dict.fromkeys(row["drafter"] for row in rows))
        )
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            for row in rows:
                if (row["mode"], row["temperature"]) != mode:
                    continue
                look = styles[row["drafter"]]
                points = [(d, a) for d, a in enumerate(row["acceptance_by_depth"], start=1) if a is not None]
                axes.plot(
                    *zip(*points, strict=True),
                    color=look["color"], marker=look["marker"], linestyle=look["dashes"], label=row["drafter"],
                    linewidth=1.4, markersize=5, markeredgecolor="white", markeredgewidth=0.5, clip_on=False,
                )  # fmt: skip
            deepest = max(len(row["acceptance_by_depth"]) for row in rows)
            axes.set(title=_mode_label(*mode), xlabel="depth in the draft", xticks=range(1, deepest + 1))
            axes.set(xlim=(0.7, deepest + 0.3), ylim=(0, 1))
            axes.grid(axis="y", color="0.9", linewidth=0.6)
        panels[0].set_ylabel("kept / reached")
        _legend(figure, panels)
    return figure


def _bars(
    summary: Summary,
    rows: Sequence[dict[str, Any]],
    groups: Sequence[tuple[str, tuple[Any, ...]]],
    *,
    key: tuple[str, ...],
    title: str = "",
) -> Figure:
    """Return grouped bars; ``groups`` are (label, values of ``key``)."""
    styles = _styles(summary)
    drafters = [name for name in styles if any(row["drafter"] == name for row in rows)]
    width = min(0.35, 0.8 / len(drafters))
    found = {(row["drafter"], *(row[name] for name in key)): row for row in rows}
    width_in = min(12.0, max(3.4, 1.6 + 0.42 * len(groups) * len(drafters)))
    group_in = (width_in - 0.8) / len(groups)
    upright = group_in * width > 0.3  # else four digits are wider than their bar
    with _styled():
        figure = _figure(width_in, drafters)
        axes = figure.subplots()
        for index, drafter in enumerate(drafters):
            for position, (_, values) in enumerate(groups):
                row = found.get((drafter, *values))
                if row is not None and row["speedup"] is not None:
                    x = position + (index - (len(drafters) - 1) / 2) * width
                    _bar(axes, x, 0.9 * width, row, styles[drafter], upright=upright)
        axes.axhline(1.0, color="0.25", linewidth=0.9, linestyle=(0, (4, 2)), zorder=3.5)
        crowded = max(len(label) for label, _ in groups) * 0.075 > group_in
        slant: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(groups)), [label for label, _ in groups], **slant)
        axes.set(ylabel=_speedup_label(rows), title=title, xlim=(-0.55, len(groups) - 0.45))
        axes.set_ylim(0, max(axes.dataLim.y1, 1.0) * (1.12 if upright else 1.25))  # room for the numbers
        axes.tick_params(axis="x", length=0)
        _legend(figure, [axes])
    return figure


def _bar(axes: Axes, x: float, width: float, row: dict[str, Any], look: dict[str, Any], *, upright: bool) -> None:
    value = row["speedup"]
    low, high = row["speedup_ci"] or (value, value)
    axes.bar(
        x, value, width, color=look["color"], hatch=look["hatch"], edgecolor="white", linewidth=0,
        label=row["drafter"], zorder=2,
    )  # fmt: skip
    axes.bar(x, value, width, facecolor="none", edgecolor="0.15", linewidth=0.7, zorder=3)
    if row["speedup_ci"] is not None:
        interval = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar(x, value, yerr=interval, color="0.1", elinewidth=1.0, capsize=2.5, capthick=1.0, zorder=4)
    axes.annotate(
        f"{value:.2f}", (x, max(high, value)), xytext=(0, 2.5), textcoords="offset points", ha="center", va="bottom",
        fontsize="x-small", rotation=0 if upright else 90, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


def _figure(width_in: float, labels: Sequence[str]) -> Figure:
    """Return an empty figure, taller by what a legend of several rows needs."""
    rows = math.ceil(len(labels) / _legend_columns(width_in, labels))
    figure = Figure(figsize=(width_in, _HEIGHT_IN + 0.2 * (rows - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend above the panels, an entry a method, in rows that fit the width."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()), list(entries), loc="outside upper center",
        ncols=_legend_columns(figure.get_figwidth(), list(entries)),
        frameon=False, handlelength=2.6, columnspacing=1.4,
    )  # fmt: skip


def _legend_columns(width_in: float, labels: Sequence[str]) -> int:
    longest = max(len(label) for label in labels)
    return min(len(labels), max(1, int(width_in / (0.6 + 0.075 * longest))))


def _styles(summary: Summary) -> dict[str, dict[str, Any]]:
    """Return colour, hatch, marker and dashes by drafter, the same in every figure of the summary."""
    names = list(dict.fromkeys(row["drafter"] for row in summary["results"]))
    looks: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        turn = index // len(OKABE_ITO)  # a ninth method has a first's colour, but neither its hatch nor its marker
        other = (index + turn) % len(HATCHES)
        looks[name] = {
            "color": OKABE_ITO[index % len(OKABE_ITO)],
            "hatch": HATCHES[other],
            "marker": MARKERS[other],
            "dashes": DASHES[other],
        }
    return looks


def _modes(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((row["mode"], row["temperature"]) for row in rows))


def _mode_label(mode: str, temperature: float) -> str:
    return "greedy (T = 0)" if mode == "greedy" else f"{mode} (T = {temperature:g})"


def _speedup_label(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["speedup_baseline"] for row in rows if row["speedup_baseline"]))
    return f"speedup vs {names[0]}" if len(names) == 1 else "speedup vs the faster baseline"
