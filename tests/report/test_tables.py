"""Tables say what the summary says, at any width, and no width breaks a number in two."""

import io
import itertools

import pytest
from rich.console import Console

from vsdbench.bench.summary import summarise
from vsdbench.report.tables import MISSING, baseline_rows, diagnostic_rows, print_summary, table_rows


@pytest.fixture(scope="module")
def summary(make_run):
    records = make_run(modes=("greedy", "stochastic"), drafters=("ngram", "eagle3-kl", "eagle3-vsd-no-car"))
    return summarise(records, manifest={"device": "cpu"}, num_resamples=300)


def render(summary, width, **options):
    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None)
    print_summary(summary, console, **options)
    return console.file.getvalue()


def overall(summary):
    return [row for row in summary["results"] if row["category"] is None]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("categories", [False, True])
def test_every_number_is_whole_at_every_width(summary, width, categories):
    text = render(summary, width, categories=categories)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text.replace("1·2·…", "")
    lines = text.splitlines()
    for row in summary["results"] if categories else overall(summary):
        name = f"{row['drafter']} "
        low, high = row["tau_ci"]
        value, interval = f"{row['tau']:.2f}", (f"[{low:.2f}, {high:.2f}]", f"{low:.2f}\N{EN DASH}{high:.2f}")
        assert any(
            line.startswith(name) and value in line and any(i in line + below for i in interval)
            for line, below in itertools.pairwise(lines)
        )
        accepted = "·".join(f"{100 * share:.0f}" for share in row["acceptance_by_depth"])
        assert any(line.startswith(name) and accepted in line for line in lines)
        for estimate in row["speedups"].values():
            assert any(line.startswith(name) and f" {estimate['value']:.2f}" in line for line in lines)


def test_a_wide_console_has_one_line_a_row(summary):
    lines = render(summary, 140).splitlines()
    for row in overall(summary):
        cells = (
            f"{row['speedup']:.2f} [{row['speedup_ci'][0]:.2f}, {row['speedup_ci'][1]:.2f}]",
            f"{row['tau']:.2f} [",
        )
        assert sum(line.startswith(row["drafter"]) and all(c in line for c in cells) for line in lines) == 1


def test_baselines_and_definitions_are_shown(summary):
    text = render(summary, 100)
    for baseline in summary["baselines"]:
        rate = baseline["tokens_per_s"]
        assert f"{baseline['name']}" in text
        assert (f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}") in text
    flat = " ".join(text.split())
    for said in (
        "bonus included",
        "prefill excluded",
        "95 % BCa over prompts, widened for few prompts",
        "kept / reached",
        "12 prompts x 2 repeats",
        "Student's t intervals that together hold 1 in 99 % of quiet runs",
        "Smallest difference between trained drafters that these 12 prompts show",
    ):
        assert said in flat
    controls = [row["A/A"].inline() for row in baseline_rows(summary)]
    assert controls == [f"{c['value']:.2f} [{c['ci'][0]:.2f}, {c['ci'][1]:.2f}]" for c in summary["controls"]]


def test_the_headline_alone_is_strong(summary):
    for row in table_rows(summary):
        assert [name for name, cell in row.items() if cell.strong] == ["speedup vs hf-generate"]


@pytest.mark.parametrize("width", [62, 80])
def test_long_names_fold_and_leave_the_numbers_whole(summary, width):
    name = "eagle3-with-a-name-that-is-longer-than-anything-one-would-like"
    long = summary | {"results": [row | {"drafter": name} for row in overall(summary)]}
    text = render(long, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert any(
        line.split() == ["drafter", "T", "τ", "tokens/s", "autoregressive", "hf-generate"] for line in text.splitlines()
    )
    for row in overall(summary):
        assert f"{row['tau_ci'][0]:.2f}\N{EN DASH}{row['tau_ci'][1]:.2f}" in text


def test_violations_stand_out_and_the_unchecked_say_so(summary):
    first, second = overall(summary)[:2]
    counts = {"checked": 24, "equal": 21, "near_tie": 2, "violations": 1}
    none = dict.fromkeys(counts, 0)
    rows = table_rows(summary | {"results": [first | {"lossless": counts}, second | {"lossless": none}]})
    cells = [row["lossless =·≈·≠"] for row in rows]
    assert [(cell.value, cell.alarm) for cell in cells] == [("21·2·1", True), ("unchecked", False)]


def test_missing_values_are_dashes(make_record):
    records = [make_record(num_output_tokens=1, decode_s=0.0)]
    summary = summarise(records)
    (row,) = table_rows(summary)
    assert {name: cell.inline() for name, cell in row.items()} == {
        "drafter": "ngram",
        "T": "0",
        "τ": MISSING,
        "accepted by depth, %": MISSING,
        "draft·verify·other, %": MISSING,
        "tokens/s": MISSING,
        "lossless =·≈·≠": "1·0·0",
    }
    assert "ngram" in render(summary, 80)


def test_a_run_of_baselines_alone_says_so(make_run):
    summary = summarise([r for r in make_run() if r.kind == "baseline"], num_resamples=100)
    assert "No drafter was measured" in render(summary, 80)


def test_names_are_not_read_as_markup(summary):
    odd = summary | {"results": [row | {"drafter": "[red]x|y[/red]"} for row in overall(summary)[:1]]}
    assert "[red]x|y[/red]" in render(odd, 140)


EMPTY = [0] * 8
COUNTS = {
    "num_steps": 8, "num_pruned": 1, "num_kept_steps": 4, "num_greedy_steps": 3, "greedy_tokens": 6, "tree_tokens": 10,
    "kept_by_rank": [7, 2, 0, 1],
    "calibration": {
        "count": [4, *EMPTY, 16], "sum_confidence": [0.1, *EMPTY, 15.0], "kept": [0, *EMPTY, 10], "brier_sum": 2.5
    },
}  # fmt: skip
LOOKUP = COUNTS | {"num_pruned": None, "calibration": None}


@pytest.fixture
def diagnosed(make_record):
    steps = [(4, 4, 4, 5, 1, 1, 0), (4, 4, 4, 5, 1, 1, 0), (4, 4, 1, 2, 1, 1, 0), (4, 4, 1, 2, 1, 1, 0)]
    steps += [(4, 4, 0, 1, 1, 1, 0)] * 4
    return summarise(
        [
            make_record(steps=steps, method="eagle3-vsd-hour-without-car", diagnostics=COUNTS),
            make_record(steps=steps, method="ngram", diagnostics=LOOKUP),
            make_record(steps=steps, method="older"),
        ]
    )


def test_diagnostics_are_shown_where_asked_for(diagnosed):
    text = render(diagnosed, 80, diagnostics=True)
    assert max(len(line) for line in text.splitlines()) <= 80
    extra = text.removeprefix(render(diagnosed, 80))
    assert extra != text
    shown = [line.split()[1:] for line in extra.splitlines() if line.startswith(("eagle3", "ngram", "older"))]
    assert shown == [
        ["0", "12", "75", "0.75", "1.25", "0.125", "4"],
        ["0", MISSING, "75", "0.75", "1.25", MISSING, "4"],
    ]
    assert "Greedy path: the drafter's likeliest child" in " ".join(extra.split())


def test_a_run_without_diagnostics_says_so(summary):
    assert diagnostic_rows(summary) == []
    assert "This run has no diagnostics" in render(summary, 100, diagnostics=True)
