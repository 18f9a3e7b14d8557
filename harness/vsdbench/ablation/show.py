"""An ablation's result for people: the tables of the terminal, and the forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vsdbench.ablation.contest import is_contest
from vsdbench.ablation.grid import WARM_START, describe_change
from vsdbench.bench.estimate import minutes
from vsdbench.bench.paired import ALPHA
from vsdbench.report.figures import SCREEN, mode_label, save
from vsdbench.report.plots import arm_panels, forest_figure
from vsdbench.report.tables import MISSING

_MEASURES = ("tau", "speedup")


# --- tables --------------------------------------------------------------------------------------------------------


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Print every mode's arms against the reference, the budgets, and what the columns mean; fits 80 columns.

    Args:
        result: As ``analyse`` gives it.
        console: Intervals stand beside their values where it is wide enough, else below them.
    """
    what = "objectives of" if is_contest(result["arms"]) else "ablation of"
    console.print(Text(f"{what} {result['recipe']} · run {result['run_id']}", style="bold"))
    for entry in result["modes"]:
        console.print()
        console.print(Text(mode_label(entry["mode"], entry["temperature"]), style="bold"))
        console.print(_comparison(entry["arms"], " " if console.width >= 100 else "\n"))
    console.print()
    console.print(_budgets(result))
    console.print()
    console.print(Text(_definitions(result), style="dim"))


def print_estimate(estimate: Mapping[str, Any], console: Console) -> None:
    """Print the cells of an ablation, trained or not, and the time.

    Args:
        estimate: As ``estimate_ablation`` gives it.
        console: Where to.
    """
    table = _table("arm", "changes", "seed", "training", left=2)
    for cell in estimate["cells"]:
        seed = MISSING if cell["seed"] is None else str(cell["seed"])
        time = "in the cache" if cell["cached"] else minutes(cell["seconds"])
        table.add_row(Text(cell["arm"]), Text(describe_change(cell["change"]) or MISSING), seed, time)
    decoding = sum(method["seconds"] for method in estimate["methods"])
    console.print(
        f"arms of {estimate['recipe']} on {estimate['suite']}: {estimate['num_prompts']} prompts, "
        f"{estimate['num_decodes']} decodes of {estimate['target']} on {estimate['device']} in {estimate['dtype']}"
    )
    console.print(table)
    console.print(f"decoding {minutes(decoding)}, in all {minutes(estimate['seconds'])}")
    needed, available = estimate["memory_bytes"] / 1e9, estimate["memory_available_bytes"] / 1e9
    console.print(f"memory: {needed:.1f} GB of {available:.1f} GB available")


def _comparison(arms: Sequence[Mapping[str, Any]], separator: str) -> Table:
    table = _table("arm", "seeds", "τ", "Δτ, %", "p", "Δspeed, %", "p")
    for index, arm in enumerate(arms):
        cells = [str(len(arm["seeds"])) if arm["seeds"] else MISSING, _number(arm["tau"])]
        for measure in _MEASURES:
            p_value = arm[f"p_{measure}_holm"]
            style = "bold" if p_value is not None and p_value < ALPHA else ""
            cells += [f"[{style}]{text}[/]" if style else text for text in _difference(arm, measure, separator)]
        first_control = arm["control"] and not arms[index - 1]["control"]
        if first_control:
            table.add_section()
        table.add_row(Text(arm["name"]), *cells)
    return table


def _budgets(result: Mapping[str, Any]) -> Table:
    table = _table("arm", "what is changed", "tokens", "target forwards", "seconds", left=2)
    for arm in result["arms"]:
        budget = arm["budget"]
        spent = (f"{budget['tokens']:,}", f"{budget['target_forwards']:,}", f"{budget['wall_s']:.1f}")
        table.add_row(Text(arm["name"]), Text(_changes(arm, result["reference"])), *spent)
    return table


def _definitions(result: Mapping[str, Any]) -> str:
    budget = (
        "Budget of one training seed: every arm had as many tokens; forwards and seconds are what it did with them. "
        if result["equal_tokens"]
        else "The arms were NOT trained on as many tokens: what differs may be the budget. "
    )
    seeds = max(len(arm["seeds"]) for arm in result["arms"])
    level = "over prompts and training seeds" if seeds > 1 else "over prompts (one training seed)"
    return (
        f"{budget}Δ: the arm against {result['reference']} on the same prompts, above 0 where the arm is better; 95 % "
        f"intervals {level}. p: adjusted for several arms (Holm), controls by themselves; bold below "
        f"{ALPHA:g}. τ: tokens emitted a verification step, bonus included."
    )


def _difference(arm: Mapping[str, Any], measure: str, separator: str) -> tuple[str, str]:
    change, interval, p_value = (
        arm[key] for key in (f"delta_{measure}_pct", f"delta_{measure}_ci", f"p_{measure}_holm")
    )
    if change is None:
        return MISSING, MISSING
    text = f"{change:+.1f}"
    if interval is not None:
        text += f"{separator}({interval[0]:+.1f} to {interval[1]:+.1f})"
    return text, MISSING if p_value is None else f"{p_value:.3f}" if p_value >= 0.001 else "<0.001"


def _changes(arm: Mapping[str, Any], reference: str) -> str:
    if arm["name"] == reference:
        return "reference"
    return "untouched" if arm["name"] == WARM_START else describe_change(arm["change"])


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(Text(name), justify=justify, no_wrap=index >= left, overflow="fold", vertical="top")
    return table


# --- forest plot ---------------------------------------------------------------------------------------------------


def write_forest(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``forest_<mode>`` (with the temperature for sampling) as SVG and PNG, and return the paths.

    Args:
        result: As ``analyse`` gives it.
        directory: Made if it is not there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for entry in result["modes"]:
        panels = arm_panels(entry, result["reference"])
        if panels:
            suffix = f"_t{entry['temperature']:g}" if entry["mode"] == "stochastic" else ""
            title = f"arms against {result['reference']}, {mode_label(entry['mode'], entry['temperature'])}"
            figure = forest_figure(panels, layout=SCREEN, title=title)
            written += save(figure, directory / f"forest_{entry['mode']}{suffix}")
    return written
