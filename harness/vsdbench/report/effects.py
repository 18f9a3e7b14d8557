"""The parts of a report that compare: arms of an ablation or a contest with their reference, runs with the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vsdbench.ablation.contest import is_contest, other_objective
from vsdbench.ablation.grid import describe_change
from vsdbench.bench.paired import ALPHA, Difference, mean_difference, tau_difference
from vsdbench.bench.stats import log_ratios
from vsdbench.report.facts import Mode, Run, same_prompts
from vsdbench.report.figures import mode_label
from vsdbench.report.model import (
    MISSING,
    Block,
    Cell,
    Picture,
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
from vsdbench.report.plots import Effect, arm_panels, forest_figure

_MEASURES = {"speedup": "decoding speed", "tau": "τ"}
_MANY = 4
"""Differences that are told one by one; of more, that are not established, the two ends are."""
_PARTS = {
    "car": "Confidence-Aware Regularization, a penalty on confidence in rejected tokens",
    "arw": "Adaptive Rejection Weighting, which tempers the weights of draft paths and corrections",
    "utility": "the expected accepted length in the weights",
    "kl": "the ratio of target to draft probability in the weights",
    "correction": "the target's token in place of a rejected one",
    "oracle": "the accept test on draft paths",
    "anchor": "the loss on the training data itself",
}
"""What the parts of VSD are that an arm can go without."""

# --- ablation ------------------------------------------------------------------------------------------------------


def ablation(runs: Sequence[Run]) -> list[Section]:
    """Return a section for every run that is an ablation: text, table, a forest plot a mode."""
    return [_ablation(run) for run in runs if run.analysis is not None]


def _ablation(run: Run) -> Section:
    analysis = run.analysis or {}
    suffix = f"-{run.label.lower()}" if run.label else ""
    pictures = [_forest(mode, analysis["reference"], suffix, index) for index, mode in enumerate(analysis["modes"])]
    drawn = [picture for picture in pictures if picture is not None]
    where = f" and [[figure:{drawn[0].name}]]" if drawn else ""
    contest = is_contest(analysis["arms"])
    said = cost_words(analysis) if contest else " ".join(findings(analysis))
    text = " ".join(filter(None, [
        f"Every arm starts from the same drafter and sees the same data in the same order; an arm differs from "
        f"{named(analysis['reference'])} in {_what_differs(analysis)}.", _parts_words(analysis),
        "Intervals of changes are paired, over training seeds and prompts as two levels, and not adjusted. p-values "
        "are adjusted by Holm's method [[cite:holm]] over the arms of a temperature, separately for τ, for speed and "
        "for controls.",
        f"[[table:ablation{suffix}]]{where} {'have' if where else 'has'} all of them.", said,
    ]))  # fmt: skip
    title = "Contest of objectives" if contest else "Ablation"
    return Section(title + (f", run {run.label}" if run.label else ""), (text, _table(analysis, suffix), *drawn))


def _what_differs(analysis: Mapping[str, Any]) -> str:
    """Return what an arm is, and how to read its change."""
    worth = "a part whose removal lowers τ is worth that much"
    if not is_contest(analysis["arms"]):
        return f"the part that is named. A change is the arm's relative to the reference, so {worth}"
    has_parts = any(arm["disabled"] for arm in analysis["arms"])
    return (
        f"the objective{', the part' if has_parts else ''} or the setting that is named. A change is the arm's "
        f"relative to the reference, above 0 where the arm is ahead{f'; {worth}' if has_parts else ''}"
    )


def _parts_words(analysis: Mapping[str, Any]) -> str:
    """Return what the parts are that an arm goes without; nothing where no arm does."""
    off = dict.fromkeys(part for arm in analysis["arms"] for part in arm["disabled"])
    known = [f"{named(part)} is {_PARTS[part]}" for part in off if part in _PARTS]
    return f"Of the parts, {listed(known)}." if known else ""


def findings(analysis: Mapping[str, Any]) -> list[str]:
    """Return in plain words which parts help and which arms are ahead: what is established after Holm, what is not.

    An arm without a part is said to show what the part is worth; one with another objective or setting, how it stands
    to the reference, in speed too and at every temperature.
    """
    known = [a for a in analysis["arms"] if a["name"] != analysis["reference"] and a["delta_tau_pct"] is not None]
    arms, controls = ([arm for arm in known if bool(arm.get("control")) is wanted] for wanted in (False, True))
    arms = [arm for arm in arms if not _is_rival(arm)]
    sure = [arm for arm in arms if _certain(arm["p_tau_holm"])]
    worse, better = ([arm for arm in sure if (arm["delta_tau_pct"] < 0) is wanted] for wanted in (True, False))
    rest = [named(arm["name"]) for arm in arms if arm not in sure]
    said = []
    if worse:
        said.append(f"τ is lower, so that what is taken away helps, in {listed([_told(arm) for arm in worse])}.")
    if better:
        said.append(f"τ is higher in {listed([_told(arm) for arm in better])}.")
    if rest:
        said.append(f"No change of τ is established for {listed(rest)}.")
    said += [_standings(mode, analysis["reference"], measure) for mode in analysis.get("modes", ())
             for measure in _MEASURES]  # fmt: skip
    if controls:
        said.append(_of_controls(controls, analysis["reference"]))
    if analysis.get("equal_tokens") is False:
        said.append("The arms were not trained on equally many tokens, so a difference may be that of the budget.")
    return list(filter(None, said))


def _of_controls(controls: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Return by how much tau of each control differs from the reference's, and which differences are established."""
    told = listed([_told(arm) for arm in controls])
    unsure = [named(arm["name"]) for arm in controls if not _certain(arm["p_tau_holm"])]
    several = len(controls) > 1
    if len(unsure) == len(controls):
        which = "no control's difference" if several else "the control's difference"
        return f"In τ, {which} from {named(reference)} is {'' if several else 'not '}established: {told}."
    differ = "the controls differ" if several else "the control differs"
    return f"In τ, {differ} from {named(reference)}: {told}{f'; not established: {listed(unsure)}' if unsure else ''}."


