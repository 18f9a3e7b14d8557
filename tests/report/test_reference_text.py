"""What the reference reports say in words: every number of the text recomputed, none left over."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import typst
from tests.report.recompute import (
    adjusted,
    against_reference,
    controls,
    detectable_pct,
    faster_baseline,
    lead,
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
    answers,
    arms,
    baselines,
    categories,
    changed_arms,
    chosen,
    config,
    control_arms,
    counted,
    drafters,
    fixed,
    listed,
    manifest,
    prose,
    reference,
    size_of,
    source,
    spelled,
    temperatures,
    trained,
    trees,
)

every_report = pytest.mark.parametrize("name", RUNS)
CONSTANTS = (
    r"T = [01](?!\d)", r"95 % (intervals|BCa|interval)", r"99 % for all of them together", r"Student's t",
    r"batch size 1\b", r"temperature above 0", r"gives 1 within", r"excludes [01]\b", r"with 80 % power",
    r"is below 0\.05", r"Fewer than 30 prompts", r"at depth 1 it says", r"(for|holds) 95 %( of what is kept)?",
    r"trees of 60 tokens, depth 7", r"EAGLE-3", r"GSM8K", r"1 \+ that", r"fewer than 10 tokens",
    r"above 0 where", r"SmolLM2-135M-Instruct", r"4-bit weights", r"Q4_1",
)  # fmt: skip
"""Numbers of the wording itself, which are the same in every report."""


def interval(ends, digits=2, what=""):
    return f" ({what}{fixed(ends[0], digits)} to {fixed(ends[1], digits)})"


# --- sentences -----------------------------------------------------------------------------------------------------


def of_everyone(name):
    """What every report says of its run."""
    m = manifest(name)
    speed_and_tau = [detectable_pct(name, temperature) for temperature in temperatures(name)]
    least = [
        f"{fixed(speed, 1)} % in speed and {fixed(tau_, 1)} % in τ at T = {temperature:g}"
        for temperature, (speed, tau_) in zip(temperatures(name), speed_and_tau, strict=True)
    ]
    yield f"{m['target']} · {m['device']} {m['dtype']} · {m['finished'][:10]} · run {m['run_id']}"
    yield from trust(name)
    yield (
        f" {len(categories(name))} prompts. The smallest difference between two trained drafters (one seed each, "
        f"unadjusted) that they show with 80 % power is {listed(least)}; smaller ones may be there."
    )
    yield f" Its load average before the run was {fixed(m['machine']['cpu']['load_average'][0], 1)}."
    yield f" Answers stop at {config(name)['generation']['max_new_tokens']} tokens;"
    yield from time_shares(name)


def trust(name):
    """Whether answers are lossless and the clock is quiet."""
    verdicts = [a["lossless"] for a in answers(name) if a["kind"] == "drafter"]
    assert verdicts.count("violation") == 0
    if set(verdicts) == {"equal"}:
        yield f"Of {counted(len(verdicts))} answers compared, all equal the baseline's to the last token."
    else:
        yield (
            f"Of {counted(len(verdicts))} answers that were compared, {counted(verdicts.count('equal'))} equal the "
            f"baseline's to the last token, {counted(verdicts.count('near_tie'))} part from it at a near-tie of the "
            "target's own logits, and none is a violation. "
        )
    noisy = [of for of, found in controls(name).items() if not all(low <= 1 <= high for low, high in found)]
    if noisy:
        yield f"The control interval of {listed(noisy)}, measured against itself, excludes 1: the machine was too"
    else:
        yield "gives 1 within its interval" if controls(name) else "No baseline was measured twice"


def time_shares(name):
    drafting, rest = {}, {}
    for temperature in temperatures(name):
        for drafter in shown(name):
            of = chosen(name, drafter, temperature)
            decoding = sum(a["decode_s"] for a in of)
            draft, verify = (sum(sum(a["steps"][part]) for a in of) / 1e3 for part in ("draft_ms", "verify_ms"))
            drafting[temperature, drafter] = draft / decoding
            rest[temperature, drafter] = 1 - (draft + verify) / decoding
    dearest = max(drafting, key=lambda key: drafting[key])
    yield (
        f"Drafting takes up to {100 * drafting[dearest]:.0f} % of it ({dearest[1]}); what is neither drafter nor "
        f"target, the engine's own work, takes at most {100 * max(rest.values()):.1f} %."
    )


def of_a_contest(name):
    """The headline and the verdicts of every temperature, and what categories and budgets are said to be."""
    of_prompts = list(categories(name).values())
    sizes = {of_prompts.count(category) for category in of_prompts}
    yield f"A category has only {' to '.join(map(str, sorted({min(sizes), max(sizes)})))} prompts, so"
    yield f"the geometric mean of {len(set(of_prompts))} categories' own means"
    for temperature in temperatures(name):
        yield from headline(name, temperature)
        speeds = {b: tokens_per_s(chosen(name, b, temperature)) for b in baselines(name)}
        told = [f"{speeds[b]:.1f} tokens/s as {b}" for b in sorted(speeds, key=lambda b: -speeds[b])]
        yield f"Plain decoding at T = {temperature:g} runs at {listed(told)}."
        yield verdict(name, temperature, "tau", "has the largest τ, {} above the next, {}")


def headline(name, temperature):
    plain = faster_baseline(name, temperature)
    best, _, _ = lead(name, temperature, "speed")
    of, beside = chosen(name, best, temperature), chosen(name, plain, temperature)
    others = ", ".join(
        f"{fixed(np.exp(mean_log_ratio(of, chosen(name, b, temperature))), 2)} times as fast as {b}"
        for b in baselines(name) if b != plain
    )  # fmt: skip
    how = "With greedy decoding (T = 0)" if temperature == 0 else f"At T = {temperature:g}"
    yield (
        f"{how}, the fastest of {len(drafters(name))} drafters, {best}, decodes "
        f"{fixed(np.exp(mean_log_ratio(of, beside)), 2)} times as fast"
        f"{interval(speedup_interval(of, beside), what='95 % interval ')} as the faster baseline, {plain} at "
        f"{fixed(tokens_per_s(beside), 1)} tokens/s{f' ({others})' if others else ''}, with τ = {fixed(tau(of), 2)}"
        f"{interval(tau_interval(of))}. "
    )
    yield verdict(name, temperature, "speed", "is {} faster than the next, {}")


def verdict(name, temperature, measure, wording):
    best, second, ahead = lead(name, temperature, measure)
    by = f"{fixed(ahead.change_pct, 1)} %{interval(ahead.ci_pct, 1, '95 % interval ')}"
    sure = "whose interval excludes 0" if ahead.certain else f"that {ahead.n} prompts do not establish"
    return f"At T = {temperature:g} {best} {wording.format(by, second)}, a difference {sure}."


def of_trees(name):
    """What a larger tree gives a drafter that was measured with several."""
    plain = chosen(name, faster_baseline(name, temperatures(name)[0]), temperatures(name)[0])
    for drafter, members in trees(name).items():
        ends = [(size, chosen(name, of, temperatures(name)[0])) for size, of in (members[0], members[-1])]
        small, large = (f"τ = {fixed(tau(of), 2)} with {size}" for size, of in ends)
        slow, fast = (fixed(np.exp(mean_log_ratio(of, plain)), 2) for _, of in ends)
        yield f"{drafter} has {small} draft tokens and {large}; its speedup goes from {slow} to {fast}."
    measured = [of for members in trees(name).values() for _, of in members]
    whole = [chosen(name, of, temperatures(name)[0])[0]["tree"] for of in measured]
    if told := dict.fromkeys(size_of(tree) for tree in whole):
        least = ", behind ≥ the least probability of a node that is sent and of a level that is drafted"
        least = least if any("≥" in size for size in told) else ""
        yield f" Trees, as budget/depth/children per node{least}: {', '.join(told)}."


def of_an_ablation(name):
    """What is established of its arms by decoding at the lowest temperature, and how its controls differ."""
    first = temperatures(name)[0]
    of = chosen(name, reference(name), first)
    seeds = max(len(arm["seeds"]) for arm in arms(name).values())
    yield f"{reference(name)} reaches τ = {fixed(tau(of), 2)}{interval(tau_interval(of))} over {seeds} training seeds "
    yield f"and {len(categories(name))} prompts."
    yield f" {spelled(seeds).capitalize()} training seeds per arm;"
    p = adjusted(name, first, "tau")
    parts = [arm for arm in changed_arms(name) if not is_rival(name, arm)]
    sure = {arm: against_reference(name, arm, first, "tau").value for arm in parts if p[arm] < 0.05}
    for side, wording in ((-1, "lower, so that what is taken away helps,"), (1, "higher")):
        if told := [told_of(name, arm) for arm, value in sure.items() if side * value > 0]:
            yield f"τ is {wording} in {listed(told)}."
    if rest := [arm for arm in parts if arm not in sure]:
        yield f"No change of τ is established for {listed(rest)}."
    yield from of_rivals(name)
    controls_ = control_arms(name)
    told = listed([told_of(name, arm) for arm in controls_])
    unsure = [arm for arm in controls_ if p[arm] >= 0.05]
    if unsure != controls_:
        assert len(controls_) > 1, "say it of one"
        open_ = f"; not established: {listed(unsure)}" if unsure else ""
        yield f"In τ, the controls differ from {reference(name)}: {told}{open_}."
        return
    none = "no control's difference from {} is" if len(controls_) > 1 else "the control's difference from {} is not"
    yield f"In τ, {none.format(reference(name))} established: {told}."


def is_rival(name, arm):
    """Whether an arm is another way to train, and not the reference without a part."""
    return "objective" in arms(name)[arm]["change"] or not arms(name)[arm]["disabled"]


def of_rivals(name):
    """How other objectives and settings stand to the reference, and what an arm's training took."""
    rivals = [arm for arm in changed_arms(name) if is_rival(name, arm)]
    if not rivals:
        return
    for temperature in temperatures(name):
        for measure, words in (("speed", "decoding speed"), ("tau", "τ")):
            yield f"In {words} at T = {temperature:g}, {'; '.join(standings(name, rivals, temperature, measure))}."
    seconds = {
        arm: np.mean([trained(name)[method]["seconds"] for method in told["methods"]])
        for arm, told in arms(name).items()
        if told["seeds"]
    }
    least, most = (of(seconds, key=seconds.get) for of in (min, max))
    took = {arm: fixed(value, 0) for arm, value in seconds.items()}
    yield (
        f"Trained on equally many tokens, one seed took from {took[least]} s ({least}) to {took[most]} s ({most}); "
        f"{reference(name)} took {took[reference(name)]} s."
    )


