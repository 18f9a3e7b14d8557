"""Tables of the reference reports, recomputed from ``records.jsonl`` by a few lines that share nothing with them."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = {
    "quickstart": "quickstart-cpu-2026-11-24",
    "mtbench-hour": "mtbench-hour-cpu-2026-11-25",
    "ablation-hour": "ablation-hour-cpu-2026-11-25",
}
CONTESTS = ("quickstart", "mtbench-hour")
every_report = pytest.mark.parametrize("name", RUNS)


@cache
def answers(name):
    text = (ROOT / "results/reference" / RUNS[name] / "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def manifest(name):
    return json.loads((ROOT / "results/reference" / RUNS[name] / "manifest.json").read_text(encoding="utf-8"))


def table(name, of):
    text = (ROOT / "reports/reference" / name / "tables" / f"{of}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def chosen(name, drafter, temperature, category=None):
    """The answers of a drafter, or of all seeds of an arm."""
    found = [
        a for a in answers(name)
        if drafter in {a["method"], a["method"].partition("@")[0]} and a["temperature"] == float(temperature)
        and category in {None, "all", a["category"]}
    ]  # fmt: skip
    assert found
    return found


def tau(of):
    return sum(sum(a["steps"]["num_emitted"]) for a in of) / sum(len(a["steps"]["num_emitted"]) for a in of)


def seconds_per_token(of):
    """By prompt, repeats together."""
    seconds, tokens = defaultdict(float), defaultdict(int)
    for a in of:
        seconds[a["prompt_id"]] += a["decode_s"]
        tokens[a["prompt_id"]] += a["num_output_tokens"] - 1
    return {prompt: seconds[prompt] / tokens[prompt] for prompt in seconds if tokens[prompt]}


def mean_log_ratio(ours, theirs):
    ours, theirs = seconds_per_token(ours), seconds_per_token(theirs)
    common = ours.keys() & theirs.keys()
    return sum(math.log(theirs[prompt] / ours[prompt]) for prompt in common) / len(common)


def faster_baseline(name, temperature):
    def throughput(method):
        of = chosen(name, method, temperature)
        return sum(a["num_output_tokens"] - 1 for a in of) / sum(a["decode_s"] for a in of)

    return max({a["method"] for a in answers(name) if a["kind"] == "baseline"}, key=throughput)


def same(text, value):
    return float(text) == pytest.approx(value, rel=1e-9, abs=1e-9)


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


@pytest.mark.parametrize("name", CONTESTS)
def test_speed_and_accepted_length_by_category(name):
    for row in table(name, "tau-by-category"):
        for drafter in row.keys() & manifest_drafters(name):
            assert same(row[drafter], tau(chosen(name, drafter, row["T"], row["category"])))
    for row in table(name, "speedup-by-category"):
        baseline = chosen(name, faster_baseline(name, row["T"]), row["T"])
        for drafter in row.keys() & manifest_drafters(name):
            of = chosen(name, drafter, row["T"], row["category"])
            assert same(row[drafter], math.exp(mean_log_ratio(of, baseline)))


def manifest_drafters(name):
    return {method["name"] for method in manifest(name)["methods"] if method["kind"] == "drafter"}


@pytest.mark.parametrize("name", CONTESTS)
def test_speedups_on_new_domains(name):
    for row in table(name, "domains"):
        baseline = chosen(name, faster_baseline(name, row["T"]), row["T"])
        categories = sorted({a["category"] for a in answers(name)})
        means = [mean_log_ratio(chosen(name, row["drafter"], row["T"], c), baseline) for c in categories]
        assert same(row["speedup, t"], math.exp(sum(means) / len(means)))
        assert same(row["speedup, bootstrap"], math.exp(sum(means) / len(means)))


@every_report
def test_acceptance_time_and_losslessness(name):
    for row in table(name, "acceptance"):
        of = chosen(name, row["drafter"], row["T"])
        steps = [step for a in of for step in zip(a["steps"]["depth"], a["steps"]["num_accepted"], strict=True)]
        for column, told in row.items():
            if column.startswith("depth") and told != "\N{EN DASH}":
                depth = int(column.removeprefix("depth "))
                reached = [kept for deepest, kept in steps if deepest >= depth and kept >= depth - 1]
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


@pytest.mark.parametrize("name", ["mtbench-hour", "ablation-hour"])
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


@pytest.mark.parametrize("name", CONTESTS)
def test_what_training_cost(name):
    training = {method["name"]: method["training"] for method in manifest(name)["methods"]}
    for row in table(name, "training"):
        cost = training[row["drafter"]]
        assert (int(row["tokens"]), int(row["seconds"])) == (cost["tokens"], round(cost["seconds"]))


def test_every_arm_against_the_reference():
    name, seeds = "ablation-hour", (0, 1, 2)
    rows = table(name, "ablation")
    assert len(rows) == 11
    for row in rows:
        arm, temperature = row["arm"], row["T"]
        assert same(row["τ"], tau(chosen(name, arm, temperature)))
        assert float(row["τ low"]) < float(row["τ"]) < float(row["τ high"])
        if arm == "vsd":
            continue
        assert same(row["change of τ, %"], 100 * (tau(chosen(name, arm, 0)) / tau(chosen(name, "vsd", 0)) - 1))
        members = [arm if arm == "warm-start" else f"{arm}@{seed}" for seed in seeds]
        ratios = [
            mean_log_ratio(chosen(name, member, 0), chosen(name, f"vsd@{seed}", 0))
            for member, seed in zip(members, seeds, strict=True)
        ]
        assert same(row["change of speed, %"], 100 * math.expm1(sum(ratios) / len(ratios)))
        for of in ("τ", "speed"):
            low, change, high = (float(row[f"change of {of}, %{end}"]) for end in (" low", "", " high"))
            assert low < change < high
