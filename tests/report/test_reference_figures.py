"""What the figures of the reference reports show, read back from the SVG files and recomputed from the records.

matplotlib names the text of every label in a comment, and ticks lie where their labels say, so two of them give the
scale of an axis; marks then tell the numbers that they were drawn for.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from tests.report.recompute import (
    ABLATION,
    CONTESTS,
    ROOT,
    RUNS,
    answers,
    by_seed,
    chosen,
    drafters,
    faster_baseline,
    mean_log_ratio,
    number,
    shown_arms,
    speed_difference,
    speedup_interval,
    table,
    tau,
    tau_difference,
    tau_interval,
    temperatures,
    tokens_per_s,
)

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
every_report = pytest.mark.parametrize("name", RUNS)
TICK = r'<use [^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>.*?<!-- (\S+) -->'
MARK = re.compile(r'<use [^>]* x="([\d.]+)" y="([\d.]+)" style="(?:fill: (#\w+); )?stroke: (#\w+)')


def svg(name, figure):
    return (ROOT / "reports/reference" / name / "figures" / f"{figure}.svg").read_text(encoding="utf-8")


def labels(name, figure):
    return Counter(re.findall("<!-- (.*?) -->", svg(name, figure)))


def panels(name, figure):
    """By panel: marks as (x, y) by fill and edge; x or y is None where an axis has names for ticks."""
    scales = {"x": None, "y": None}
    for panel in re.split(r'<g id="axes_\d+">', svg(name, figure).partition('<g id="legend_')[0])[1:]:
        ticks = defaultdict(list)
        for group in re.split(r'<g id="(?=[xy]tick_|matplotlib\.axis_)', panel)[1:]:
            match = re.search(TICK, group, flags=re.DOTALL)
            if match and group[0] in "xy" and re.fullmatch(r"[\N{MINUS SIGN}\d.]+", match[3]):
                ticks[group[0]].append((float(match["xy".index(group[0]) + 1]), number(match[3])))
        for axis, known in ticks.items():
            scales[axis] = np.polyfit(*zip(*known, strict=True), deg=1)
        found = defaultdict(list)
        for x, y, fill, edge in MARK.findall(panel):
            place = [None if scales[a] is None else np.polyval(scales[a], float(v)) for a, v in (("x", x), ("y", y))]
            found[fill or "#000000", edge].append(place)  # black is what a fill is unless it is said
        yield found


def near(expected):
    return pytest.approx(np.array(expected, dtype=float), rel=1e-4, abs=1e-4)


def shown(name):
    return drafters(name) if name in CONTESTS else shown_arms()


# --- contests and ablation -----------------------------------------------------------------------------------------


@every_report
def test_accepted_length_against_cost(name):
    for temperature, marks in zip(temperatures(name), panels(name, "pareto"), strict=True):
        plain = tokens_per_s(chosen(name, faster_baseline(name, temperature), temperature))
        for drafter, colour in zip(shown(name), COLOURS, strict=False):
            of = chosen(name, drafter, temperature)
            cost = tau(of) * plain / tokens_per_s(of)
            assert np.array(marks[colour, "#ffffff"]) == near([[cost, tau(of)]])
            assert np.array(marks[colour, colour]) == near([[cost, end] for end in tau_interval(of)])


@every_report
def test_acceptance_by_depth(name):
    rates = {(row["drafter"], float(row["T"])): row for row in table(name, "acceptance")}
    for temperature, marks in zip(temperatures(name), panels(name, "acceptance"), strict=True):
        for drafter, colour in zip(shown(name), COLOURS, strict=False):
            row = [rates[drafter, temperature][f"depth {depth}"] for depth in (1, 2, 3)]
            points = [[depth, float(rate)] for depth, rate in enumerate(row, start=1) if rate != "\N{EN DASH}"]
            assert np.array(marks[colour, "#ffffff"]) == near(points)


@pytest.mark.parametrize("name", ["mtbench-hour", ABLATION])
def test_calibration(name):
    [marks] = panels(name, "calibration")
    calibrated = [drafter for drafter in shown(name) if chosen(name, drafter, 0)[0]["diagnostics"]["calibration"]]
    for drafter in calibrated:
        bins = [a["diagnostics"]["calibration"] for a in chosen(name, drafter, 0)]
        count, confidence, kept = (sum(np.array(b[key]) for b in bins) for key in ("count", "sum_confidence", "kept"))
        points = np.stack([confidence, kept], axis=1)[count > 0] / count[count > 0, None]
        assert np.array(marks[COLOURS[shown(name).index(drafter)], "#ffffff"]) == near(points)


@every_report
def test_where_the_time_goes(name):
    wanted = Counter()
    for row in table(name, "time"):
        if row["drafter"] in shown(name):
            shares = [100 * float(row[part]) for part in ("drafter's share", "target's share", "everything else")]
            wanted += Counter(f"{share:.0f}" for share in shares if share >= 8)
    ticks = Counter(dict.fromkeys(("0", "50", "100"), len(temperatures(name))))
    numbers = {text: n for text, n in labels(name, "time").items() if text.isdigit()}
    assert numbers == wanted + ticks


# --- contests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTESTS)
def test_speedup_by_category(name):
    for temperature in temperatures(name):
        rows = [row for row in table(name, "speedup-by-category") if float(row["T"]) == temperature]
        wanted = Counter(f"{float(row[drafter]):.2f}" for row in rows for drafter in drafters(name))
        figure = "speedup-by-category-" + ("greedy" if temperature == 0 else f"stochastic-t{temperature:g}")
        ticks = Counter(re.findall(r'<g id="ytick_\d+">.*?<!-- (\S+) -->', svg(name, figure), flags=re.DOTALL))
        numbers = {text: n for text, n in labels(name, figure).items() if re.fullmatch(r"\d\.\d+", text)}
        assert numbers == wanted + ticks
        [marks] = panels(name, figure)
        groups = ["all", *sorted({a["category"] for a in answers(name)})]
        ends = [[row[f"{d} low"], row[f"{d} high"]] for d in drafters(name) for c in groups for row in rows
                if row["category"] == c]  # fmt: skip
        assert np.array([y for _, y in marks["#1a1a1a", "#1a1a1a"]]) == near(np.ravel(ends).astype(float))


def test_tree_budget():
    name = "mtbench-hour"
    sizes = {"eagle3-kl-hour-auto": 4, "eagle3-kl-hour": 7, "eagle3-kl-hour-wide": 11}
    colour = COLOURS[drafters(name).index("eagle3-kl-hour-auto")]
    plain = chosen(name, faster_baseline(name, 0), 0)
    of_tau, of_speed = panels(name, "budget")
    of = {size: chosen(name, drafter, 0) for drafter, size in sizes.items()}
    speedups = [[size, np.exp(mean_log_ratio(a, plain))] for size, a in of.items()]
    assert np.array(of_tau[colour, "#ffffff"]) == near([[size, tau(a)] for size, a in of.items()])
    assert np.array(of_speed[colour, "#ffffff"]) == near(speedups)
    for marks, interval in ((of_tau, tau_interval), (of_speed, lambda a: speedup_interval(a, plain))):
        ends = {size: interval(a) for size, a in of.items()}
        assert np.array(marks[colour, colour]) == near([[size, ends[size][end]] for end in (0, 1) for size in ends])


# --- ablation ------------------------------------------------------------------------------------------------------


def test_forest():
    arms = [row["arm"] for row in table(ABLATION, "ablation")][1:]
    control = ["continual-kl", "onpolicy-rkl", "warm-start"]
    for marks, difference in zip(panels(ABLATION, "forest"), (tau_difference, speed_difference), strict=True):
        for group, colour in ([[a for a in arms if a not in control], COLOURS[0]], [control, COLOURS[7]]):
            found = [difference(*by_seed(arm)) for arm in group]
            assert np.array([x for x, _ in marks["#ffffff", colour]]) == near([of.change_pct for of in found])
            assert np.array([x for x, _ in marks[colour, colour]]) == near(np.ravel([of.ci_pct for of in found]))