def standings(name, rivals, temperature, measure):
    """Who is ahead of the reference and who behind it after Holm's adjustment, and of how many that is not known."""
    difference = {arm: against_reference(name, arm, temperature, measure) for arm in rivals}
    p = adjusted(name, temperature, measure)
    for side, where in ((1, "ahead of"), (-1, "behind")):
        if group := [arm for arm in rivals if p[arm] < 0.05 and side * difference[arm].value > 0]:
            yield f"{where} {reference(name)}: {listed([told_of(name, arm, temperature, measure) for arm in group])}"
    rest = [arm for arm in rivals if p[arm] >= 0.05]
    if len(rest) > 4:
        by_size = sorted(rest, key=lambda arm: difference[arm].value)
        ends = (told_of(name, arm, temperature, measure) for arm in (by_size[0], by_size[-1]))
        told = f"{len(rest)} arms, from {' to '.join(ends)}"
    else:
        told = listed([told_of(name, arm, temperature, measure) for arm in rest])
    which = "not" if len(rest) < len(rivals) else f"no difference from {reference(name)} is"
    if rest:
        yield f"{which} established after Holm's adjustment: {told}"


def told_of(name, arm, temperature=None, measure="tau"):
    lowest = temperatures(name)[0] if temperature is None else temperature
    difference = against_reference(name, arm, lowest, measure)
    return f"{arm} by {fixed(difference.change_pct, 1)} %{interval(difference.ci_pct, 1)}"


