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
    adjusted,
    against_reference,
    faster_baseline,
    mean_log_ratio,
    shown,
    speedup_interval,
    tau,
    tau_interval,
    tokens_per_s,
)
from tests.report.recorded import (
    ABLATIONS,
    CONTESTS,
    ROOT,
    RUNS,
    categories,
    changed_arms,
    chosen,
    control_arms,
    diagnosed,
    drafters,
    figures,
    number,
    table,
    temperatures,
    titles,
    trees,
)

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
every_report = pytest.mark.parametrize("name", RUNS)
contests = pytest.mark.parametrize("name", CONTESTS)
TICK = r'<use [^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>.*?<!-- (\S+) -->'
MARK = re.compile(r'<use xlink:href="#(\w+)" x="([\d.]+)" y="([\d.]+)" style="(?:fill: (#\w+); )?stroke: (#\w+)')
CAP = re.compile(r'<path id="(\w+)" d="M \S+ \S+ \s*L \S+ \S+\s*"')
"""The end of an interval is a line."""


def svg(name, figure):
    return (ROOT / "reports/reference" / name / "figures" / f"{figure}.svg").read_text(encoding="utf-8")


def labels(name, figure):
    return Counter(re.findall("<!-- (.*?) -->", svg(name, figure)))


def panels(name, figure):
    """By panel: marks as (x, y) by fill and edge, ends of intervals by "end" and colour.

    x or y is None where an axis has names for ticks.
    """
    caps = set(CAP.findall(svg(name, figure)))
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
        for shape, x, y, fill, edge in MARK.findall(panel):
            place = [None if scales[a] is None else np.polyval(scales[a], float(v)) for a, v in (("x", x), ("y", y))]
            known = "end" if shape in caps else fill or "#000000"  # black is what a fill is unless it is said
            found[known, edge].append(place)
        yield found


def by_colour(names):
    """The drafters of each colour: from the ninth on colours come again, with other markers."""
    return {colour: names[index :: len(COLOURS)] for index, colour in enumerate(COLOURS[: len(names)])}


def near(expected):
    return pytest.approx(np.array(expected, dtype=float), rel=1e-4, abs=1e-4)


def mode_of(temperature):
    """The name that a figure of one temperature ends with."""
    return "greedy" if temperature == 0 else f"stochastic-t{temperature:g}".replace(".", "-")


# --- contests and ablation -----------------------------------------------------------------------------------------


@every_report
def test_accepted_length_against_cost(name):
    for temperature, marks in zip(temperatures(name), panels(name, "pareto"), strict=True):
        plain = tokens_per_s(chosen(name, faster_baseline(name, temperature), temperature))
        for colour, members in by_colour(shown(name)).items():
            of = [chosen(name, drafter, temperature) for drafter in members]
            points = [[tau(answers) * plain / tokens_per_s(answers), tau(answers)] for answers in of]
            assert np.array(marks[colour, "#ffffff"]) == near(points)
            ends = [[cost, end] for (cost, _), a in zip(points, of, strict=True) for end in tau_interval(a)]
            assert np.array(marks["end", colour]) == near(ends)


@every_report
def test_acceptance_by_depth(name):
    rates = {(row["drafter"], float(row["T"])): row for row in table(name, "acceptance")}
    for temperature, marks in zip(temperatures(name), panels(name, "acceptance"), strict=True):
        for colour, members in by_colour(shown(name)).items():
            points = []
            for drafter in members:
                row = [rate for column, rate in rates[drafter, temperature].items() if column.startswith("depth")]
                points += [[depth, float(rate)] for depth, rate in enumerate(row, start=1) if rate != "\N{EN DASH}"]
            assert np.array(marks[colour, "#ffffff"]) == near(points)


@pytest.mark.parametrize("name", tuple(filter(diagnosed, RUNS)))
def test_calibration(name):
    [marks] = panels(name, "calibration")
    of = {drafter: chosen(name, drafter, temperatures(name)[0]) for drafter in shown(name)}
    calibrated = [drafter for drafter in shown(name) if of[drafter][0]["diagnostics"]["calibration"]]
    assert calibrated
    for colour, members in by_colour(shown(name)).items():
        points = []
        for drafter in filter(calibrated.__contains__, members):
            bins = [a["diagnostics"]["calibration"] for a in of[drafter]]
            sums = (sum(np.array(b[key]) for b in bins) for key in ("count", "sum_confidence", "kept"))
            count, confidence, kept = sums
            known = count >= 10
            points += (np.stack([confidence, kept], axis=1)[known] / count[known, None]).tolist()
        assert np.array(marks.get((colour, "#ffffff"), [])) == near(points)


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


