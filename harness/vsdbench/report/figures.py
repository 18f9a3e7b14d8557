"""The summary as figures: vector (SVG, text as paths) and raster (PNG), the same bytes each time from the same numbers.

Colours are Okabe and Ito's (distinct under colour blindness); hatches, markers and dashes tell the methods apart in
grey. Nothing touches matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
_METADATA: dict[str, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_SMALL_TYPE = {
    "font.size": 7.0, "axes.labelsize": 7.0, "axes.titlesize": 7.0, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "legend.title_fontsize": 6.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5, "hatch.linewidth": 0.4,
    "axes.labelpad": 3.0, "xtick.major.pad": 2.5, "ytick.major.pad": 2.5,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The size of a figure, in inches, and what that does to its type.

    Attributes:
        width_in: Of figures with panels.
        height_in: With one row in the legend.
        bars_in: Least and most width of bars, which need as much as there are of them.
        letter_in: Mean width of a letter in the legend.
        rc: rcParams beside those of ``style``.
    """

    width_in: float = 6.5
    height_in: float = 3.2
    bars_in: tuple[float, float] = (3.4, 12.0)
    letter_in: float = 0.075
    rc: dict[str, Any] = field(default_factory=dict)


SCREEN = Layout()
COLUMN = Layout(width_in=3.3, height_in=2.15, bars_in=(3.3, 3.3), letter_in=0.052, rc=_SMALL_TYPE)
PAGE = Layout(width_in=6.9, height_in=2.2, bars_in=(6.9, 6.9), letter_in=0.052, rc=_SMALL_TYPE)


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
def styled(layout: Layout = SCREEN) -> Iterator[None]:
    """Hold matplotlib's parameters at ``style()`` and what the layout adds."""
    rc: Any = style() | layout.rc  # matplotlib types the keys one by one
    with rc_context(rc):
        yield


def write_figures(summary: Summary, directory: Path) -> list[Path]:
    """Write every figure that the summary has numbers for, as SVG and PNG, and return their paths.

    ``speedup`` (method x mode), ``speedup_by_category_<mode>`` where there are several categories (with the
    temperature where a mode has several), ``acceptance_by_depth``, and ``batches_<mode>`` where there are batches.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with styled():
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
        for mode, temperature in _modes(summary.get("batches", [])):
            stem = f"batches_{mode}" + (f"_t{temperature:g}" if mode == "stochastic" else "")
            written += save(batch_figure(summary, mode=mode, temperature=temperature), directory / stem)
    return written


def save(figure: Figure, stem: Path, kinds: Sequence[str] = ("svg", "png"), layout: Layout = SCREEN) -> list[Path]:
    """Write ``stem.svg`` and so on without dates or versions in them, and return the paths.

    Args:
        figure: Made under the same layout.
        stem: Path without a suffix.
        kinds: Of ``svg``, ``png`` and ``pdf``.
        layout: Some parameters, such as the width of hatches, are read only now.
    """
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    with styled(layout):
        for path, kind in zip(paths, kinds, strict=True):
            figure.savefig(path, format=kind, dpi=DPI, metadata=_METADATA[kind])
    return paths


def freeze(figure: Figure, layout: Layout) -> None:
    """Lay a figure out once and for all, so that it is not done anew (twice) for every format."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with styled(layout):
            engine.execute(figure)
        figure.set_layout_engine("none")


def speedup_figure(summary: Summary, layout: Layout = SCREEN) -> Figure:
    """Return bars of the headline speedup, a group a mode, a bar a method, with intervals and a line at 1."""
    rows = [row for row in summary["results"] if row["category"] is None]
    groups = [(mode_label(*mode), mode) for mode in _modes(rows)]
    return _bars(summary, rows, groups, key=("mode", "temperature"), layout=layout)


