"""The report of an ablation: its arms, what they are said to show, how drafts and decoding part; no cell by itself."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict

import numpy as np
import pytest
from tests.conftest import make_record

from vsdbench.report.document import build
from vsdbench.report.effects import cost_words, findings
from vsdbench.report.facts import load_run
from vsdbench.report.paper import write_report

TRUTH = {"vsd": 2.4, "no-car": 1.7, "no-arw": 2.4, "continual-kl": 2.0}
SEEDS = (0, 1)


def counted(steps):
    """Diagnostics that the steps allow: a quarter of all greedy paths pruned, every kept path greedy."""
    kept = sum(step[2] for step in steps)
    return {
        "num_steps": len(steps), "num_pruned": len(steps) // 4, "num_kept_steps": sum(step[2] > 0 for step in steps),
        "num_greedy_steps": sum(step[2] > 0 for step in steps), "greedy_tokens": kept, "tree_tokens": kept,
        "calibration": {"count": [10] * 10, "kept": list(range(10)), "sum_confidence": [i + 0.5 for i in range(10)],
                        "brier_sum": 12.5}, "kept_by_rank": [kept],
    }  # fmt: skip


def ablation_run():
    rng = np.random.default_rng(0)
    members = {"warm-start": 1.6}
    members |= {f"{name}@{seed}": tau + 0.01 * seed for name, tau in TRUTH.items() for seed in SEEDS}
    plain = [(0, 0, 0, 1, 0.0, 10.0, 0.1)] * 40
    records = []
    for prompt in range(12):
        for repeat in (0, 1):
            where = {"prompt_id": f"p{prompt}", "repeat": repeat, "category": ("chat", "code")[prompt % 2]}
            records.append(make_record(
                steps=plain, method="autoregressive", kind="baseline", lossless="reference",
                decode_s=0.404 * rng.lognormal(0, 0.01), **where,
            ))  # fmt: skip
            for method, tau in members.items():
                steps = [(7, 3, int(n), int(n) + 1, 1.0, 10.0, 0.1) for n in rng.binomial(3, (tau - 1) / 3, 60)]
                seconds = sum(step[3] for step in steps) / tau * 0.0111 * rng.lognormal(0, 0.01)
                records.append(make_record(
                    steps=steps, method=method, objective="vsd", decode_s=seconds,
                    tree={"kind": "dynamic", "budget": 7, "depth": 3, "top_k": 4}, diagnostics=counted(steps), **where,
                ))  # fmt: skip
    return records


def told():
    budget = {"tokens": 24_000, "target_forwards": 310, "wall_s": 31.5}
    arms = [
        {"name": name, "disabled": [name[3:]] if name.startswith("no-") else [], "change": {}, "seeds": list(SEEDS),
         "control": name == "continual-kl", "methods": [f"{name}@{seed}" for seed in SEEDS], "budget": budget}
        for name in TRUTH
    ]  # fmt: skip
    nothing = {"tokens": 0, "target_forwards": 0, "wall_s": 0.0}
    warm = {"name": "warm-start", "disabled": [], "change": {}, "control": True, "seeds": [], "methods": ["warm-start"]}
    return {"reference": "vsd", "recipe": "ablation-quickstart", "arms": [*arms, warm | {"budget": nothing}]}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of the report, and the records it is made of."""
    records, folder = ablation_run(), tmp_path_factory.mktemp("ablation")
    run = folder / "run-1"
    run.mkdir()
    (run / "records.jsonl").write_text("".join(record.to_line() for record in records), encoding="utf-8")
    kinds = {record.method: record.kind for record in records}
    methods = [{"name": name, "kind": kind, "training": {}} for name, kind in kinds.items()]
    manifest = {"run_id": "run-1", "device": "cpu", "methods": methods, "ablation": told()}
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_report([run], folder / "r.pdf")
    return folder / "r", records


def rows_of(folder, name):
    return list(csv.DictReader((folder / "tables" / f"{name}.csv").read_text(encoding="utf-8").splitlines()))


def test_arms_are_what_the_records_say(report):
    folder, records = report
    emitted, steps = defaultdict(int), defaultdict(int)
    for record in records:
        arm = record.method.partition("@")[0]
        emitted[arm] += sum(record.steps.num_emitted)
        steps[arm] += len(record.steps.num_emitted)
    tau = {arm: emitted[arm] / steps[arm] for arm in (*TRUTH, "warm-start")}
    rows = {row["arm"]: row for row in rows_of(folder, "ablation")}
    assert list(rows) == [*TRUTH, "warm-start"]
    for arm, row in rows.items():
        assert float(row["τ"]) == pytest.approx(tau[arm], rel=1e-9)
        if arm != "vsd":
            assert float(row["change of τ, %"]) == pytest.approx(100 * (tau[arm] / tau["vsd"] - 1), rel=1e-6)
            assert float(row["change of τ, % low"]) < float(row["change of τ, %"]) < float(row["change of τ, % high"])
    assert (rows["no-car"]["off or changed"], rows["no-car"]["seeds"], rows["no-car"]["tokens"]) == (
        "car",
        "2",
        "24000",
    )
    assert (folder / "figures/forest.svg").is_file()
    assert (folder / "figures/calibration.pdf").is_file()


