"""A comparison as a table for the terminal; fits 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vsdbench.bench.paired import ALPHA
from vsdbench.report.tables import MISSING


def print_comparison(comparison: Mapping[str, Any], console: Console) -> None:
    """Print the two sides, one row a method and mode, what the columns mean, and how each gate was judged.

    Args:
        comparison: As ``compare`` gives it, with ``gates`` judged.
        console: Where it goes.
    """
    for side in ("A", "B"):
        console.print(Text(f"{side}: {_side(comparison[side.lower()])}", style="bold"), soft_wrap=True)
    console.print()
    console.print(_table(comparison["rows"]))
    console.print()
    console.print(Text(definitions(comparison), style="dim"))
    for gate in comparison["gates"]:
        verdict = "passed" if gate["passed"] else f"failed in {len(gate['failures'])} of {len(comparison['rows'])} rows"
        console.print(Text(f"gate {gate['gate']} (on {gate['on']}): {verdict}", style="" if gate["passed"] else "red"))


def definitions(comparison: Mapping[str, Any]) -> str:
    """Return what the columns mean, and what speed was compared with."""
    rows = comparison["rows"]
    seeds = " and training seeds" if any(row["num_seeds"] > 1 for row in rows) else ""
    one = "" if seeds else " (one training seed each, so nothing is said about training again)"
    speed = (
        "Speedup change: decode time per token, both methods of one run, paired by prompt."
        if comparison["same_run"]
        else "Speedup change: each run's speedup over its own autoregressive baseline, paired by prompt, so that what "
        "slows down a whole machine cancels."
    )
    return (
        f"Changes are of B relative to A. τ: tokens emitted per verification step, pooled. {speed} Intervals: "
        f"{100 * comparison['confidence']:g} % over prompts{seeds}{one}. p: against no change, Holm-adjusted over the "
        f"{len(rows)} row{'s' if len(rows) != 1 else ''}; bold below {ALPHA:g}."
    )


def _side(side: Mapping[str, Any]) -> str:
    method = f":{side['method']}" if side["method"] else ""
    parts = [
        f"{side['suite']} {side['suite_version']}",
        side["target"],
        " ".join(filter(None, [side["device"], side["dtype"]])),
    ]
    return " · ".join([f"{side['run_id']}{method}", *parts])


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", vertical="top")
    with_seeds = any(row["num_seeds"] > 1 for row in rows)
    names = ["T", "prompts", *(["seeds"] if with_seeds else []), "τ A", "τ B", "τ change", "p", "speedup change", "p"]
    for name in names:
        table.add_column(name.replace("speedup ", "speedup\n"), justify="right", no_wrap=True, vertical="top")
    for row in rows:
        name = row["a"] if row["a"] == row["b"] else f"{row['b']}\nagainst {row['a']}"
        seeds = [Text(str(row["num_seeds"]))] if with_seeds else []
        taus = [Text(MISSING if row[key] is None else f"{row[key]:.2f}") for key in ("tau_a", "tau_b")]
        changes = [cell for metric in ("tau", "speedup") for cell in _change(row, metric)]
        table.add_row(
            Text(name), Text(f"{row['temperature']:g}"), Text(str(row["num_prompts"])), *seeds, *taus, *changes
        )
    return table


def _change(row: Mapping[str, Any], metric: str) -> list[Text]:
    """Return the change with its interval below it, and its adjusted p."""
    change, ci, p_value = (row[name] for name in (f"delta_{metric}_pct", f"delta_{metric}_ci", f"p_{metric}_holm"))
    if change is None:
        return [Text(MISSING), Text(MISSING)]
    interval = "" if ci is None else f"\n{ci[0]:+.1f} to {ci[1]:+.1f}"
    style = "bold" if p_value is not None and p_value < ALPHA else ""
    told = MISSING if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    return [Text(f"{change:+.1f} %{interval}", style=style), Text(told, style=style)]
