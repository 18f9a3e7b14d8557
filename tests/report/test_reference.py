"""Tables of the reference reports, recomputed from ``records.jsonl`` by a few lines that share nothing with them."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict

import pytest
from tests.report.recompute import (
    against_reference,
    faster_baseline,
    mean_log_ratio,
    speed_difference,
    tau,
    tau_difference,
    tokens_per_s,
)
from tests.report.recorded import (
    ABLATIONS,
    CONTESTS,
    RUNS,
    answers,
    arms,
    baselines,
    by_seed,
    categories,
    changed_arms,
    chosen,
    config,
    control_arms,
    diagnosed,
    drafters,
    folder,
    manifest,
    methods,
    reference,
    size_of,
    table,
    tables,
    temperatures,
    trained,
)

DASH = "\N{EN DASH}"
every_report = pytest.mark.parametrize("name", RUNS)
contests = pytest.mark.parametrize("name", CONTESTS)
ablations = pytest.mark.parametrize("name", ABLATIONS)


def same(text, value):
    return float(text) == pytest.approx(value, rel=1e-9, abs=1e-9)


@every_report
def test_accepted_length_speed_and_throughput(name):
    rows = table(name, "main")
    assert [(row["drafter"], float(row["T"])) for row in rows] == [
        (drafter, temperature) for temperature in temperatures(name) for drafter in drafters(name)
    ]
    for row in rows:
        of = chosen(name, row["drafter"], row["T"])
        assert same(row["τ"], tau(of))
        assert same(row["tokens/s"], tokens_per_s(of))
        for baseline in baselines(name):
            ratio = mean_log_ratio(of, chosen(name, baseline, row["T"]))
            assert same(row[f"speedup vs {baseline}"], math.exp(ratio))


@every_report
def test_every_definition_of_tau(name):
    for row in table(name, "tau-definitions"):
        of = [a for a in chosen(name, row["drafter"], row["T"]) if a["steps"]["num_emitted"]]
        emitted = [sum(a["steps"]["num_emitted"]) for a in of]
        counts = [len(a["steps"]["num_emitted"]) for a in of]
        kept = sum(sum(a["steps"]["num_accepted"]) for a in of)
        by_prompt = defaultdict(lambda: [0, 0])
        for a, e, n in zip(of, emitted, counts, strict=True):
            by_prompt[a["prompt_id"]][0] += e
            by_prompt[a["prompt_id"]][1] += n
        steps = sum(counts)
        assert same(row["pooled"], sum(emitted) / steps)
        assert same(row["prompt mean"], sum(e / n for e, n in by_prompt.values()) / len(by_prompt))
        assert same(row["answer mean"], sum(e / n for e, n in zip(emitted, counts, strict=True)) / len(of))
        assert same(row["without bonus"], kept / steps)
        assert same(row["accepted plus one"], 1 + kept / steps)
        assert same(row["with prefill"], (sum(emitted) + len(of)) / (steps + len(of)))


@contests
def test_speed_and_accepted_length_by_category(name):
    for row in table(name, "tau-by-category"):
        for drafter in row.keys() & set(drafters(name)):
            assert same(row[drafter], tau(chosen(name, drafter, row["T"], row["category"])))
    for row in table(name, "speedup-by-category"):
        baseline = chosen(name, faster_baseline(name, row["T"]), row["T"])
        for drafter in row.keys() & set(drafters(name)):
            of = chosen(name, drafter, row["T"], row["category"])
            assert same(row[drafter], math.exp(mean_log_ratio(of, baseline)))


@contests
def test_speedups_on_new_domains(name):
    for row in table(name, "domains"):
        baseline = chosen(name, faster_baseline(name, row["T"]), row["T"])
        of = [chosen(name, row["drafter"], row["T"], category) for category in set(categories(name).values())]
        means = [mean_log_ratio(of_category, baseline) for of_category in of]
        assert same(row["speedup, t"], math.exp(sum(means) / len(means)))
        assert same(row["speedup, bootstrap"], math.exp(sum(means) / len(means)))


@every_report
def test_acceptance_time_and_losslessness(name):
    for row in table(name, "acceptance"):
        of = chosen(name, row["drafter"], row["T"])
        columns = ("depth", "num_accepted", "num_emitted")
        steps = [step for a in of for step in zip(*(a["steps"][column] for column in columns), strict=True)]
        for column, told in row.items():
            if column.startswith("depth") and told != DASH:
                depth = int(column.removeprefix("depth "))
                goes_on = [(deepest, kept) for deepest, kept, emitted in steps if kept >= depth or emitted > kept]
                reached = [kept for deepest, kept in goes_on if deepest >= depth and kept >= depth - 1]
                assert same(told, sum(kept >= depth for kept in reached) / len(reached))
    for row in table(name, "time"):
        of = chosen(name, row["drafter"], row["T"])
        decoding = sum(a["decode_s"] for a in of)
        shares = [sum(sum(a["steps"][part]) for a in of) / 1e3 / decoding for part in ("draft_ms", "verify_ms")]
        found = [row["drafter's share"], row["target's share"], row["everything else"]]
        assert all(map(same, found, [*shares, 1 - sum(shares)]))
    for row in table(name, "lossless"):
        verdicts = [a["lossless"] for a in chosen(name, row["drafter"], row["T"])]
        assert [int(row[column]) for column in ("compared", "equal", "near-tie", "violation")] == [
            len(verdicts), verdicts.count("equal"), verdicts.count("near_tie"), verdicts.count("violation")
        ]  # fmt: skip
        of = chosen(name, row["drafter"], row["T"])
        gaps = sorted(abs(a["divergence"]["gap"]) for a in of if a["lossless"] == "near_tie")
        if gaps:
            assert same(row["median gap"], gaps[len(gaps) // 2])
            assert same(row["largest gap"], gaps[-1])
        else:
            assert row["median gap"] == row["largest gap"] == DASH


@pytest.mark.parametrize("name", tuple(filter(diagnosed, RUNS)))
def test_misalignment(name):
    for row in table(name, "misalignment"):
        of = [a["diagnostics"] for a in chosen(name, row["drafter"], row["T"])]
        total = {key: sum(d[key] or 0 for d in of) for key in of[0] if key.startswith(("num_", "greedy", "tree"))}
        assert same(row["accepted is greedy, %"], total["num_greedy_steps"] / total["num_kept_steps"])
        assert same(row["greedy path"], total["greedy_tokens"] / total["num_steps"])
        assert same(row["tree path"], total["tree_tokens"] / total["num_steps"])
        ranks = defaultdict(int)
        for d in of:
            for rank, kept in enumerate(d["kept_by_rank"]):
                ranks[rank] += kept
        smallest = next(b for b in range(99) if sum(ranks[rank] for rank in range(b)) >= 0.95 * total["tree_tokens"])
        assert int(row["nodes for 95 %"]) == smallest
        if of[0]["calibration"] is not None:
            assert same(row["greedy pruned, %"], total["num_pruned"] / total["num_steps"])
            decided = sum(sum(d["calibration"]["count"]) for d in of)
            assert same(row["Brier"], sum(d["calibration"]["brier_sum"] for d in of) / decided)
        else:
            assert row["greedy pruned, %"] == row["Brier"] == DASH


@contests
def test_what_training_cost(name):
    rows = table(name, "training")
    assert [row["drafter"] for row in rows] == list(trained(name))
    for row in rows:
        cost = trained(name)[row["drafter"]]
        assert (row["recipe"], int(row["tokens"])) == (cost["recipe"], cost["tokens"])
        assert int(row["seconds"]) == round(cost["seconds"])
        assert row.get("target forwards") == (str(cost["target_forwards"]) if "target_forwards" in cost else None)


@ablations
def test_every_arm_against_the_reference(name):
    rows = table(name, "ablation")
    assert [(float(row["T"]), row["arm"]) for row in rows] == [
        (t, arm) for t in temperatures(name) for arm in arms(name)
    ]
    for row in rows:
        arm = arms(name)[row["arm"]]
        of = chosen(name, row["arm"], row["T"])
        assert same(row["τ"], tau(of))
        assert row["seeds"] == (str(len(arm["seeds"])) if arm["seeds"] else DASH)
        budget = [round(arm["budget"][key]) for key in ("tokens", "target_forwards", "wall_s")]
        assert [int(row[column]) for column in ("tokens", "target forwards", "seconds")] == budget
        if row["arm"] == reference(name):
            assert row["change of τ, %"] == row["change of speed, %"] == row["p"] == row["p "] == DASH
            continue
        change = tau(of) / tau(chosen(name, reference(name), row["T"])) - 1
        assert same(row["change of τ, %"], 100 * change)
        pairs = zip(*by_seed(name, row["arm"], row["T"]), strict=True)
        ratios = [mean_log_ratio(ours, theirs) for ours, theirs in pairs]
        assert same(row["change of speed, %"], 100 * math.expm1(sum(ratios) / len(ratios)))


@ablations
def test_what_is_off_or_changed_in_an_arm(name):
    for row in table(name, "ablation"):
        arm = arms(name)[row["arm"]]
        objective = arm["change"].get("objective")
        nothing = "control" if arm["control"] else DASH
        if arm["disabled"] or objective or not arm["change"]:
            told = f"objective {objective['type']}" if objective else nothing
            assert row["off or changed"] == (", ".join(arm["disabled"]) or told)
        else:
            assert all(str(value) in row["off or changed"] for value in arm["change"].values())


@every_report
def test_what_was_measured_on_what(name):
    m, text = manifest(name), (folder(name) / "records.jsonl").read_bytes()
    cpu, versions = m["machine"]["cpu"], m["machine"]["versions"]
    repeats = {1: "once", 2: "twice"}[len({a["repeat"] for a in answers(name)})]
    once = "".join(f", `{baseline}` once" for baseline in config(name).get("once", []))
    modes = {a["temperature"]: (a["mode"], a["rule"]) for a in answers(name) if a["kind"] == "drafter"}
    expected = {
        "run": m["run_id"],
        "date": m["finished"][:10],
        "target": f"{m['target']}, weights {m['target_fingerprint'][:12]}",
        "dtype": f"{m['dtype']} on {m['device']}",
        "suite": f"{m['suite']}, version {m['suite_version']}",
        "prompts": f"{len({a['prompt_id'] for a in answers(name)})}, each {repeats}{once}",
        "answers": f"up to {config(name)['generation']['max_new_tokens']} new tokens",
        "modes": "; ".join(f"{mode} (T = {t:g}), rule {rule}" for t, (mode, rule) in sorted(modes.items())),
        "processor": f"{cpu['model']}, {cpu['num_usable_cores']} cores, "
        f"{m['machine']['memory']['total_bytes'] / 2**30:.0f} GiB",
        "versions": ", ".join(f"{p} {versions[p]}" for p in ("vsdbench", "python", "torch", "transformers")),
        "records": f"{len(answers(name))}, sha256 {hashlib.sha256(text).hexdigest()[:16]}",
    }
    if m["machine"]["git"]:
        dirty = " with changes" if m["machine"]["git"]["dirty"] else ""
        expected["commit"] = m["machine"]["git"]["commit"][:12] + dirty
    assert {row["setting"]: row["value"] for row in table(name, "setup")} == expected


@every_report
def test_what_drafted(name):
    types = {drafter["name"]: drafter["type"] for drafter in config(name)["drafters"]}
    rows = table(name, "drafters")
    assert [row["drafter"] for row in rows] == drafters(name)
    for row in rows:
        method, tree = methods(name)[row["drafter"]], chosen(name, row["drafter"], 0)[0]["tree"]
        assert row["type"] == types[row["drafter"]]
        assert row["objective"] == (method["objective"] or DASH)
        assert row["tree"] == f"{tree['kind']} {size_of(tree)}"
        assert row["recipe"] == method["training"].get("recipe", DASH)


@every_report
def test_what_was_predicted_of_automatic_trees(name):
    of = {(drafter, t): chosen(name, drafter, t) for t in temperatures(name) for drafter in drafters(name)}
    told = {key: methods(name)[key[0]].get("trees", {}).get(own[0]["mode"]) for key, own in of.items()}
    expected = [(key, tree) for key, tree in told.items() if tree]
    assert ("trees" in tables(name)) == bool(expected)
    for row, ((drafter, temperature), predicted) in zip(
        table(name, "trees") if expected else [], expected, strict=True
    ):
        own, plain = of[drafter, temperature], chosen(name, "autoregressive", temperature)
        assert (row["drafter"], row["T"]) == (drafter, f"{temperature:g}")
        assert row["tree"] == size_of(own[0]["tree"])
        assert same(row["τ predicted"], predicted["predicted_tau"])
        assert same(row["speedup predicted"], predicted["predicted_speedup"])
        assert same(row["τ measured"], tau(own))
        assert same(row["speedup measured"], math.exp(mean_log_ratio(own, plain)))


@contests
def test_our_figures_beside_published_ones(name):
    """The rows of others are citations, which no record can tell."""
    ours = [row for row in table(name, "published") if row["source"].startswith("ours")]
    plain = chosen(name, faster_baseline(name, 0), 0)
    speedups = {d: math.exp(mean_log_ratio(chosen(name, d, 0), plain)) for d in drafters(name)}
    best = max(speedups, key=lambda drafter: speedups[drafter])
    assert ours[0]["source"] == f"ours: {best}"
    assert same(ours[0]["τ"], tau(chosen(name, best, 0)))
    assert ours[0]["speedup"] == f"{speedups[best]:.2f}\N{MULTIPLICATION SIGN}"
    types = {drafter["name"]: drafter["type"] for drafter in config(name)["drafters"]}
    objective = {drafter: methods(name)[drafter]["objective"] for drafter in drafters(name)}
    pairs = [
        (vsd, next(kl for kl in drafters(name) if (objective[kl], types[kl]) == ("kl", types[vsd])))
        for vsd in drafters(name) if objective[vsd] == "vsd"
    ]  # fmt: skip
    assert [row["source"] for row in ours[1:]] == [f"ours: {vsd} against {kl}" for vsd, kl in pairs]
    for row, pair in zip(ours[1:], pairs, strict=True):
        sides = [[chosen(name, drafter, 0)] for drafter in pair]
        for column, difference in (("τ", tau_difference(*sides)), ("speedup", speed_difference(*sides))):
            assert same(row[column], difference.change_pct)
            assert same(row[f"{column} low"], difference.ci_pct[0])
            assert same(row[f"{column} high"], difference.ci_pct[1])


@ablations
def test_the_ablation_beside_published_figures(name):
    ours = [row for row in table(name, "published") if row["source"].startswith("ours")]
    kl = [arm for arm in changed_arms(name) if (arms(name)[arm]["change"].get("objective") or {}).get("type") == "kl"]
    beside = [*kl, *control_arms(name)]
    assert [row["source"] for row in ours] == [f"ours: {reference(name)} against {arm}" for arm in beside]
    for row, arm in zip(ours, beside, strict=True):
        for column, measure in (("τ", "tau"), ("speedup", "speed")):
            difference = against_reference(name, arm, 0, measure)
            assert same(row[column], 100 * math.expm1(-difference.value))
            low, high = (math.log1p(end / 100) for end in difference.ci_pct)
            assert same(row[f"{column} low"], 100 * math.expm1(-high))
            assert same(row[f"{column} high"], 100 * math.expm1(-low))


@every_report
def test_no_table_is_left_out(name):
    """Every table that a report has is recomputed here or, its intervals and p-values, in the file beside."""
    expected = {"acceptance", "drafters", "lossless", "main", "published", "setup", "tau-definitions", "time"}
    expected |= {"misalignment"} if diagnosed(name) else set()
    if name in ABLATIONS:
        expected |= {"ablation"}
    else:
        expected |= {"domains", "speedup-by-category", "tau-by-category", "training"}
    expected |= {"trees"} if any(method.get("trees") for method in methods(name).values()) else set()
    assert tables(name) == expected


@every_report
def test_no_row_is_left_out(name):
    """Drafters, or the arms of an ablation, and categories with all prompts last, at every temperature."""
    rows = {
        "drafter": arms(name) if name in ABLATIONS else drafters(name),
        "category": [*dict.fromkeys(sorted(categories(name).values())), "all"],
    }
    for of in tables(name) - {"main", "ablation", "drafters", "training", "setup", "published", "trees"}:
        identity = next(iter(table(name, of)[0]))
        expected = [(row, temperature) for temperature in temperatures(name) for row in rows[identity]]
        assert [(row[identity], float(row["T"])) for row in table(name, of)] == expected