def test_the_text_has_arms_and_the_files_have_cells(report):
    folder, _ = report
    source = (folder / "report.typ").read_text(encoding="utf-8")
    assert 'title: "Which parts of vsd help? An ablation (suite tiny)"' in source
    assert 'key: "ablation"' in source
    assert "@0" not in source
    assert {row["drafter"] for row in rows_of(folder, "main")} == {
        "warm-start", *(f"{name}@{seed}" for name in TRUTH for seed in SEEDS)
    }  # fmt: skip
    assert {row["drafter"] for row in rows_of(folder, "lossless")} == {*TRUTH, "warm-start"}
    summary = source[source.index("summary:") : source.index("size:")]
    assert re.search(r'lower, so that what is taken away helps, in "; name\("no-car"\)', summary)
    assert "over 2 training seeds and 12 prompts" in summary
    assert 'Of the parts, "; name("car"); " is Confidence-Aware Regularization' in source


def test_misalignment_is_that_of_all_seeds_together(report):
    folder, records = report
    for row in rows_of(folder, "misalignment"):
        of = [r.diagnostics for r in records if r.method.partition("@")[0] == row["drafter"]]
        steps = sum(d.num_steps for d in of)
        assert float(row["greedy pruned, %"]) == pytest.approx(sum(d.num_pruned for d in of) / steps)
        assert float(row["tree path"]) == pytest.approx(sum(d.tree_tokens for d in of) / steps)
        assert float(row["accepted is greedy, %"]) == 1.0
        assert float(row["Brier"]) == pytest.approx(0.125)
        assert math.isclose(float(row["nodes for 95 %"]), 1.0)


def arm(name, by, p, **fields):
    found = {"name": name, "disabled": [], "change": {}, "control": False, "seeds": [0, 1]}
    for measure, value in (("tau", by), ("speedup", by / 2)):
        found |= {f"delta_{measure}_pct": value, f"delta_{measure}_ci": [value - 1, value + 1], f"p_{measure}_holm": p}
    return found | fields


def test_findings_say_what_is_established_and_what_is_not():
    arms = [
        {"name": "vsd", "delta_tau_pct": None, "p_tau_holm": None},
        arm("no-car", -3.0, 0.01, disabled=["car"]), arm("no-kl", 2.0, 0.02, disabled=["kl"]),
        arm("no-arw", 0.5, 0.8, disabled=["arw"]), arm("kl", -1.0, 0.2, control=True),
    ]  # fmt: skip
    said = " ".join(findings({"reference": "vsd", "arms": arms, "equal_tokens": False}))
    assert "helps, in `no-car` by \N{MINUS SIGN}3.0 % (\N{MINUS SIGN}4.0 to \N{MINUS SIGN}2.0)" in said
    assert "τ is higher in `no-kl` by 2.0 % (1.0 to 3.0)" in said
    assert "No change of τ is established for `no-arw`." in said
    assert "In τ, the control's difference from `vsd` is not established: `kl` by" in said
    assert "not trained on equally many tokens" in said


def test_controls_are_said_to_differ_only_where_that_is_established():
    vsd = {"name": "vsd", "delta_tau_pct": None, "p_tau_holm": None}

    def said(*p_values):
        beside = [arm(f"c{i}", 1.0, p, control=True) for i, p in enumerate(p_values)]
        [sentence] = findings({"reference": "vsd", "arms": [vsd, *beside]})
        return sentence

    both = "`c0` by 1.0 % (0.0 to 2.0) and `c1` by 1.0 % (0.0 to 2.0)"
    assert said(0.01) == "In τ, the control differs from `vsd`: `c0` by 1.0 % (0.0 to 2.0)."
    assert said(0.01, 0.02) == f"In τ, the controls differ from `vsd`: {both}."
    assert said(0.01, 0.2) == f"In τ, the controls differ from `vsd`: {both}; not established: `c1`."
    assert said(0.1, 0.2) == f"In τ, no control's difference from `vsd` is established: {both}."


