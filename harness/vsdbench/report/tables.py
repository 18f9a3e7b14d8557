"""The summary as tables for the terminal, at any width.

A table is laid out in the widest form that fits: intervals beside their values, below them, or in two tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vsdbench.bench.checks import CONTROL_CONFIDENCE, detectable_line
from vsdbench.bench.image_controls import told
from vsdbench.bench.summary import Summary

MISSING = "\N{EN DASH}"
_NO_LIMIT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A value and, where it has one, its interval; ``strong`` marks the headline, ``alarm`` a violation."""

    value: str
    interval: tuple[str, str] | None = None
    strong: bool = False
    alarm: bool = False

    def inline(self) -> str:
        """Return ``1.52 [1.47, 1.58]``."""
        return self.value if self.interval is None else f"{self.value} [{self.interval[0]}, {self.interval[1]}]"

    def stacked(self) -> str:
        """Return the value with its interval on a second line."""
        return self.value if self.interval is None else f"{self.value}\n{self.interval[0]}\N{EN DASH}{self.interval[1]}"


def table_rows(summary: Summary, *, categories: bool = False) -> list[dict[str, Cell]]:
    """Return one row a drafter x mode (x category), the same columns in each.

    Args:
        summary: As ``summarise`` gives it.
        categories: Also the rows of single categories, under a ``category`` column.
    """
    names = list(dict.fromkeys(baseline["name"] for baseline in summary["baselines"]))
    rows = []
    for result in summary["results"]:
        if result["category"] is not None and not categories:
            continue
        row = {"drafter": Cell(value=result["drafter"]), "T": Cell(value=f"{result['temperature']:g}")}
        if categories:
            row["category"] = Cell(value=result["category"] or "all")
        row["τ"] = _estimate(result["tau"], result["tau_ci"])
        row["accepted by depth, %"] = Cell(value=_percentages(result["acceptance_by_depth"]))
        row["draft·verify·other, %"] = Cell(value=_percentages(list(result["time_share"].values())))
        row["tokens/s"] = Cell(value=_throughput(result["tokens_per_s"]))
        for name in names:
            estimate = result["speedups"].get(name, {"value": None, "ci": None})
            strong = name == result["speedup_baseline"]
            row[f"speedup vs {name}"] = _estimate(estimate["value"], estimate["ci"], strong=strong)
        row["lossless =·≈·≠"] = _lossless(result["lossless"])
        rows.append(row)
    return rows


def baseline_rows(summary: Summary) -> list[dict[str, Cell]]:
    """Return one row a baseline x mode: throughput, and repeat 1 against repeat 2 (A/A, its interval should hold 1)."""
    controls = {(c["name"], c["mode"], c["temperature"]): c for c in summary["controls"]}
    rows = []
    for baseline in summary["baselines"]:
        control = controls.get((baseline["name"], baseline["mode"], baseline["temperature"]))
        rows.append(
            {
                "baseline": Cell(value=baseline["name"]),
                "T": Cell(value=f"{baseline['temperature']:g}"),
                "tokens/s": Cell(value=_throughput(baseline["tokens_per_s"])),
                "A/A": _estimate(control["value"], control["ci"]) if control else Cell(value=MISSING),
            }
        )
    return rows


def diagnostic_rows(summary: Summary) -> list[dict[str, Cell]]:
    """Return one row a drafter x mode for which it was recorded how its preference and what was kept differ."""
    rows = []
    for result in summary["results"]:
        found = result.get("diagnostics")
        if result["category"] is not None or found is None:
            continue
        nodes = found["nodes_for_95"]
        rows.append(
            {
                "drafter": Cell(value=result["drafter"]),
                "T": Cell(value=f"{result['temperature']:g}"),
                "greedy pruned, %": Cell(value=_percentages([found["greedy_pruned_share"]])),
                "kept is greedy, %": Cell(value=_percentages([found["accepted_is_greedy_share"]])),
                "kept of greedy": _estimate(found["greedy_path_length"], None),
                "kept of tree": _estimate(found["tree_path_length"], None),
                "Brier score": Cell(value=MISSING if found["brier"] is None else f"{found['brier']:.3f}"),
                "nodes for 95 %": Cell(value=MISSING if nodes is None else str(nodes)),
            }
        )
    return rows


