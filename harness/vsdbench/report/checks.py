"""The parts of a report that say how far to trust it: losslessness, misalignment, limitations."""

from __future__ import annotations

from collections.abc import Sequence

from vsdbench.bench.checks import CONTROL_CONFIDENCE, POWER, detectable_effects
from vsdbench.report import plots
from vsdbench.report.about import RECONSTRUCTED, objectives
from vsdbench.report.facts import Run, gaps, merged, plotted
from vsdbench.report.model import (
    Block,
    Bullets,
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
    number,
    percent,
    spelled,
    words,
)

_FEW_PROMPTS = 30
_SMALL_TARGET_TOKENS = 256


# --- losslessness --------------------------------------------------------------------------------------------------


def losslessness(runs: Sequence[Run]) -> Section | None:
    """Return how many answers are the baseline's own, and how large the gaps are where they part."""
    if not any(run.lossless["checked"] for run in runs):
        return None
    table = _lossless_table(runs)
    text = (
        "Every answer is compared with the baseline's, token by token: greedily, and at temperature above 0 under the "
        "rule `coupled`, whose draws depend on the seed and the position alone. Where an answer departs, the common "
        "prefix is replayed. If the two candidates are within what rounding explains it is a near-tie, otherwise a "
        f"violation. {' '.join(lossless_words(run) for run in runs)} [[table:lossless]] has the counts. After a "
        "near-tie the answers go on from different texts, so one tie makes the whole answer differ."
    )
    return Section("Losslessness", (text, table))


def lossless_words(run: Run) -> str:
    """Return the counts of a run in a sentence."""
    counts = run.lossless
    if not counts["checked"]:
        return ""
    where = f"In run {run.label}, of" if run.label else "Of"
    alike = counts["near_tie"] + counts["violations"] == 0
    if alike:
        return f"{where} {_count(counts['checked'])} answers compared, all equal the baseline's to the last token."
    violations = (
        "none is a violation" if counts["violations"] == 0 else f"{_count(counts['violations'])} are violations"
    )
    return (
        f"{where} {_count(counts['checked'])} answers that were compared, {_count(counts['equal'])} equal the "
        "baseline's to "
        f"the last token, {_count(counts['near_tie'])} part from it at a near-tie of the target's own logits, and "
        f"{violations}."
    )


def _count(value: int) -> str:
    return count(value).text