def category_figure(summary: Summary, *, mode: str, temperature: float, layout: Layout = SCREEN) -> Figure:
    """Return bars of the headline speedup of one mode, a group a category (all prompts first), a bar a method."""
    rows = [row for row in summary["results"] if (row["mode"], row["temperature"]) == (mode, temperature)]
    categories = list(dict.fromkeys(row["category"] for row in rows))
    groups = [("all" if category is None else category, (category,)) for category in categories]
    return _bars(summary, rows, groups, key=("category",), title=mode_label(mode, temperature), layout=layout)


def acceptance_figure(summary: Summary, layout: Layout = SCREEN) -> Figure:
    """Return the acceptance rate at each depth of the draft, a line a method, a panel a mode."""
    rows = [row for row in summary["results"] if row["category"] is None and row["acceptance_by_depth"]]
    modes, styles = _modes(rows), looks(summary)
    width_in = layout.width_in if layout.rc else layout.width_in * min(1.0, 0.3 + 0.35 * len(modes))
    with styled(layout):
        figure = empty(width_in, list(dict.fromkeys(row["drafter"] for row in rows)), layout)
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
                    linewidth=1.4 if layout is SCREEN else 1.0, markersize=5 if layout is SCREEN else 4,
                    markeredgecolor="white", markeredgewidth=0.5, clip_on=False,
                )  # fmt: skip
            deepest = max(len(row["acceptance_by_depth"]) for row in rows)
            axes.set(title=mode_label(*mode), xlabel="depth in the draft", xticks=range(1, deepest + 1))
            axes.set(xlim=(0.7, deepest + 0.3), ylim=(0, 1))
            axes.grid(axis="y", color="0.9", linewidth=0.6)
        panels[0].set_ylabel("kept / reached")
        legend(figure, panels, layout)
    return figure


def batch_figure(summary: Summary, *, mode: str, temperature: float, layout: Layout = SCREEN) -> Figure:
    """Return throughput and speedup against the batch size, a panel each, a line a method."""
    rows = [row for row in summary["batches"] if (row["mode"], row["temperature"]) == (mode, temperature)]
    plain = {"color": "0.25", "marker": "o", "dashes": (0, (4, 2))}
    sizes = sorted({row["batch_size"] for row in rows})
    names = list(dict.fromkeys(row["drafter"] for row in rows))
    wide = layout is SCREEN
    with styled(layout):
        figure = empty(layout.width_in, names, layout)
        panels = figure.subplots(1, 2)
        for axes, measure in zip(panels, ("tokens_per_s", "speedup"), strict=True):
            for name in names:
                look = looks(summary).get(name, plain)
                points = [row for row in rows if row["drafter"] == name and row[measure] is not None]
                if not points:
                    continue
                values = [row[measure] for row in points]
                axes.plot(
                    [row["batch_size"] for row in points], values, color=look["color"], marker=look["marker"],
                    linestyle=look["dashes"], label=name, linewidth=1.4 if wide else 1.0, markersize=5 if wide else 4,
                    markeredgecolor="white", markeredgewidth=0.5,
                )  # fmt: skip
                for row, value in zip(points, values, strict=True):
                    if measure == "speedup" and row["speedup_ci"]:
                        ends = [[max(0.0, value - row["speedup_ci"][0])], [max(0.0, row["speedup_ci"][1] - value)]]
                        axes.errorbar(
                            row["batch_size"], value, yerr=ends, color=look["color"], elinewidth=0.8, capsize=2
                        )
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            axes.minorticks_off()
            axes.set_xlabel("batch size")
            axes.grid(axis="y", color="0.9", linewidth=0.6)
            axes.set_ylim(bottom=0)
        panels[1].axhline(1.0, color="0.25", linewidth=0.9, linestyle=(0, (4, 2)))
        panels[0].set(ylabel="tokens/s", title=mode_label(mode, temperature))
        panels[1].set(ylabel="speedup at this batch size")
        legend(figure, panels, layout)
    return figure