def contest(*arms):
    """The analysis of a contest: its arms have other objectives, and ``seconds`` a seed."""
    vsd = {"name": "vsd", "disabled": [], "change": {}, "control": False, "seeds": [0, 1], "delta_tau_pct": None,
           "delta_speedup_pct": None}  # fmt: skip
    warm = arm("warm-start", -2.0, 0.001, control=True, seeds=[])
    arms = [
        one | {"budget": {"wall_s": seconds}}
        for one, seconds in zip((vsd, *arms, warm), (80, 30, 40, 140, *[0] * len(arms)), strict=False)
    ]
    modes = [
        {"mode": "greedy", "temperature": 0.0, "arms": arms},
        {"mode": "stochastic", "temperature": 1.0, "arms": arms},
    ]
    return {"reference": "vsd", "arms": arms, "modes": modes, "equal_tokens": True}


def objective(name):
    return {"change": {"objective": {"type": name, "options": {}}}}


def test_objectives_are_said_to_be_ahead_or_behind_and_never_to_be_parts():
    m = "\N{MINUS SIGN}"
    arms = (arm("tvd", 3.0, 0.01, **objective("tvd")), arm("ce", -4.0, 0.02, **objective("ce")),
            arm("vsd-full", 0.5, 0.8, change={"objective.options.targets": "full"}))  # fmt: skip
    said = findings(contest(*arms))
    assert said[0] == (
        f"In decoding speed at T = 0, ahead of `vsd`: `tvd` by 1.5 % (0.5 to 2.5); behind `vsd`: `ce` by {m}2.0 % "
        f"({m}3.0 to {m}1.0); not established after Holm's adjustment: `vsd-full` by 0.2 % ({m}0.8 to 1.2)."
    )
    assert said[1].startswith("In τ at T = 0, ahead of `vsd`: `tvd` by 3.0 % (2.0 to 4.0); behind")
    assert [words.startswith(f"In {what} at T = 1") for words, what in zip(said[2:], ("decoding", "τ"), strict=False)]
    assert "helps" not in " ".join(said)
    assert "No change" not in " ".join(said)
    assert said[-1] == f"In τ, the control differs from `vsd`: `warm-start` by {m}2.0 % ({m}3.0 to {m}1.0)."


def test_nothing_established_and_parts_beside_objectives():
    said = " ".join(
        findings(contest(arm("kl", 1.0, 0.3, **objective("kl")), arm("no-car", 2.0, 0.01, disabled=["car"])))
    )
    unsure = "no difference from `vsd` is established after Holm's adjustment: `kl` by 1.0 % (0.0 to 2.0)."
    assert f"In τ at T = 0, {unsure}" in said
    assert "τ is higher in `no-car` by 2.0 %" in said
    assert said.count("`no-car`") == 1


def test_of_many_differences_that_are_not_established_the_ends_are_told():
    m = "\N{MINUS SIGN}"
    many = [arm(f"arm{i}", float(i - 1), 0.5, **objective("kl")) for i in range(5)]
    told = f"from `arm0` by {m}1.0 % ({m}2.0 to 0.0) to `arm4` by 3.0 % (2.0 to 4.0)."
    unsure = "established after Holm's adjustment: 5 arms,"
    assert f"In τ at T = 0, no difference from `vsd` is {unsure} {told}" in findings(contest(*many))
    first, *_ = findings(contest(*many, arm("ce", 9.0, 0.01, **objective("ce"))))[1:]
    assert first.startswith("In τ at T = 0, ahead of `vsd`: `ce` by 9.0 %")
    assert first.endswith(f"; not {unsure} {told}")


def test_the_least_and_the_most_that_training_took():
    both = arm("kl", 1.0, 0.3, **objective("kl")), arm("rkl", 1.0, 0.3, **objective("onpolicy"))
    told = "Trained on equally many tokens, one seed took from 30 s (`kl`) to 80 s (`vsd`)."
    assert cost_words(contest(*both)) == told
    third = arm("gto", 1.0, 0.3, **objective("gto"))
    assert cost_words(contest(*both, third)).endswith("to 140 s (`gto`); `vsd` took 80 s.")
    assert cost_words(contest(*both) | {"equal_tokens": False}) == ""


def test_the_report_of_a_contest_asks_for_the_objective(store_run):
    listed = told()
    for one in listed["arms"][1:3]:  # the same records, as if two parts had been two objectives
        one |= {"disabled": [], "change": {"objective": {"type": one["name"], "options": {}}}}
    run = load_run(store_run(ablation_run(), "run-1", ablation=listed))
    document = build([run], title=None, files="r")
    assert document.title == "Which objective makes decoding faster? Three arms compared (suite tiny)"
    assert re.search(r"In τ at T = 0, behind `vsd`: `no-car` by .*; not .*: `no-arw` by", " ".join(document.summary))
    section = next(section for section in document.sections if section.title == "Contest of objectives")
    assert "differs from `vsd` in the objective or the setting that is named" in section.blocks[0]
    assert not any("part" in block for block in (*document.summary, section.blocks[0]))
    table = next(table for table in document.tables if table.name == "ablation")
    assert [row[1].text for row in table.rows[:3]] == ["\N{EN DASH}", "objective no-car", "objective no-arw"]