def sentences(name):
    yield from of_everyone(name)
    yield from of_an_ablation(name) if name in ABLATIONS else of_a_contest(name)
    yield from of_trees(name)


@every_report
def test_every_number_of_the_text(name):
    text = prose(name)
    for sentence in sentences(name):
        assert sentence in text, sentence
        text = text.replace(sentence, " ")
    for words in [manifest(name)["target"], *sorted(drafters(name), key=len)[::-1], *CONSTANTS]:
        text = re.sub(words if words in CONSTANTS else re.escape(words), " ", text)
    left = [text[max(0, m.start() - 40) : m.end() + 20] for m in re.finditer(r"(?<![a-z])\d", text)]
    assert left == []


@every_report
def test_the_commands_are_those_of_the_run(name):
    m = manifest(name)
    again = m.get("command") or (
        f"vsdbench run results/{RUNS[name]}/config.yaml" if name in CONTESTS else
        f"vsdbench ablate {m['ablation']['recipe']}  # and the changes in results/{RUNS[name]}/ablation.yaml"
    )  # fmt: skip
    lines = ("pip install -c constraints.txt .", again, f"vsdbench report {RUNS[name]}")
    assert f"#commands({', '.join(map(json.dumps, lines))})\n" in source(name)


@every_report
def test_sources_are_numbered_as_they_are_cited(name):
    text, _, sources = source(name).partition("#references(")
    cited = list(dict.fromkeys(map(int, re.findall(r"cited\((\d+)\)", text))))
    assert cited == list(range(1, 1 + len(re.findall(r'"(?:[^"\\]|\\.)*"', sources))))


# --- pages ---------------------------------------------------------------------------------------------------------


@every_report
def test_the_pages_are_set_from_the_text_and_figures_beside_them(name):
    report = ROOT / "reports/reference" / name
    moment = manifest(name)["finished"]
    pdf, warnings = typst.compile_with_warnings(
        report / "report.typ", root=report, format="pdf", ignore_system_fonts=True,
        timestamp=int(np.datetime64(moment[:19], "s").astype(int)),
    )  # fmt: skip
    assert not warnings
    assert pdf == report.with_suffix(".pdf").read_bytes()