def _bars(
    summary: Summary,
    rows: Sequence[dict[str, Any]],
    groups: Sequence[tuple[str, tuple[Any, ...]]],
    *,
    key: tuple[str, ...],
    title: str = "",
    layout: Layout = SCREEN,
) -> Figure:
    """Return grouped bars; ``groups`` are (label, values of ``key``)."""
    styles = looks(summary)
    drafters = [name for name in styles if any(row["drafter"] == name for row in rows)]
    width = min(0.35, 0.8 / len(drafters))
    found = {(row["drafter"], *(row[name] for name in key)): row for row in rows}
    least, most = layout.bars_in
    width_in = min(most, max(least, 1.6 + 0.42 * len(groups) * len(drafters)))
    group_in = (width_in - 0.8) / len(groups)
    upright = group_in * width > 4 * layout.letter_in  # else four digits are wider than their bar
    with styled(layout):
        figure = empty(width_in, drafters, layout)
        axes = figure.subplots()
        for index, drafter in enumerate(drafters):
            for position, (_, values) in enumerate(groups):
                row = found.get((drafter, *values))
                if row is not None and row["speedup"] is not None:
                    x = position + (index - (len(drafters) - 1) / 2) * width
                    _bar(axes, x, 0.9 * width, row, styles[drafter], upright=upright)
        axes.axhline(1.0, color="0.25", linewidth=0.9, linestyle=(0, (4, 2)), zorder=3.5)
        crowded = max(len(label) for label, _ in groups) * layout.letter_in > group_in
        slant: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(groups)), [label for label, _ in groups], **slant)
        axes.set(ylabel=_speedup_label(rows), title=title, xlim=(-0.55, len(groups) - 0.45))
        axes.set_ylim(0, max(axes.dataLim.y1, 1.0) * (1.12 if upright else 1.25))  # room for the numbers
        axes.tick_params(axis="x", length=0)
        legend(figure, [axes], layout)
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


def empty(width_in: float, labels: Sequence[str], layout: Layout) -> Figure:
    """Return an empty figure, taller by what a legend of several rows needs."""
    rows = math.ceil(len(labels) / _legend_columns(width_in, labels, layout)) if labels else 1
    height_in = layout.height_in + 2.7 * layout.letter_in * (rows - 1)
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend(figure: Figure, panels: Sequence[Axes], layout: Layout) -> None:
    """Put one legend above the panels, an entry a method, in rows that fit the width."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()), list(entries), loc="outside upper center",
        ncols=_legend_columns(figure.get_figwidth(), list(entries), layout),
        frameon=False, handlelength=2.6, columnspacing=1.4,
    )  # fmt: skip


def _legend_columns(width_in: float, labels: Sequence[str], layout: Layout) -> int:
    longest = max(len(label) for label in labels)
    return min(len(labels), max(1, int(width_in / ((8 + longest) * layout.letter_in))))


def looks(summary: Summary) -> dict[str, dict[str, Any]]:
    """Return colour, hatch, marker and dashes by drafter, the same in every figure of the summary."""
    names = list(dict.fromkeys(row["drafter"] for row in summary["results"]))
    found: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        turn = index // len(OKABE_ITO)  # a ninth method has a first's colour, but neither its hatch nor its marker
        other = (index + turn) % len(HATCHES)
        found[name] = {
            "color": OKABE_ITO[index % len(OKABE_ITO)],
            "hatch": HATCHES[other],
            "marker": MARKERS[other],
            "dashes": DASHES[other],
        }
    return found


def _modes(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((row["mode"], row["temperature"]) for row in rows))


def mode_label(mode: str, temperature: float) -> str:
    """Return how a mode is called in titles.

    >>> mode_label("greedy", 0.0)
    'greedy (T = 0)'
    """
    return "greedy (T = 0)" if mode == "greedy" else f"{mode} (T = {temperature:g})"


def _speedup_label(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["speedup_baseline"] for row in rows if row["speedup_baseline"]))
    return f"speedup vs {names[0]}" if len(names) == 1 else "speedup vs the faster baseline"