def batch_rows(summary: Summary) -> list[dict[str, Cell]]:
    """Return one row a method x mode x batch size, plain decoding first; none where answers came one at a time."""
    rows = []
    for row in summary.get("batches", []):
        waits, together = row["ms_per_token"], row["mean_sequences"]
        rows.append(
            {
                "drafter": Cell(value=row["drafter"]),
                "T": Cell(value=f"{row['temperature']:g}"),
                "batch": Cell(value=str(row["batch_size"])),
                "in a step": Cell(value=MISSING if together is None else f"{together:.1f}"),
                "τ": _estimate(row["tau"], None),
                "tokens/s": Cell(value=_throughput(row["tokens_per_s"])),
                "ms a token": Cell(value=MISSING if waits is None else f"{waits:.1f}"),
                "draft·verify·other, %": Cell(value=_percentages(list(row["time_share"].values()))),
                "speedup": _estimate(row["speedup"], row["speedup_ci"], strong=row["speedup"] is not None),
                "to the end": _estimate(row["speedup_to_end"], None),
                "lossless =·≈·≠": _lossless(row["lossless"]),
            }
        )
    return rows


def slower(summary: Summary) -> str:
    """Return which drafters are slower than plain decoding at which batch sizes, in a sentence; empty where none is."""
    found: dict[str, list[str]] = {}
    for row in summary.get("batches", []):
        if row["speedup"] is not None and row["speedup"] < 1:
            sure = row["speedup_ci"] is not None and row["speedup_ci"][1] < 1
            size = (
                f"{row['batch_size']}{'' if sure else ' (interval holds 1)' if row['speedup_ci'] else ' (no interval)'}"
            )
            found.setdefault(f"{row['drafter']} at T = {row['temperature']:g}", []).append(size)
    if not found:
        return ""
    said = "; ".join(f"{name}: {', '.join(sizes)}" for name, sizes in found.items())
    return f"Slower than plain decoding in batches of the same size: {said}."


_BATCHES = (
    "Batch: answers decoded at once, the next prompt taking the place of one that ends. Tokens/s: of all of them "
    "together while the batch is full, prefills apart. Ms a token: what one answer waits. Speedup: throughput "
    "over plain decoding at the same batch size, paired by group of prompts, geometric mean, Student's t over "
    "groups; to the end: with the ends of groups, where no prompt waits and the batch gets smaller; in a step: "
    "answers in one then, on average. Trees are the same at every batch size. Lossless: against plain decoding "
    "one answer at a time."
)


def print_batches(summary: Summary, console: Console) -> None:
    """Print throughput, waiting time and speedup by batch size, if there are any, and where drafting does not pay."""
    rows = batch_rows(summary)
    if not rows:
        return
    console.print()
    for table in _fitting(rows, console):
        console.print(table)
        console.print()
    if text := slower(summary):
        console.print(Text(text, style="bold"))
    console.print(Text(_BATCHES, style="dim"))


def title(summary: Summary) -> str:
    """Return what was measured on what, in one line."""
    parts = [summary["suite"], summary["target"], " ".join(filter(None, [summary["device"], summary["dtype"]]))]
    counts = ((summary["num_prompts"], "prompt"), (summary["num_repeats"], "repeat"))
    size = " x ".join(f"{count} {noun}{'s' if count != 1 else ''}" for count, noun in counts)
    return " · ".join([*parts, size, f"run {summary['run_id']}"])


def definitions(summary: Summary) -> str:
    """Return what the columns mean, for the foot of a table."""
    level = f"{100 * summary['confidence']:g} %"
    return (
        "τ: tokens emitted per verification step, bonus included, prefill excluded, pooled over steps. "
        "Accepted: kept / reached at depth 1·2·… of the draft. "
        "Speedup: decode time per token, paired by prompt, geometric mean; bold against the faster baseline. "
        f"Intervals: {level} BCa over prompts, widened for few prompts. "
        "Lossless: answers equal to the baseline's · near-tie · violation. "
        "A/A: a baseline's first repeat against its second; Student's t intervals that together hold 1 in "
        f"{100 * CONTROL_CONFIDENCE:g} % of quiet runs."
    )


_DIAGNOSTICS = (
    "Greedy path: the drafter's likeliest child at every node; pruned where the tree does not hold it down to the "
    "depth asked for. Kept is greedy: of the steps that kept something, those whose kept path is the greedy one or its "
    "beginning. Kept of: draft tokens per step. Brier score: of the drafter's confidence against being kept; 0 best. "
    "Nodes for 95 %: the smallest budget that holds 95 % of the kept nodes, most probable paths first."
)


