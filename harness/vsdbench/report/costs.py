"""The parts of a report that explain a speed: how far drafts are accepted, what a step costs, where the time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vsdbench.bench.batches import PLAIN
from vsdbench.report import plots
from vsdbench.report.facts import Row, Run, merged, plotted, size_note, size_words
from vsdbench.report.figures import COLUMN, acceptance_figure, batch_figure
from vsdbench.report.model import (
    MISSING,
    Picture,
    Section,
    Table,
    count,
    estimate,
    fixed,
    named,
    number,
    percent,
    words,
)
from vsdbench.report.tables import slower


def acceptance(runs: Sequence[Run]) -> Section | None:
    """Return acceptance by depth as a figure, its table as a file."""
    view = plotted(runs)
    rows = [row for row in view if row["acceptance_by_depth"]]
    if not rows:
        return None
    text = (
        "[[figure:acceptance]] shows how many of the steps that reached a depth of the draft kept the token "
        "there. A slow fall says that the drafter stays on the target's path while it reads its own output; at "
        "depth 1 it says how good the drafter is where nothing can have gone wrong yet."
    )
    picture = Picture(
        name="acceptance",
        title="Acceptance by depth of the draft",
        note=f"Tokens kept at a depth / steps that reached it.{_left_out(runs)}",
        alt="Lines of the acceptance rate over the depth in the draft, a line a drafter.",
        figure=acceptance_figure(_summary_of(runs, view), COLUMN),
    )
    return Section("Acceptance by depth", (text, picture))


def acceptance_table(runs: Sequence[Run]) -> Table | None:
    """Return the numbers of the acceptance figure."""
    rows = [row for row in merged(runs)["results"] if row["category"] is None and row["acceptance_by_depth"]]
    if not rows:
        return None
    deepest = max(len(row["acceptance_by_depth"]) for row in rows)
    return Table(
        name="acceptance",
        title="Acceptance by depth of the draft, %",
        columns=("drafter", "T", *(f"depth {d}" for d in range(1, deepest + 1))),
        rows=tuple(
            (
                words(row["drafter"]), words(f"{row['temperature']:g}"),
                *(percent(a) for a in row["acceptance_by_depth"]),
                *[words(None)] * (deepest - len(row["acceptance_by_depth"])),
            )
            for row in rows
        ),
        note="Tokens kept at a depth / steps that reached it. In the CSV file as shares.",
    )  # fmt: skip


def budget(runs: Sequence[Run]) -> Section | None:
    """Return tau and speed against the tree budget, where one drafter was measured with several."""
    if len(runs) != 1 or runs[0].analysis is not None:
        return None
    [run] = runs
    groups = budget_groups(run)
    rows = {row["drafter"]: row for row in run.in_mode(run.modes[0])} if run.modes else {}
    if not groups or any(name not in rows for members in groups.values() for name, _ in members):
        return None
    said = []
    for name, members in groups.items():
        (small, low), (large, high) = members[0], members[-1]
        said.append(
            f"{named(name)} has τ = {fixed(rows[small]['tau'], 2)} with {low} draft tokens and τ = "
            f"{fixed(rows[large]['tau'], 2)} with {high}; its speedup goes from {_or_dash(rows[small]['speedup'])} to "
            f"{_or_dash(rows[large]['speedup'])}."
        )
    text = (
        f"A larger tree is accepted further and costs more to verify. {' '.join(said)} Where a forward of more tokens "
        "is nearly free, the larger tree wins; where it is not, τ alone misleads ([[figure:budget]])."
    )
    picture = Picture(
        name="budget",
        title="τ and speedup against the tree budget",
        note=f"At T = {run.modes[0][1]:g}, with 95 % intervals over prompts. {_trees_words(run, groups)}",
        alt="Two panels: accepted length and speedup over the number of draft tokens in the tree.",
        figure=plots.budget_figure(run.summary, groups),
    )
    return Section("Tree budget", (text, picture))


def _trees_words(run: Run, groups: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """Return the whole trees, since those of larger budgets may be deeper too."""
    names = [method for members in groups.values() for method, _ in members]
    trees = dict.fromkeys(run.trees[name].split(maxsplit=1)[1] for name in names)
    return f"Trees, as {size_note(trees)}: {', '.join(trees)}."


def chosen_trees(runs: Sequence[Run]) -> Section | None:
    """Return what was predicted of trees that were chosen by measurement, and what the suite then showed."""
    found = [(run, row, tree) for run in runs for row in run.rows if (tree := _chosen(run, row)) is not None]
    if not found:
        return None
    note = size_note(size_words(tree["tree"]) for _, _, tree in found)
    text = (
        "An automatic tree is chosen before a run, on prompts outside the suite: by what trees of all sizes would have "
        "kept there, by what steps cost on this machine, and by decoding with the best of them. What it promises for "
        "other prompts is a prediction ([[table:trees]])."
    )
    table = Table(
        name="trees",
        title="Automatic trees, predicted and measured",
        columns=("drafter", "T", "tree", "τ predicted", "τ measured", "speedup predicted", "speedup measured"),
        rows=tuple(
            (
                words(row["drafter"]), words(f"{row['temperature']:g}"), words(size_words(tree["tree"])),
                number(tree["predicted_tau"]), estimate(row["tau"], row["tau_ci"]),
                number(tree["predicted_speedup"]), estimate(_over_plain(row)["value"], _over_plain(row)["ci"]),
            )
            for _, row, tree in found
        ),
        note=f"Speedups over plain decoding by the same engine; brackets: 95 % intervals over prompts. Tree: {note}.",
        num_left=3,
        wide=True,
    )  # fmt: skip
    return Section("Automatic trees", (text, table))


def _chosen(run: Run, row: Row) -> Mapping[str, Any] | None:
    """Return the tree that was chosen for a row's drafter and mode, with what was predicted of it."""
    tree: Mapping[str, Any] | None = run.methods.get(row["drafter"], {}).get("trees", {}).get(row["mode"])
    return tree