def _lossless_table(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        for row in run.view["results"]:
            if row["category"] is not None or not row["lossless"]["checked"]:
                continue
            records = run.of((row["mode"], row["temperature"]))[0]
            found = gaps(records[records["method"].isin(row.get("members", [row["drafter"]]))])
            counts = row["lossless"]
            rows.append((
                words(f"{row['drafter']}{f' [{run.label}]' if run.label else ''}"), words(f"{row['temperature']:g}"),
                *(count(counts[name]) for name in ("checked", "equal", "near_tie", "violations")),
                *((number(found[len(found) // 2], 3), number(found[-1], 3)) if found else [words(None)] * 2),
            ))  # fmt: skip
    return Table(
        name="lossless",
        title="Answers compared with the baseline's",
        columns=("drafter", "T", "compared", "equal", "near-tie", "violation", "median gap", "largest gap"),
        rows=tuple(rows),
        note="Gap: the logit of the baseline's token minus that of the other, at the first near-tie, absolute.",
    )


# --- pictures ------------------------------------------------------------------------------------------------------


def other_pictures(runs: Sequence[Run]) -> Section | None:
    """Return what drafters lose when their prompt shows another picture; None where no run has such a control."""
    found = [(run, entry) for run in runs for entry in run.summary.get("image_controls", ())]
    if not found:
        return None
    table = Table(
        name="other-pictures",
        title="Drafters shown another picture",
        columns=("drafter", "T", "τ, own picture", "τ, another", "change of τ, %"),
        rows=tuple(
            (
                words(f"{entry['drafter']}{f' [{run.label}]' if run.label else ''}"),
                words(f"{entry['temperature']:g}"),
                number(entry["tau"]),
                number(entry["tau_shuffled"]),
                change(entry["delta_tau_pct"], entry["delta_tau_ci"]),
            )
            for run, entry in found
        ),
        note=f"Paired by prompt, over {listed([str(n) for n in sorted({e['num_prompts'] for _, e in found})])} prompts "
        "with pictures; brackets: 95 % intervals.",
    )
    text = (
        "Does a drafter use the picture? In this control its prefill gets the prompt as the target reads it with "
        "another prompt's picture, while the target itself sees the true one, so answers stay the same. A fall of τ in "
        "[[table:other-pictures]] says that it does; an interval that holds 0, that it was not shown. It is not what a "
        "picture is worth: a wrong one may mislead, and what later steps draft from, the target's features of the "
        "generated tokens, still knows the true one."
    )
    return Section("Negative control: another picture", (text, table))


# --- misalignment --------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("greedy_pruned_share", "greedy pruned, %"),
    ("accepted_is_greedy_share", "accepted is greedy, %"),
    ("greedy_path_length", "greedy path"),
    ("tree_path_length", "tree path"),
    ("brier", "Brier"),
    ("nodes_for_95", "nodes for 95 %"),
)


def misalignment(runs: Sequence[Run]) -> Section | None:
    """Return what training sees against what decoding keeps, where the run recorded it."""
    rows = [r for r in merged(runs)["results"] if r["category"] is None and r.get("diagnostics")]
    if not rows:
        return None
    table = Table(
        name="misalignment",
        title="Drafting against decoding",
        columns=("drafter", "T", *(title for _, title in _COLUMNS)),
        rows=tuple(
            (
                words(row["drafter"]), words(f"{row['temperature']:g}"),
                *(_diagnostic(row["diagnostics"], name) for name, _ in _COLUMNS),
            )
            for row in rows
        ),
        note="Greedy path: the drafter's likeliest token at every depth. Greedy pruned: steps whose tree cuts it "
        "short. Accepted is greedy: of the steps that kept a draft token, those that kept none off that path. "
        "Greedy path, tree path: draft tokens kept per step, on that path and in the tree. Brier: mean squared "
        "error of the drafter's confidence that a token is kept. Nodes for 95 %: the smallest tree, most "
        "confident nodes first, that holds 95 % of what is kept.",
        wide=True,
    )  # fmt: skip
    text = (
        "A drafter is trained along one path, but decoding keeps whatever branch of the tree the target agrees with. "
        "[[table:misalignment]] measures that gap: how often the path the drafter itself prefers is the accepted "
        "one, and how well its confidence, by which trees are pruned, says what will be kept."
    )
    blocks: list[Block] = [text, table]
    mode = (rows[0]["mode"], rows[0]["temperature"])
    bins = {
        row["drafter"]: row["diagnostics"]["calibration"]
        for row in plotted(runs)
        if row["category"] is None
        and row.get("diagnostics")
        and row["diagnostics"].get("calibration")
        and (row["mode"], row["temperature"]) == mode
    }
    if bins:
        blocks.append(
            Picture(
                name="calibration",
                title="Calibration of the drafters' confidence",
                note="Share of draft tokens kept, over the drafter's own confidence; on the dashed line the two agree. "
                f"Bins of fewer than {plots.FEWEST_IN_A_BIN} tokens are left out.",
                alt="Lines of the share of draft tokens kept over the draft confidence, with the diagonal.",
                figure=plots.calibration_figure(bins, merged(runs) | {"results": plotted(runs)}),
            )
        )
    return Section("Misalignment of drafting and decoding", tuple(blocks))


def _diagnostic(found: dict[str, float | None], name: str) -> Cell:
    value = found.get(name)
    if name.endswith("_share"):
        return percent(value, 1)
    return estimate(value, None, 3 if name == "brier" else 0 if name == "nodes_for_95" else 2)


# --- limitations ---------------------------------------------------------------------------------------------------


def limitations(runs: Sequence[Run]) -> Section:
    """Return what these runs cannot say, from their own facts."""
    by_run = {run.label: _of_run(run) for run in runs}
    common = [text for text in by_run[runs[0].label] if all(text in found for found in by_run.values())]
    items = [f"**Run {label}.** {text}" if label else text for label, found in by_run.items() for text in found
             if not (label and text in common)]  # fmt: skip
    items += common if len(runs) > 1 else []
    names = [named(name) for name in RECONSTRUCTED if name in objectives(runs)]
    if names:
        items.append(
            f"**Reconstruction.** {listed(names)} {'is' if len(names) == 1 else 'are'} implemented from what is "
            "public; a "
            "result says nothing about the authors' own code."
        )
    return Section("Limitations", (Bullets(tuple(items)),))


def _of_run(run: Run) -> list[str]:
    items = [_sample(run), _clock(run), _seeds(run), _scale(run)]
    if run.manifest.get("status") not in {None, "complete"}:
        items.append("**Unfinished.** The run was stopped before its end; drafters are compared on what both decoded.")
    git = (run.manifest.get("machine") or {}).get("git") or {}
    if git.get("dirty"):
        items.append("**Commit.** The working copy had uncommitted changes.")
    return [item for item in items if item]


def _sample(run: Run) -> str:
    n = run.summary["num_prompts"]
    effects = detectable_effects(run.summary)
    few = f" Fewer than {_FEW_PROMPTS} prompts make a bootstrap interval itself uncertain." if n < _FEW_PROMPTS else ""
    if not effects:
        return f"**Sample.** {n} prompts.{few}"
    between = run.summary["minimum_detectable_effect"][0]["between"]
    pair = between if between.startswith("the ") else f"two {between} (one seed each, unadjusted)"
    return (
        f"**Sample.** {n} prompts. The smallest difference between {pair} that they show with {100 * POWER:g} % power "
        f"is {listed(effects)}; smaller ones may be there.{few}"
    )


def _clock(run: Run) -> str:
    machine = run.manifest.get("machine") or {}
    load = (machine.get("cpu") or {}).get("load_average")
    busy = f" Its load average before the run was {fixed(load[0], 1)}." if load else ""
    return f"**One machine.** All times are of one machine.{busy} {control_words(run)}"


def control_words(run: Run, where: str = "") -> str:
    """Return what the A/A controls say, or that there are none.

    Args:
        run: With or without repeats.
        where: Beginning of the sentence.
    """
    text = _control_words(run)
    return where + text[0].lower() + text[1:] if where else text


def _control_words(run: Run) -> str:
    if not run.control:
        return "No baseline was measured twice, so how noisy the clock is remains unknown."
    bad = [name for name, holds in run.control.items() if not holds]
    if bad:
        return (
            f"The control interval of {listed([named(name) for name in bad])}, measured against itself, excludes 1: "
            "the machine was too noisy for speeds to be trusted."
        )
    whose = (
        "The first repeat against the second of each baseline that has two"
        if run.config.get("once")
        else ("Each baseline's first repeat against its second")
    )
    return (
        f"{whose} gives 1 within its interval (Student's t, "
        f"{100 * CONTROL_CONFIDENCE:g} % for all of them together): this check finds no fault with the clock."
    )


def _seeds(run: Run) -> str:
    if run.analysis is not None:
        num_seeds = max(len(arm["seeds"]) for arm in run.analysis["arms"])
        if num_seeds >= 3:
            return (
                f"**Seeds.** {spelled(num_seeds).capitalize()} training seeds per arm; the spread between seeds is "
                "part of the interval of every change, and is itself estimated from so few."
            )
    trained = [name for name, method in run.methods.items() if (method.get("training") or {}).get("tokens")]
    if not trained:
        return ""
    return (
        "**Seeds.** Each drafter was trained with one seed. The intervals are over prompts, so they say which of these "
        "drafters is better, not which way of training is."
    )


def _scale(run: Run) -> str:
    limit = int(run.frames[0]["max_new_tokens"].max())
    short = (
        f" Answers stop at {limit} tokens; longer ones repeat themselves more and may favour other drafters."
        if limit < _SMALL_TARGET_TOKENS
        else ""
    )
    return (
        f"**Scale.** One target, {named(run.summary['target'])}, at batch size 1.{short} What pays here need not "
        "pay on "
        "a larger model, another device or a busy server."
    )