def _is_rival(arm: Mapping[str, Any]) -> bool:
    """Return whether an arm is another way to train, and not the reference without some part."""
    return other_objective(arm) is not None or not arm["disabled"]


def _standings(mode: Mapping[str, Any], reference: str, measure: str) -> str:
    """Return which rivals are ahead of the reference in a mode and a measure, which behind, by how much, how surely."""
    rivals = [arm for arm in mode["arms"] if arm["name"] != reference and not arm["control"] and _is_rival(arm)]
    known = [arm for arm in rivals if arm[f"delta_{measure}_pct"] is not None]
    if not known:
        return ""
    sure = [arm for arm in known if _certain(arm[f"p_{measure}_holm"])]
    ahead, behind = ([arm for arm in sure if (arm[f"delta_{measure}_pct"] > 0) is wanted] for wanted in (True, False))
    unsure = [arm for arm in known if arm not in sure]
    groups = [
        f"{where} {named(reference)}: {listed([_told(arm, measure) for arm in group])}"
        for group, where in ((ahead, "ahead of"), (behind, "behind"))
        if group
    ]
    if unsure:
        which = "not established" if sure else f"no difference from {named(reference)} is established"
        groups.append(f"{which} after Holm's adjustment: {_unsure(unsure, measure)}")
    return f"In {_MEASURES[measure]} at T = {mode['temperature']:g}, {'; '.join(groups)}."


def _unsure(arms: Sequence[Mapping[str, Any]], measure: str) -> str:
    """Return the differences of these arms, of many the lowest and the highest."""
    if len(arms) <= _MANY:
        return listed([_told(arm, measure) for arm in arms])
    by_size = sorted(arms, key=lambda arm: float(arm[f"delta_{measure}_pct"]))
    return f"{len(arms)} arms, from {_told(by_size[0], measure)} to {_told(by_size[-1], measure)}"


def cost_words(analysis: Mapping[str, Any]) -> str:
    """Return what an arm's training took on equal tokens: the least, the most, the reference; nothing if not equal."""
    seconds = {arm["name"]: arm["budget"]["wall_s"] for arm in analysis["arms"] if arm["seeds"]}
    if not analysis["equal_tokens"] or len(seconds) < 2:
        return ""
    by_cost = sorted(seconds, key=seconds.__getitem__)
    least, most = (f"{fixed(seconds[name], 0)} s ({named(name)})" for name in (by_cost[0], by_cost[-1]))
    reference = analysis["reference"]
    between = f"; {named(reference)} took {fixed(seconds[reference], 0)} s" if reference in by_cost[1:-1] else ""
    return f"Trained on equally many tokens, one seed took from {least} to {most}{between}."