@contests
def test_speedup_by_category(name):
    for temperature in temperatures(name):
        rows = [row for row in table(name, "speedup-by-category") if float(row["T"]) == temperature]
        wanted = Counter(f"{float(row[drafter]):.2f}" for row in rows for drafter in drafters(name))
        figure = f"speedup-by-category-{mode_of(temperature)}"
        ticks = Counter(re.findall(r'<g id="ytick_\d+">.*?<!-- (\S+) -->', svg(name, figure), flags=re.DOTALL))
        numbers = {text: n for text, n in labels(name, figure).items() if re.fullmatch(r"\d+(\.\d+)?", text)}
        assert numbers == wanted + ticks
        [marks] = panels(name, figure)
        groups = ["all", *sorted(set(categories(name).values()))]
        ends = [[row[f"{d} low"], row[f"{d} high"]] for d in drafters(name) for c in groups for row in rows
                if row["category"] == c]  # fmt: skip
        assert np.array([y for _, y in marks["end", "#1a1a1a"]]) == near(np.ravel(ends).astype(float))


@contests
def test_tree_budget(name):
    """One drafter with trees of several sizes, where a run has that."""
    assert ("budget" in figures(name)) == bool(trees(name))
    of_tau, of_speed = panels(name, "budget") if trees(name) else ({}, {})
    plain = chosen(name, faster_baseline(name, temperatures(name)[0]), temperatures(name)[0])
    for members in trees(name).values():
        sizes = [size for size, _ in members]
        of = [chosen(name, drafter, temperatures(name)[0]) for _, drafter in members]
        colour = COLOURS[drafters(name).index(members[0][1])]
        values = [[tau(a) for a in of], [np.exp(mean_log_ratio(a, plain)) for a in of]]
        intervals = [[tau_interval(a) for a in of], [speedup_interval(a, plain) for a in of]]
        for marks, value, ends in zip((of_tau, of_speed), values, intervals, strict=True):
            assert np.array(marks[colour, "#ffffff"]) == near(list(zip(sizes, value, strict=True)))
            both = [[size, end[side]] for side in (0, 1) for size, end in zip(sizes, ends, strict=True)]
            assert np.array(marks["end", colour]) == near(both)


# --- ablation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLATIONS)
def test_forest(name):
    """An arm is filled where its adjusted p is below 0.05."""
    for index, temperature in enumerate(temperatures(name)):
        figure = f"forest-{index + 1}" if index else "forest"
        for marks, measure in zip(panels(name, figure), ("tau", "speed"), strict=True):
            for group, colour in ((changed_arms(name), COLOURS[0]), (control_arms(name), COLOURS[7])):
                of = {arm: against_reference(name, arm, temperature, measure) for arm in group}
                sure = [arm for arm in group if adjusted(name, temperature, measure)[arm] < 0.05]
                for fill, drawn in ((colour, sure), ("#ffffff", [arm for arm in group if arm not in sure])):
                    assert np.array([x for x, _ in marks[fill, colour]]) == near([of[arm].change_pct for arm in drawn])
                ends = np.ravel([of[arm].ci_pct for arm in group])
                assert np.array([x for x, _ in marks["end", colour]]) == near(ends)


@every_report
def test_no_figure_is_left_out(name):
    """Every figure with numbers is read back above."""
    expected = {"acceptance", "pareto", "time"} | ({"calibration"} if diagnosed(name) else set())
    if name in ABLATIONS:
        expected |= {"forest", *(f"forest-{index + 1}" for index in range(1, len(temperatures(name))))}
    else:
        expected |= {f"speedup-by-category-{mode_of(temperature)}" for temperature in temperatures(name)}
        expected |= {"budget"} if trees(name) else set()
    assert figures(name) == expected


@every_report
def test_titles_name_their_temperature(name):
    of = "forest" if name in ABLATIONS else "speedup-by-category"
    drawn = [title for figure, title in titles(name).items() if figure.startswith(of)]
    assert [re.findall(r"T = ([\d.]+)", title) for title in drawn] == [[f"{t:g}"] for t in temperatures(name)]
