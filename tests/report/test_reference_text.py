"""What the reference reports say in words and print in cells: every number of the text recomputed, none left over."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import typst
from tests.report.recompute import (
    ABLATION,
    CONTESTS,
    ROOT,
    RUNS,
    answers,
    baselines,
    by_seed,
    chosen,
    config,
    controls,
    detectable_pct,
    drafters,
    faster_baseline,
    fixed,
    lead,
    listed,
    manifest,
    mean_log_ratio,
    number,
    printed_rows,
    prose,
    shown_arms,
    speedup_interval,
    tau,
    tau_difference,
    tau_interval,
    temperatures,
    tokens_per_s,
)

every_report = pytest.mark.parametrize("name", RUNS)
SHARES = ("greedy pruned, %", "accepted is greedy, %")
"""Columns whose CSV has shares; those of two tables are shares altogether."""
CONSTANTS = (
    r"T = [01](?!\d)", r"95 % (intervals|BCa|interval)", r"99 % for all of them together", r"Student's t",
    r"batch size 1\b", r"temperature above 0", r"gives 1 within", r"leaves out [01]\b", r"with 80 % power",
    r"is below 0\.05", r"Fewer than 30 prompts", r"at depth 1 it says", r"to hold 95 % of what is kept",
    r"trees of 60 tokens, depth 7", r"EAGLE-3", r"GSM8K", r"; 1 \+ kept;",
)  # fmt: skip
"""Numbers of the wording itself, which are the same in every report."""


def interval(ends, digits=2, what=""):
    return f" ({what}{fixed(ends[0], digits)} to {fixed(ends[1], digits)})"


# --- sentences -----------------------------------------------------------------------------------------------------


def of_everyone(name):
    """What every report says of its run."""
    m = manifest(name)
    verdicts = [a["lossless"] for a in answers(name) if a["kind"] == "drafter"]
    assert verdicts.count("violation") == 0
    held = [low <= 1 <= high for low, high in controls(name)]
    assert all(held)
    speed_and_tau = [detectable_pct(name, temperature) for temperature in temperatures(name)]
    least = [
        f"{fixed(speed, 1)} % in speed and {fixed(tau_, 1)} % in τ at T = {temperature:g}"
        for temperature, (speed, tau_) in zip(temperatures(name), speed_and_tau, strict=True)
    ]
    yield f"{m['target']} · {m['device']} {m['dtype']} · {m['finished'][:10]} · run {m['run_id']}"
    yield (
        f"Of {len(verdicts)} answers that were compared, {verdicts.count('equal')} equal the baseline's to the last "
        f"token, {verdicts.count('near_tie')} part from it at a near-tie of the target's own logits, and none is a "
        "violation. "
    )
    yield "gives 1 within its interval" if held else "No baseline was measured twice"
    yield (
        f" {len({a['prompt_id'] for a in answers(name)})} prompts. The smallest difference between trained drafters "
        f"that they show with 80 % power is {listed(least)}; smaller ones may be there."
    )
    yield f" Its load average before the run was {fixed(m['machine']['cpu']['load_average'][0], 1)}."
    yield f" Answers stop at {config(name)['generation']['max_new_tokens']} tokens;"
    yield from time_shares(name)


def time_shares(name):
    drafting, rest = {}, {}
    for temperature in temperatures(name):
        for drafter in drafters(name) if name != ABLATION else shown_arms():
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
    category = {a["prompt_id"]: a["category"] for a in answers(name)}
    sizes = sorted({list(category.values()).count(which) for which in category.values()})
    yield f"A category has {' to '.join(map(str, sizes))} prompts, so"
    yield f"the geometric mean of {len(set(category.values()))} categories' own means"
    for temperature in temperatures(name):
        yield from headline(name, temperature)
        speeds = {b: tokens_per_s(chosen(name, b, temperature)) for b in baselines(name)}
        told = [f"{speeds[b]:.1f} tokens/s as {b}" for b in sorted(speeds, key=lambda b: -speeds[b])]
        yield f"Plain decoding at T = {temperature:g} runs at {listed(told)}."
        yield verdict(name, temperature, "tau", "has the largest τ, {} above {}")


def headline(name, temperature):
    plain = faster_baseline(name, temperature)
    best, _, _ = lead(name, temperature, "speed")
    of, beside = chosen(name, best, temperature), chosen(name, plain, temperature)
    [other] = [b for b in baselines(name) if b != plain]
    slower = np.exp(mean_log_ratio(of, chosen(name, other, temperature)))
    how = "Greedily (T = 0)" if temperature == 0 else f"At T = {temperature:g}"
    yield (
        f"{how}, {best}, of {len(drafters(name))} drafters the fastest, decodes "
        f"{fixed(np.exp(mean_log_ratio(of, beside)), 2)} times as fast"
        f"{interval(speedup_interval(of, beside), what='95 % interval ')} as the faster baseline, {plain} at "
        f"{fixed(tokens_per_s(beside), 1)} tokens/s ({fixed(slower, 2)} against {other}), at τ = {fixed(tau(of), 2)}"
        f"{interval(tau_interval(of))}. "
    )
    yield verdict(name, temperature, "speed", "is {} faster than {}")


def verdict(name, temperature, measure, wording):
    best, second, ahead = lead(name, temperature, measure)
    by = f"{fixed(ahead.change_pct, 1)} %{interval(ahead.ci_pct, 1, '95 % interval ')}"
    unsure = f"which {ahead.n} prompts do not establish"
    sure = "a difference that its interval establishes" if ahead.certain else unsure
    return f"At T = {temperature:g} {best} {wording.format(by, second)}, the next, {sure}."


def of_the_hour(name):
    """One drafter with two trees."""
    plain = chosen(name, faster_baseline(name, 0), 0)
    of = {4: chosen(name, "eagle3-kl-hour-auto", 0), 11: chosen(name, "eagle3-kl-hour-wide", 0)}
    for tokens, of_tree in of.items():
        assert {a["tree"]["budget"] for a in of_tree} == {tokens}
    small, large = (f"τ = {fixed(tau(of_tree), 2)} with {tokens}" for tokens, of_tree in of.items())
    slow, fast = (fixed(np.exp(mean_log_ratio(of_tree, plain)), 2) for of_tree in of.values())
    yield f"eagle3-kl-hour has {small} draft tokens and {large}; its speedup goes from {slow} to {fast}."


def of_the_ablation(name):
    reference = chosen(name, "vsd", 0)
    prompts = {a["prompt_id"] for a in reference}
    yield f"vsd reaches τ = {fixed(tau(reference), 2)}{interval(tau_interval(reference))} over 3 training seeds and "
    yield f"{len(prompts)} prompts. No change of τ is established for"
    told = []
    for arm in ("continual-kl", "onpolicy-rkl", "warm-start"):
        difference = tau_difference(*by_seed(arm))
        told.append(f"{arm} by {fixed(difference.change_pct, 1)} %{interval(difference.ci_pct, 1)}")
    yield f"Against vsd, the controls differ: {listed(told)}, of which"
    yield " Three training seeds an arm;"


def sentences(name):
    yield from of_everyone(name)
    yield from of_a_contest(name) if name in CONTESTS else of_the_ablation(name)
    if name == "mtbench-hour":
        yield from of_the_hour(name)


@every_report
def test_every_number_of_the_text(name):
    text = prose(name)
    for sentence in sentences(name):
        assert sentence in text, sentence
        text = text.replace(sentence, " ")
    for words in [manifest(name)["target"], *drafters(name), *CONSTANTS]:
        text = re.sub(words if words in CONSTANTS else re.escape(words), " ", text)
    left = [text[max(0, m.start() - 40) : m.end() + 20] for m in re.finditer(r"(?<![a-z])\d", text)]
    assert left == []


# --- cells ---------------------------------------------------------------------------------------------------------


@every_report
def test_every_printed_cell_is_its_number_rounded(name):
    printed = printed_rows(name)
    assert printed.keys() >= {"setup", "lossless", "published"}
    for key, rows in printed.items():
        text = (ROOT / "reports/reference" / name / "tables" / f"{key}.csv").read_text(encoding="utf-8")
        header, *lines = csv.reader(text.splitlines())
        assert len(rows) == len(lines)
        for row, line in zip(rows, lines, strict=True):
            told = dict(zip(header, line, strict=True))
            columns = [column for column in header if column.removesuffix(" low") == column.removesuffix(" high")]
            for column, (cell, low, high, _) in zip(columns, row, strict=True):
                assert cell
                share = key in {"acceptance", "time"} or column in SHARES
                for shown, suffix in ((cell, ""), (low, " low"), (high, " high")):
                    assert rounds(told.get(column + suffix, ""), shown, scale=100 if share else 1), (key, row)


def rounds(value, shown, *, scale):
    if shown in {value, ""}:
        return True
    if shown == "<0.001":
        return float(value) < 0.001
    shown = shown.removesuffix(" %")
    digits = len(shown.partition(".")[2])
    return abs(scale * float(value) - number(shown)) <= 0.5 * 10**-digits + 1e-8


@pytest.mark.parametrize("name", CONTESTS)
def test_bold_is_the_best_where_it_is_told_apart(name):
    for row in printed_rows(name)["main"]:
        drafter, temperature = row[0][0], float(row[1][0])
        leads = {measure: lead(name, temperature, measure) for measure in ("tau", "speed")}
        best = {measure: found[0] == drafter and found[2].certain for measure, found in leads.items()}
        bold = [bool(cell[3]) for cell in row[2:]]
        assert bold == [best["tau"], *[best["speed"]] * len(baselines(name)), False]


def test_no_arm_of_the_ablation_is_bold():
    """As none has an adjusted p below 0.05."""
    for row in printed_rows(ABLATION)["ablation"]:
        p_values = [number(row[column][0]) for column in (6, 8) if row[0][0] != "vsd"]
        assert not any(cell[3] for cell in row)
        assert all(p >= 0.05 for p in p_values)


# --- pages ---------------------------------------------------------------------------------------------------------


@every_report
def test_the_pages_are_set_from_the_text_and_figures_beside_them(name):
    folder = ROOT / "reports/reference" / name
    moment = manifest(name)["finished"]
    pdf, warnings = typst.compile_with_warnings(
        folder / "report.typ", root=folder, format="pdf", ignore_system_fonts=True,
        timestamp=int(np.datetime64(moment[:19], "s").astype(int)),
    )  # fmt: skip
    assert not warnings
    assert pdf == folder.with_suffix(".pdf").read_bytes()