def _told(arm: Mapping[str, Any], measure: str = "tau") -> str:
    return f"{named(arm['name'])} by {_with_interval(arm[f'delta_{measure}_pct'], arm[f'delta_{measure}_ci'])}"


def _table(analysis: Mapping[str, Any], suffix: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    rules: list[int] = []
    for mode in analysis["modes"]:
        rules += [len(rows)] if rows else []
        rows += [_row(arm, mode, analysis["reference"]) for arm in mode["arms"]]
    return Table(
        name=f"ablation{suffix}",
        title=f"Arms against {named(analysis['reference'])}",
        columns=("arm", "off or changed", "T", "seeds", "τ", "change of τ, %", "p", "change of speed, %", "p ",
                 "tokens", "target forwards", "seconds"),
        rows=tuple(rows),
        note="Brackets: 95 % intervals; of τ over prompts, of changes paired and over training seeds and prompts. p: "
        "Holm-adjusted over the arms of a temperature and, separately, over its controls; bold where it is below 0.05. "
        "Budget of one seed: trained tokens, target forwards, seconds.",
        num_left=2,
        rules=tuple(rules),
        wide=True,
    )  # fmt: skip


def _row(arm: Mapping[str, Any], mode: Mapping[str, Any], reference: str) -> tuple[Cell, ...]:
    budget = arm.get("budget") or {}
    num_seeds = len(arm["seeds"])
    is_reference = arm["name"] == reference
    off = (
        ", ".join(arm.get("disabled") or [])
        or describe_change(arm.get("change") or {})
        or ("control" if arm.get("control") else MISSING)
    )
    wall = budget.get("wall_s")
    return (
        words(arm["name"]),
        words(off),
        words(f"{mode['temperature']:g}"),
        count(num_seeds or None),
        estimate(arm["tau"], arm.get("tau_ci")),
        *_change_and_p(arm, "tau", is_reference=is_reference),
        *_change_and_p(arm, "speedup", is_reference=is_reference),
        count(_whole(budget.get("tokens"))),
        count(_whole(budget.get("target_forwards"))),
        count(_whole(wall)),
    )


def _change_and_p(arm: Mapping[str, Any], measure: str, *, is_reference: bool) -> tuple[Cell, Cell]:
    if is_reference:
        return words(None), words(None)
    p = arm.get(f"p_{measure}_holm")
    cell = change(arm.get(f"delta_{measure}_pct"), arm.get(f"delta_{measure}_ci"), strong=_certain(p))
    return cell, p_cell(p)


def p_cell(p: float | None) -> Cell:
    """Return a p-value with as many digits as it deserves."""
    if p is None:
        return words(None)
    return Cell(text="<0.001" if p < 0.001 else fixed(p, 3), number=p)


def _forest(mode: Mapping[str, Any], reference: str, suffix: str, index: int) -> Picture | None:
    panels = arm_panels(mode, reference)
    if not panels:
        return None
    return Picture(
        name=f"forest{suffix}" + (f"-{index + 1}" if index else ""),
        title=f"Arms against the reference, {mode_label(mode['mode'], mode['temperature'])}",
        note="Changes with paired 95 % intervals over training seeds and prompts; filled where the Holm-adjusted p is "
        "below 0.05; squares are controls.",
        alt="Forest plot: a row an arm, its change of accepted length and of speed with intervals around zero.",
        figure=forest_figure(panels),
    )


def _certain(p: float | None) -> bool:
    return p is not None and p < ALPHA


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    ends = "" if interval is None else f" ({fixed(interval[0], 1)} to {fixed(interval[1], 1)})"
    return f"{fixed(value, 1)} %{ends}"


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


# --- runs ----------------------------------------------------------------------------------------------------------


def comparison(runs: Sequence[Run]) -> Section | None:
    """Return how drafters of the same name differ between each run and the first, on the prompts of both."""
    if len(runs) < 2:
        return None
    pairs = [(run, mode, name) for run in runs[1:] if same_prompts(runs[0], run)
             for mode in run.modes if mode in runs[0].modes
             for name in _names(run, mode) if name in _names(runs[0], mode)]  # fmt: skip
    other = [run.label for run in runs[1:] if not same_prompts(runs[0], run)]
    apart = (
        f" Run{'s' if len(other) > 1 else ''} {listed(other)} decoded other prompts, so nothing is paired."
        if other
        else ""
    )
    if not pairs:
        return Section("Comparison of the runs", (
            "No drafter was measured on the same prompts in two of the runs; the tables set them side by side, and "
            f"the difference between their rows has no paired interval.{apart}",
        ))  # fmt: skip
    differences = [(run, mode, name, *_differences(runs[0], run, mode, name)) for run, mode, name in pairs]
    text = (
        f"[[table:comparison]] holds drafters of the same name against run {runs[0].label}, paired by prompt. "
        "Speed is compared through each run's own baseline, prompt by prompt, since two runs do not share the state "
        f"of the machine; τ needs no such care.{apart} "
        + " ".join(_said(run, mode, name, tau) for run, mode, name, tau, _ in differences)
    )
    blocks: list[Block] = [text, _comparison_table(differences, runs[0].label)]
    panels = {
        label: [
            Effect(
                name=f"{name} [{run.label}], T = {mode[1]:g}", value=d.change_pct, interval=d.ci_pct, certain=_sure(d)
            )
            for run, mode, name, *both in differences
            if (d := both[index]) is not None and d.change_pct is not None
        ]
        for index, label in enumerate(("τ", "speedup"))
    }
    if all(panels.values()):
        blocks.append(
            Picture(
                name="comparison",
                title=f"Change against run {runs[0].label}",
                note="With paired 95 % intervals over prompts; filled where the interval excludes 0.",
                alt="Forest plot of the change of accepted length and of speedup between runs.",
                figure=forest_figure(panels),
            )
        )
    return Section("Comparison of the runs", tuple(blocks))


def _names(run: Run, mode: Mode) -> list[str]:
    return [row["drafter"] for row in run.in_mode(mode)]


def _differences(first: Run, run: Run, mode: Mode, name: str) -> tuple[Difference, Difference | None]:
    tau = tau_difference([run.of(mode, method=name)], [first.of(mode, method=name)])
    baselines = [next(r["speedup_baseline"] for r in which.in_mode(mode)) for which in (first, run)]
    if None in baselines or baselines[0] != baselines[1]:
        return tau, None
    before, after = (
        log_ratios(which.of(mode, method=name)[0], which.of(mode, method=baselines[0])[0]) for which in (first, run)
    )
    return tau, mean_difference([(after - before).dropna()])


def _sure(difference: Difference | None) -> bool:
    return difference is not None and difference.p_value is not None and difference.p_value < ALPHA


def _said(run: Run, mode: Mode, name: str, tau: Difference) -> str:
    if tau.change_pct is None:
        return ""
    sure = "" if _sure(tau) else ", which is not established"
    return (
        f"In run {run.label} τ of {named(name)} at T = {mode[1]:g} differs by "
        f"{_with_interval(tau.change_pct, tau.ci_pct)}{sure}."
    )


def _comparison_table(
    differences: Sequence[tuple[Run, Mode, str, Difference, Difference | None]], reference: str
) -> Table:
    return Table(
        name="comparison",
        title=f"Drafters of the same name, against run {reference}",
        columns=("drafter", "run", "T", "change of τ, %", "p", "change of speedup, %", "p "),
        rows=tuple(
            (
                words(name), words(run.label), words(f"{mode[1]:g}"),
                change(tau.change_pct, tau.ci_pct, strong=_sure(tau)), p_cell(tau.p_value),
                change(speed.change_pct, speed.ci_pct, strong=_sure(speed)) if speed else words(None),
                p_cell(speed.p_value if speed else None),
            )
            for run, mode, name, tau, speed in differences
        ),
        note="Paired by prompt, 95 % intervals over prompts. Bold: p below 0.05, not adjusted for their number.",
        num_left=2,
        wide=True,
    )  # fmt: skip
