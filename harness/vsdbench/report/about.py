"""The parts of a report that say what was done and with what: set-up, published figures, reproduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vsdbench.ablation.contest import other_objective
from vsdbench.bench.paired import speedup_difference, tau_difference
from vsdbench.models.source import describe
from vsdbench.report.facts import Run, size_note
from vsdbench.report.figures import mode_label
from vsdbench.report.model import (
    Block,
    Cell,
    Commands,
    Section,
    Table,
    change,
    count,
    estimate,
    fixed,
    listed,
    named,
    words,
)  # fmt: skip
from vsdbench.report.sources import OF_OBJECTIVES, OF_TYPES, REFERENCES

RECONSTRUCTED = ("vsd", "eal", "gto")


# --- set-up --------------------------------------------------------------------------------------------------------


def setup(runs: Sequence[Run]) -> Section:
    """Return what was measured on what: a table a run's facts, the drafters, and what the numbers mean."""
    blocks: list[Block] = [_what_is_decoded(runs)]
    blocks.append(_setup_table(runs))
    if not any(run.analysis for run in runs):
        blocks.append(drafters_table(runs))
    blocks.append(
        "τ is the number of tokens emitted per verification step, including the bonus or correction token, pooled over "
        "all steps; the first token, which the prefill gives, and tokens after the end of an answer do not count. "
        "A speedup is a baseline's decode time per token divided by the drafter's, paired by prompt and averaged over "
        "prompts as a geometric mean; prefill is left out. Methods take turns prompt by prompt in a random order, so "
        "that a machine that slows down slows all of them. Intervals are 95 % BCa bootstrap intervals [[cite:bca]] "
        "over prompts, widened for few prompts [[cite:hesterberg]]; repeats are averaged first."
    )
    reconstructed = [name for name in RECONSTRUCTED if name in objectives(runs)]
    if reconstructed:
        blocks.append(_reconstruction(reconstructed))
    return Section("Set-up", tuple(blocks))


def _what_is_decoded(runs: Sequence[Run]) -> str:
    suites = list(dict.fromkeys(run.suite for run in runs))
    sources = [source for run in runs for source in sources_of(run)]
    cites = "".join(f"[[cite:{key}]]" for key in dict.fromkeys(sources) if key in REFERENCES)
    target = "".join(f"[[cite:{key}]]" for key in ("smollm2",) if any("smollm2" in r.summary["target"] for r in runs))
    targets = list(dict.fromkeys(run.summary["target"] for run in runs))
    baselines = (
        "both baselines" if all(len({b["name"] for b in r.summary["baselines"]}) > 1 for r in runs) else "a baseline"
    )
    described = [f" {named(target)} is {what}." for target in targets if (what := describe(target))]
    return (
        f"The suite{'s' if len(suites) > 1 else ''} {listed([named(suite) for suite in suites])}{_space(cites)} "
        f"{'are' if len(suites) > 1 else 'is'} decoded with {listed([named(target) for target in targets])}"
        f"{_space(target)} at batch size 1 by every drafter and by {baselines} on the same weights. "
        + _baselines(runs)
        + "".join(described)
        + f" [[table:setup]] has the settings{drafted_with(runs)}."
    )


def _space(cites: str) -> str:
    return f" {cites}" if cites else ""


def _baselines(runs: Sequence[Run]) -> str:
    names = {b["name"] for run in runs for b in run.summary["baselines"]}
    said = {
        "autoregressive": f"{named('autoregressive')} is the same engine without drafting",
        "hf-generate": f"{named('hf-generate')} is the {named('generate')} of transformers",
    }
    known = [said[name] for name in sorted(names & set(said))]
    return f"{', '.join(known)}.".replace("`autoregressive`", "The baseline `autoregressive`", 1) if known else ""


def drafted_with(runs: Sequence[Run]) -> str:
    """Return a clause that cites the architectures and objectives of the drafters."""
    keys = list(dict.fromkeys([OF_TYPES[t] for t in types(runs) if t in OF_TYPES]))
    trees = {tree.partition(" ")[0] for run in runs for tree in run.trees.values()}
    keys += ["eagle2"] if trees & {"dynamic", "coupled"} else []
    keys += ["coupling"] if "coupled" in trees else []
    keys += [OF_OBJECTIVES[name] for name in objectives(runs) if name in OF_OBJECTIVES]
    cites = "".join(f"[[cite:{key}]]" for key in dict.fromkeys(keys))
    return f"; the drafters, their trees and objectives follow their papers {cites}" if cites else ""