def print_diagnostics(summary: Summary, console: Console) -> None:
    """Print where drafters and decoding part, one row a drafter x mode, and what the columns mean."""
    rows = diagnostic_rows(summary)
    console.print()
    if not rows:
        console.print(Text("This run has no diagnostics: it has no drafter of our engine, or is from before them."))
        return
    console.print(_table(rows, Cell.inline))
    console.print()
    console.print(Text(_DIAGNOSTICS, style="dim"))


def print_summary(summary: Summary, console: Console, *, categories: bool = False, diagnostics: bool = False) -> None:
    """Print the baselines, one row a drafter x mode, the definitions, and what the run could show and its controls did.

    It fits 80 columns and uses more if there are.

    Args:
        summary: As ``summarise`` gives it.
        console: Its width decides the layout.
        categories: Also rows for single categories.
        diagnostics: Also the table of where drafters and decoding part.
    """
    console.print(Text(title(summary), style="bold"))
    console.print()
    if summary["baselines"]:
        console.print(_table(baseline_rows(summary), Cell.inline))
        console.print()
    rows = table_rows(summary, categories=categories)
    if rows:
        for table in _fitting(rows, console):
            console.print(table)
            console.print()
    else:
        console.print(Text("No drafter was measured in this run."))
    console.print(Text(definitions(summary), style="dim"))
    print_detectable(summary, console)
    for entry in summary.get("image_controls", ()):
        console.print(Text(told(entry)))
    print_batches(summary, console)
    if diagnostics:
        print_diagnostics(summary, console)


def print_detectable(summary: Summary, console: Console) -> None:
    """Print the smallest difference that the run could have shown, where its records tell."""
    if line := detectable_line(summary):
        console.print(Text(line, style="dim"))


# --- layout --------------------------------------------------------------------------------------------------------


def _fitting(rows: Sequence[dict[str, Cell]], console: Console) -> list[Table]:
    """Return the widest layout that fits the console: inline, stacked, or split in two tables."""
    where = {"accepted by depth, %", "draft·verify·other, %", "lossless =·≈·≠", "in a step", "to the end"}
    identity = {"drafter", "T", "category", "batch"}
    split = [
        [{name: cell for name, cell in row.items() if name not in where} for row in rows],
        [{name: cell for name, cell in row.items() if name in where | identity} for row in rows],
    ]
    layouts = [
        [_table(rows, Cell.inline)],
        [_table(rows, Cell.stacked)],
        [_table(part, Cell.stacked) for part in split],
    ]
    for layout in layouts:
        if all(_width(table, console) <= console.width for table in layout):
            return layout
    return layouts[-1]


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(width=_NO_LIMIT), table).maximum


def _table(rows: Sequence[dict[str, Cell]], form: Callable[[Cell], str]) -> Table:
    """Return a table in which only names (the first column) may be folded."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(rows[0]):
        left = name in {"drafter", "baseline", "category", "accepted by depth, %"}
        table.add_column(
            _header(name), justify="left" if left else "right", no_wrap=index > 0, overflow="fold", vertical="top"
        )
    for row in rows:
        table.add_row(*(Text(form(cell), style=_style(cell)) for cell in row.values()))
    return table


_FIRST_LINES = (
    *("speedup vs ", "accepted ", "draft·verify·", "lossless "),
    *("greedy ", "kept is ", "kept of ", "Brier ", "nodes for "),
)


def _header(name: str) -> Text:
    for start in _FIRST_LINES:
        if name.startswith(start):
            return Text(f"{start.rstrip()}\n{name.removeprefix(start)}")
    return Text(name)


def _style(cell: Cell) -> str:
    return "bold red" if cell.alarm else "bold" if cell.strong else ""


# --- cells ---------------------------------------------------------------------------------------------------------


def _estimate(value: float | None, interval: Sequence[float] | None, *, strong: bool = False) -> Cell:
    if value is None:
        return Cell(value=MISSING)
    ends = None if interval is None else (f"{interval[0]:.2f}", f"{interval[1]:.2f}")
    return Cell(value=f"{value:.2f}", interval=ends, strong=strong)


def _percentages(shares: Sequence[float | None]) -> str:
    """Return ``62·48·35``, a dash for what was never reached."""
    if not any(share is not None for share in shares):
        return MISSING
    return "·".join(MISSING if share is None else f"{100 * share:.0f}" for share in shares)


def _throughput(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _lossless(counts: dict[str, Any]) -> Cell:
    if counts["checked"] == 0:
        return Cell(value="unchecked")
    text = f"{counts['equal']}·{counts['near_tie']}·{counts['violations']}"
    return Cell(value=text, alarm=counts["violations"] > 0)