def _over_plain(row: Row) -> Mapping[str, Any]:
    speedup: Mapping[str, Any] = row["speedups"].get(PLAIN, {"value": None, "ci": None})
    return speedup


def budget_groups(run: Run) -> dict[str, list[tuple[str, int]]]:
    """Return by drafter its (method, tree budget) pairs, of the drafters that were measured with several budgets.

    A drafter is called by its recipe, and by the kind of its trees where it was measured with several kinds.
    """
    by_weights: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for name, method in run.methods.items():
        if method.get("drafter_fingerprint") and name in run.budgets:
            by_weights[method["drafter_fingerprint"], run.trees[name].split()[0]].append((name, run.budgets[name]))
    groups = {key: members for key, members in by_weights.items() if len({size for _, size in members}) > 1}
    names = {key: _recipe_of(run, members[0][0]) for key, members in groups.items()}
    alone = [name for name in names.values() if list(names.values()).count(name) == 1]
    return {
        names[key] if names[key] in alone else f"{names[key]} ({key[1]})": sorted(members, key=lambda member: member[1])
        for key, members in groups.items()
    }


def _recipe_of(run: Run, name: str) -> str:
    return str((run.methods[name].get("training") or {}).get("recipe") or name)


def pareto(runs: Sequence[Run]) -> Section | None:
    """Return accepted length against what a step costs."""
    view = [row for row in plotted(runs) if row["speedup_baseline"] and row["tokens_per_s"] and row["tau"]]
    if not view:
        return None
    text = (
        "τ says what a step gives, not what it costs. [[figure:pareto]] has both: the cost of a "
        "draft-and-verify step, measured in steps of plain decoding, and τ. Their ratio is the speedup, so drafters on "
        "one ray are equally fast; a cheap drafter that is often wrong can stand beside a dear one that is often right."
    )
    picture = Picture(
        name="pareto",
        title="Accepted length against the cost of a step",
        note="Rays: equal speedup over the faster baseline. Grey line: drafters that no other beats in both. "
        f"Bars: 95 % intervals over prompts. Times are pooled here.{_left_out(runs)}",
        alt="Scatter of accepted length over the cost of a step with rays of equal speedup.",
        figure=plots.pareto_figure(_summary_of(runs, view)),
    )
    return Section("Accepted length against cost", (text, picture))


def time_shares(runs: Sequence[Run]) -> Section | None:
    """Return where decode time goes."""
    rows = [row for row in plotted(runs) if row["time_share"]["draft"] is not None]
    if not rows:
        return None
    other = max(row["time_share"]["other"] for row in rows)
    dearest = max(rows, key=lambda row: float(row["time_share"]["draft"]))
    text = (
        "[[figure:time]] divides decode time. Drafting takes up to "
        f"{fixed(100 * dearest['time_share']['draft'], 0)} % of "
        f"it ({named(dearest['drafter'])}); what is neither drafter nor target, the engine's own work, takes at most "
        f"{fixed(100 * other, 1)} %."
    )
    picture = Picture(
        name="time",
        title="Where the time goes",
        note=f"Shares of decode time, prefill apart.{_left_out(runs)}",
        alt="Stacked bars of the shares of the drafter, the target and everything else in decode time.",
        figure=plots.time_figure(_summary_of(runs, rows)),
    )
    return Section("Where the time goes", (text, picture))