def _setup_table(runs: Sequence[Run]) -> Table:
    facts = [_facts(run) for run in runs]
    several = len(runs) > 1
    rows = [
        (words(name), *(words(fact.get(name)) for fact in facts))
        for name in facts[0]
        if any(fact.get(name) for fact in facts)
    ]
    return Table(
        name="setup",
        title="Set-up" + (" of the runs" if several else ""),
        columns=("setting", *(f"run {run.label}" if several else "value" for run in runs)),
        rows=tuple(rows),
        num_left=1 + len(runs),
        stretch=True,
        wide=several,
    )


def _facts(run: Run) -> dict[str, str | None]:
    records, machine = run.frames[0], run.manifest.get("machine") or {}
    versions = machine.get("versions") or {}
    modes = [
        f"{mode_label(*mode)}, rule {rule}"
        for mode in run.modes
        for rule in records.loc[records["temperature"] == mode[1], "rule"].dropna().unique()[:1]
    ]
    limit = sorted({int(n) for n in records["max_new_tokens"]})
    git = machine.get("git") or {}
    once = "".join(f", {named(name)} once" for name in run.config.get("once") or [])
    return {
        "run": run.name,
        "date": f"{run.date:%Y-%m-%d}" if run.date.year > 1970 else None,
        "target": f"{run.summary['target']}, weights {str(records['target_fingerprint'].iloc[0])[:12]}",
        "dtype": f"{run.summary['dtype']} on {run.summary['device'] or 'an unnamed device'}",
        "suite": f"{run.suite}, version {records['suite_version'].iloc[0]}",
        "prompts": f"{run.summary['num_prompts']}, each {_times(run.summary['num_repeats'])}{once}",
        "answers": f"up to {'/'.join(map(str, limit))} new tokens",
        "modes": "; ".join(modes),
        "processor": _processor(machine),
        "GPU": ", ".join(str(gpu.get("name")) for gpu in machine.get("gpus") or []) or None,
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("vsdbench", "python", "torch", "transformers")
                              if versions.get(name)) or None,
        "commit": f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else None,
        "records": f"{len(records)}, sha256 {run.digest[:16]}",
    }  # fmt: skip


def _times(repeats: int) -> str:
    return {1: "once", 2: "twice"}.get(repeats, f"{repeats} times")


def _processor(machine: dict[str, Any]) -> str | None:
    cpu, memory = machine.get("cpu") or {}, machine.get("memory") or {}
    if not cpu.get("model"):
        return None
    cores = cpu.get("num_usable_cores") or cpu.get("num_logical_cores")
    total = memory.get("total_bytes")
    return f"{cpu['model']}, {cores} cores" + (f", {total / 2**30:.0f} GiB" if total else "")


def drafters_table(runs: Sequence[Run]) -> Table:
    """Return one row a drafter: what it is, what it was trained for, what tree it drafts."""
    rows = []
    for run in runs:
        configured = {d.get("name"): d for d in run.config.get("drafters") or []}
        for name in dict.fromkeys(row["drafter"] for row in run.rows):
            method = run.methods.get(name, {})
            rows.append((
                words(name), *([words(run.label)] if run.label else []), words(configured.get(name, {}).get("type")),
                words(method.get("objective")), words(run.trees.get(name)),
                words((method.get("training") or {}).get("recipe")),
            ))  # fmt: skip
    return Table(
        name="drafters",
        title="Drafters",
        columns=("drafter", *(["run"] if len(runs) > 1 else []), "type", "objective", "tree", "recipe"),
        rows=tuple(rows),
        note=f"Tree: kind, {size_note(tree for run in runs for tree in run.trees.values())}; the budget counts the "
        "draft tokens that one target forward verifies, without the root.",
        num_left=5 + (len(runs) > 1),
        wide=True,
    )


