"""Cells of the reference reports as they are printed: rounded from the CSV, in every format alike, bold or not."""

from __future__ import annotations

import csv
import re

import pytest
from tests.report.recompute import adjusted, lead
from tests.report.recorded import (
    ABLATIONS,
    CONTESTS,
    ROOT,
    RUNS,
    baselines,
    headers,
    number,
    printed_rows,
    tables,
)

every_report = pytest.mark.parametrize("name", RUNS)
SHARES = ("greedy pruned, %", "accepted is greedy, %")
"""Columns whose CSV has shares; those of two tables are shares altogether."""
NUMBER = re.compile("[\N{MINUS SIGN}+]?\\d[\\d.\u202f]*")


# --- every format --------------------------------------------------------------------------------------------------


def text_of(name, file):
    return (ROOT / "reports/reference" / name / "tables" / file).read_text(encoding="utf-8")


def markdown_rows(name, key):
    """The columns' names and the rows, a cell being its text, both ends of its interval, and whether it is bold."""
    lines = [line[2:-2].split(" | ") for line in text_of(name, f"{key}.md").splitlines() if line.startswith("|")]
    columns, _, *rows = [[re.sub(r"\\(.)", r"\1", cell) for cell in line] for line in lines]
    whole = re.compile(r"(\*\*)?(.*?)(?:\*\*)?(?: \((\S+) to (\S+)\))?")
    found = [[whole.fullmatch(cell).groups(default="") for cell in row] for row in rows]
    return columns, [[(text, low, high, bold) for bold, text, low, high in row] for row in found]


def latex_numbers(name, key):
    """Of every row those of its cells."""
    body = text_of(name, f"{key}.tex").partition("\\midrule\n")[2].partition("\\bottomrule")[0]
    plain = body.replace("$-$", "\N{MINUS SIGN}").replace("\\,", "\u202f")
    return [[NUMBER.findall(cell) for cell in line.split(" & ")] for line in plain.splitlines() if line != "\\midrule"]


@every_report
def test_every_printed_cell_is_its_number_rounded(name):
    for key in tables(name):
        header, *lines = csv.reader(text_of(name, f"{key}.csv").splitlines())
        columns, rows = markdown_rows(name, key)
        assert columns == [c for c in header if c.removesuffix(" low") == c.removesuffix(" high")]
        for row, line in zip(rows, lines, strict=True):
            told = dict(zip(header, line, strict=True))
            for column, (cell, low, high, _) in zip(columns, row, strict=True):
                assert cell
                share = key in {"acceptance", "time"} or column in SHARES
                for printed, suffix in ((cell, ""), (low, " low"), (high, " high")):
                    assert rounds(told.get(column + suffix, ""), printed, scale=100 if share else 1), (key, row)


def rounds(value, printed, *, scale):
    if printed in {value, ""}:
        return True
    if printed == "<0.001":
        return float(value) < 0.001
    printed = printed.removesuffix(" %")
    digits = len(printed.partition(".")[2])
    return abs(scale * float(value) - number(printed)) <= 0.5 * 10**-digits + 1e-8


@every_report
def test_the_pages_and_both_other_formats_have_the_same_cells(name):
    assert printed_rows(name).keys() >= {"setup", "lossless", "published"}
    for key in tables(name):
        columns, rows = markdown_rows(name, key)
        if key in printed_rows(name):
            assert headers(name)[key] == columns
            assert [[(*cell[:3], bool(cell[3])) for cell in row] for row in printed_rows(name)[key]] == [
                [(*cell[:3], bool(cell[3])) for cell in row] for row in rows
            ]
        numbers = [[NUMBER.findall(" ".join(cell[:3])) for cell in row] for row in rows]
        assert latex_numbers(name, key) == numbers


# --- bold ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTESTS)
def test_bold_is_the_best_where_it_is_told_apart(name):
    for row in printed_rows(name)["main"]:
        drafter, temperature = row[0][0], float(row[1][0])
        leads = {measure: lead(name, temperature, measure) for measure in ("tau", "speed")}
        best = {measure: found[0] == drafter and found[2].certain for measure, found in leads.items()}
        bold = [bool(cell[3]) for cell in row[2:]]
        assert bold == [best["tau"], *[best["speed"]] * len(baselines(name)), False]


@pytest.mark.parametrize("name", ABLATIONS)
def test_bold_is_the_arm_whose_adjusted_p_is_below_5_percent(name):
    for row in printed_rows(name)["ablation"]:
        arm, temperature = row[0][0], float(row[2][0])
        sure = [adjusted(name, temperature, measure).get(arm, 1) < 0.05 for measure in ("tau", "speed")]
        bold = [bool(cell[3]) for cell in row]
        assert bold == [False] * 5 + [sure[0], False, sure[1], False] + [False] * 3