def time_table(runs: Sequence[Run]) -> Table | None:
    """Return the numbers of the time figure."""
    rows = [r for r in merged(runs)["results"] if r["category"] is None and r["time_share"]["draft"] is not None]
    if not rows:
        return None
    return Table(
        name="time",
        title="Shares of decode time, %",
        columns=("drafter", "T", "drafter's share", "target's share", "everything else"),
        rows=tuple(
            (
                words(row["drafter"]),
                words(f"{row['temperature']:g}"),
                *(percent(s, 1) for s in row["time_share"].values()),
            )
            for row in rows
        ),
        note="In the CSV file as shares.",
    )


def batches(runs: Sequence[Run]) -> Section | None:
    """Return throughput and speedup against the batch size, of a run that has batches."""
    if len(runs) != 1 or not runs[0].summary.get("batches"):
        return None
    [run] = runs
    rows = run.summary["batches"]
    mode = rows[0]["mode"], rows[0]["temperature"]
    text = (
        "Alone, an answer leaves much of a processor idle while weights are read, and drafting uses what is idle. "
        "Answers that are decoded together use it too, so the larger the batch, the less there is for drafts. "
        "[[figure:batches]] and [[table:batches]] compare a drafter with plain decoding in batches of the same size. "
        f"{slower(run.summary) or 'No drafter is slower than plain decoding at any batch size measured.'}"
    )
    picture = Picture(
        name="batches",
        title="Throughput and speedup against the batch size",
        note=f"At T = {mode[1]:g}, full batches, prefills apart. Bars: 95 % intervals over groups "
        "of prompts. Trees are the same at every batch size.",
        alt="Two panels over the batch size: tokens a second, and the speedup over plain decoding at that size.",
        figure=batch_figure(run.summary, mode=mode[0], temperature=mode[1], layout=COLUMN),
    )
    return Section("Batches", (text, picture, batch_table(run)))


def batch_table(run: Run) -> Table:
    """Return one row a method x mode x batch size."""
    return Table(
        name="batches",
        title="Decoding in batches",
        columns=(
            "drafter",
            "T",
            "batch",
            "in a step",
            "τ",
            "tokens/s",
            "ms a token",
            "drafter's share",
            "speedup",
            "to the end",
        ),
        rows=tuple(
            (
                words(row["drafter"]),
                words(f"{row['temperature']:g}"),
                count(row["batch_size"]),
                number(row["mean_sequences"], 1),
                number(row["tau"]),
                number(row["tokens_per_s"], 1),
                number(row["ms_per_token"], 1),
                percent(row["time_share"]["draft"]),
                estimate(row["speedup"], row["speedup_ci"]),
                estimate(row["speedup_to_end"], row["speedup_to_end_ci"]),
            )
            for row in run.summary["batches"]
        ),
        note="Tokens/s, what one answer waits for a token (ms), and speedup over plain decoding at the same batch size "
        "are of full batches; to the end: with the ends of groups, where the batch gets smaller; in a step: how many "
        "answers there are then. Brackets: 95 % intervals over groups of prompts (Student's t).",
        wide=True,
    )


def definitions_table(runs: Sequence[Run]) -> Table:
    """Return every definition of tau in use, so that figures of other papers can be compared."""
    rows = [row for row in merged(runs)["results"] if row["category"] is None]
    names = ("pooled", "prompt_mean", "answer_mean", "without_bonus", "accepted_plus_one", "with_prefill")
    return Table(
        name="tau-definitions",
        title="τ by the definitions in use",
        columns=("drafter", "T", *(name.replace("_", " ") for name in names)),
        rows=tuple(
            (words(r["drafter"]), words(f"{r['temperature']:g}"), *(number(r["tau_definitions"][n]) for n in names))
            for r in rows
        ),
        note="Pooled: tokens emitted / steps over everything, the one used in this report. Prompt and answer mean: of "
        "that ratio by prompt and by answer. Without bonus: draft tokens kept / steps; accepted plus one: 1 + that. "
        "With prefill: prefills counted as steps.",
        wide=True,
    )


def definitions(runs: Sequence[Run]) -> Section | None:
    """Return tau by the definitions in use."""
    table = definitions_table(runs)
    text = (
        "At least six definitions of accepted length are in use, and they can differ by more than drafters do. "
        "[[table:tau-definitions]] has all of them for these records, so that a figure from elsewhere can be compared "
        "with the one that is defined in the same way."
    )
    return Section("Accepted length by other definitions", (text, table)) if table.rows else None


# --- shared --------------------------------------------------------------------------------------------------------


def _summary_of(runs: Sequence[Run], rows: list[Row]) -> dict[str, object]:
    return merged(runs) | {"results": rows}


def _left_out(runs: Sequence[Run]) -> str:
    if len(runs) != 1 or runs[0].analysis is None:
        return ""
    shown, all_arms = {row["drafter"] for row in plotted(runs)}, {row["drafter"] for row in merged(runs)["results"]}
    return "" if shown == all_arms else " Of the arms, the reference, controls and those that change τ most."


def _or_dash(value: float | None) -> str:
    return MISSING if value is None else fixed(value, 2)