def _reconstruction(names: Sequence[str]) -> str:
    text = ""
    if "vsd" in names:
        text = (
            "**What is reconstructed.** `vsd` is Variational Speculative Decoding [[cite:vsd]] as this project "
            "reconstructs it: the objective and the names of its parts (E-step over draft paths, ARW, CAR) are the "
            "paper's, every formula for the utility, the weights and the penalty is this project's. A figure made "
            "with it is a figure of the reconstruction, not of the paper's method. "
        )
    others = [named(name) for name in names if name != "vsd"]
    if others:
        text += f"{listed(others)} {'is a reading of its paper' if len(others) == 1 else 'are readings of papers'} too."
    return text.strip()


def objectives(runs: Sequence[Run]) -> list[str]:
    """Return the objectives of all drafters, each once."""
    return list(dict.fromkeys(row["objective"] for run in runs for row in run.rows if row["objective"]))


def types(runs: Sequence[Run]) -> list[str]:
    """Return the architectures of all drafters, each once."""
    return list(dict.fromkeys(d.get("type") for run in runs for d in run.config.get("drafters") or []))


def sources_of(run: Run) -> list[str]:
    """Return the names of a suite's data sources."""
    return [source.get("name", "") for source in run.config.get("sources") or []]


# --- published figures ---------------------------------------------------------------------------------------------

_PUBLISHED = (
    ("EAGLE-3, measured by GTO's authors", "LLaMA-3.1-8B, mean of 3 suites", "6.07", "3.46\N{MULTIPLICATION SIGN}"),
    ("GTO", "the same", "6.52", "3.73\N{MULTIPLICATION SIGN}"),
    ("VSD against EAGLE-3", "mean of 4 LLaMA and DeepSeek targets", "+6.8 %", "+9.6 %"),
    ("VSD against EAGLE-3", "LLaVA-1.5-7B", "+6.3 %", "+7.9 %"),
    ("VSD against EAGLE-3", "LLaVA-1.5-13B", "+11.9 %", "+10.1 %"),
)


def published(runs: Sequence[Run]) -> Section | None:
    """Return published figures beside those of the runs, where a drafter of the same family was measured greedily."""
    greedy = [run for run in runs if ("greedy", 0.0) in run.modes and ("eagle3" in types([run]) or run.analysis)]
    if not greedy:
        return None
    ours = [row for run in greedy for row in _ours(run)]
    rows = [*ours, *(tuple(words(text) for text in row) for row in _PUBLISHED)]
    table = Table(
        name="published",
        title="Published figures beside those of this report, T = 0",
        columns=("source", "target", "τ", "speedup"),
        rows=tuple(rows),
        note="Absolute figures, or changes against the drafter named, ours with 95 % intervals. Those of others are as "
        "their authors give them (GTO's protocol: trees of 60 tokens, depth 7, MT-bench, HumanEval and GSM8K).",
        num_left=2,
        rules=(len(ours),),
        wide=True,
    )
    text = (
        "[[table:published]] puts published figures [[cite:vsd]][[cite:gto]] beside ours. They were made with "
        "other, larger targets on other hardware, with larger trees and far longer training. They say what to expect "
        "at that scale; they neither confirm nor refute ours."
    )
    return Section("Published figures", (text, table))


def _ours(run: Run) -> list[tuple[Cell, ...]]:
    mode = ("greedy", 0.0)
    target = words(f"{run.summary['target']}, {run.suite}")
    if run.analysis is not None:
        return [
            (words(f"ours: {run.analysis['reference']} against {arm['name']}"), target,
             _against(arm, "tau"), _against(arm, "speedup"))
            for arm in run.analysis["arms"]
            if (arm.get("control") or other_objective(arm) == "kl") and arm.get("delta_tau_pct") is not None
        ]  # fmt: skip
    rows = run.in_mode(mode)
    best = max(rows, key=lambda row: row["speedup"] or 0.0)
    found: list[tuple[Cell, ...]] = [
        (words(f"ours: {best['drafter']}"), target, estimate(best["tau"], None), _times_cell(best["speedup"]))
    ]
    kinds = {drafter.get("name"): drafter.get("type") for drafter in run.config.get("drafters") or []}
    with_kl = {kinds.get(row["drafter"]): row for row in reversed(rows) if row["objective"] == "kl"}
    for row in rows:
        control = with_kl.get(kinds.get(row["drafter"]))  # an objective is compared within one architecture
        if row["objective"] == "vsd" and control is not None:
            sides = [run.of(mode, method=row["drafter"])], [run.of(mode, method=control["drafter"])]
            tau, speed = tau_difference(*sides), speedup_difference(*sides)
            label = f"ours: {row['drafter']} against {control['drafter']}"
            found.append((words(label), target, _pct(change(tau.change_pct, tau.ci_pct)),
                          _pct(change(speed.change_pct, speed.ci_pct))))  # fmt: skip
    return found


def _against(arm: Mapping[str, Any], measure: str) -> Cell:
    """Return by how much the reference differs from an arm, of which the analysis has the reverse."""
    value, ends = arm[f"delta_{measure}_pct"], arm[f"delta_{measure}_ci"]
    if value is None:
        return words(None)
    return _pct(change(_turned(value), None if ends is None else (_turned(ends[1]), _turned(ends[0]))))


def _turned(change_pct: float) -> float:
    """Return the change from b to a where ``change_pct`` is that from a to b, both in per cent."""
    return 100 * (1 / (1 + change_pct / 100) - 1)


def _times_cell(value: float | None) -> Cell:
    return words(None if value is None else f"{fixed(value, 2)}\N{MULTIPLICATION SIGN}")


def _pct(cell: Cell) -> Cell:
    return Cell(text=f"{cell.text} %", number=cell.number, ends=cell.ends, interval=cell.interval)


# --- training and reproduction -------------------------------------------------------------------------------------


def training(runs: Sequence[Run]) -> Section | None:
    """Return what the drafters cost to train, as the manifest has it; the budgets of an ablation stand in its table."""
    rows = []
    for run in runs:
        for name, method in run.methods.items() if run.analysis is None else ():
            cost = method.get("training") or {}
            if cost.get("tokens"):
                rows.append((
                    words(name), *([words(run.label)] if run.label else []), words(cost.get("recipe")),
                    count(cost["tokens"]), count(cost.get("target_forwards")),
                    count(round(cost["seconds"])) if cost.get("seconds") is not None else words(None),
                ))  # fmt: skip
    if not rows:
        return None
    known = any(row[-2].number is not None for row in rows)
    keep = [i for i in range(len(rows[0])) if known or i != len(rows[0]) - 2]
    columns = ("drafter", *(["run"] if len(runs) > 1 else []), "recipe", "tokens", "target forwards", "seconds")
    table = Table(
        name="training",
        title="What training cost",
        columns=tuple(columns[i] for i in keep),
        rows=tuple(tuple(row[i] for i in keep) for row in rows),
        note="Tokens trained on, each pass counted; seconds of the training itself, without making its data.",
        num_left=2 + (len(runs) > 1),
    )
    text = (
        "Budgets are counted in trained tokens and in seconds ([[table:training]]); prompt lookup and other "
        "drafters without training are not listed. Equal tokens are not equal seconds: an objective that samples "
        "paths needs the target while it trains."
    )
    return Section("Training cost", (text, table))


def reproduction(runs: Sequence[Run], files: str) -> Section:
    """Return the commands that repeat the runs and this report.

    Args:
        runs: All of them.
        files: Folder of tables and figures, as the text names it.
    """
    report = f"vsdbench report {' '.join(run.folder.name for run in runs)}"
    lines = ["pip install -c constraints.txt .", *map(_command, runs), report]
    text = (
        "Everything in this report is derived from the records of the "
        f"run{'s' if len(runs) > 1 else ''} alone; the same records give the same file, byte for byte. The tables as "
        f"CSV, Markdown and LaTeX and the figures as SVG and PDF lie beside it, in {named(files)}."
    )
    return Section("Reproduction", (text, Commands(tuple(lines))))


def _command(run: Run) -> str:
    """Return the command that made a run: as its manifest has it, or what comes nearest where it has none."""
    command = str(run.manifest.get("command", ""))
    where = f"results/{run.folder.name}"
    if command.startswith("vsdbench "):
        return command
    if run.analysis is not None:
        return f"vsdbench ablate {run.manifest['ablation']['recipe']}  # and the changes in {where}/ablation.yaml"
    return f"vsdbench run {where}/config.yaml"
