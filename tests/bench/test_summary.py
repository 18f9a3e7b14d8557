"""The summary has the promised form, and its numbers are what a few independent lines make of the records."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from vsdbench.bench.summary import flatten_result, summarise, summary_frame
from vsdbench.errors import ConfigError


@pytest.fixture(scope="module")
def fast():
    return {"num_resamples": 300}


def overall(summary, drafter, mode="greedy"):
    (row,) = [
        r for r in summary["results"] if (r["drafter"], r["mode"], r["category"]) == (drafter, mode, None)
    ]  # fmt: skip
    return row


def test_form(make_run, fast):
    summary = summarise(make_run(modes=("greedy", "stochastic")), manifest={"device": "cpu"}, **fast)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {k: summary[k] for k in ("schema", "run_id", "suite", "target", "device", "dtype")} == {
        "schema": 1,
        "run_id": "run-1",
        "suite": "tiny",
        "target": "toy",
        "device": "cpu",
        "dtype": "float32",
    }
    assert [(b["name"], b["mode"], b["temperature"]) for b in summary["baselines"]] == [
        ("autoregressive", "greedy", 0.0),
        ("hf-generate", "greedy", 0.0),
        ("autoregressive", "stochastic", 1.0),
        ("hf-generate", "stochastic", 1.0),
    ]
    assert len(summary["results"]) == 2 * 2 * (1 + 3)
    row = overall(summary, "eagle3-kl", "stochastic")
    assert set(row) == {
        "drafter", "objective", "mode", "temperature", "category", "num_prompts", "tau", "tau_ci", "speedup",
        "speedup_ci", "speedup_baseline", "speedups", "tokens_per_s", "acceptance_by_depth", "time_share", "lossless",
        "tau_definitions", "diagnostics", "domain_speedup", "domain_speedup_ci", "domain_speedup_bootstrap_ci",
    }  # fmt: skip
    assert row["objective"] == "kl"
    assert overall(summary, "ngram")["objective"] is None
    assert row["num_prompts"] == 12
    assert row["lossless"] == {"checked": 24, "equal": 24, "near_tie": 0, "violations": 0}
    assert [r["category"] for r in summary["results"]][:4] == [None, "chat", "code", "maths"]
    assert [r["num_prompts"] for r in summary["results"]][:4] == [12, 4, 4, 4]


def test_numbers_recomputed_from_the_records_alone(make_run, fast):
    records = make_run()
    summary = summarise(records, **fast)
    row = overall(summary, "eagle3-kl")
    ours = [r for r in records if r.method == "eagle3-kl"]
    emitted = [n for r in ours for n in r.steps.num_emitted]
    assert row["tau"] == pytest.approx(sum(emitted) / len(emitted))
    assert row["tau_definitions"]["pooled"] == row["tau"]
    assert row["tokens_per_s"] == pytest.approx(len(ours) * 40 / sum(r.decode_s for r in ours))

    def mean_log_time(method):
        by_prompt = {}
        for r in records:
            if r.method == method:
                by_prompt.setdefault(r.prompt_id, []).append(r.decode_s / 40)
        return np.array([math.log(np.mean(by_prompt[p])) for p in sorted(by_prompt)])

    for baseline in ("autoregressive", "hf-generate"):
        expected = math.exp(np.mean(mean_log_time(baseline) - mean_log_time("eagle3-kl")))
        assert row["speedups"][baseline]["value"] == pytest.approx(expected)
        low, high = row["speedups"][baseline]["ci"]
        assert low < expected < high


def test_the_headline_is_against_the_faster_baseline(make_run, fast):
    summary = summarise(make_run(), **fast)
    for row in summary["results"]:
        assert row["speedup_baseline"] == "hf-generate"
        assert row["speedup"] == row["speedups"]["hf-generate"]["value"] < row["speedups"]["autoregressive"]["value"]
        assert row["speedup_ci"] == row["speedups"]["hf-generate"]["ci"]


def test_controls_compare_repeats_of_each_baseline(make_run, fast):
    summary = summarise(make_run(), **fast)
    assert [c["name"] for c in summary["controls"]] == ["autoregressive", "hf-generate"]
    assert all(0.95 < c["ci"][0] < c["value"] < c["ci"][1] < 1.05 for c in summary["controls"])
    assert summarise(make_run(num_repeats=1), **fast)["controls"] == []


def test_without_a_baseline_there_is_no_speedup(make_run, fast):
    summary = summarise([r for r in make_run() if r.kind == "drafter"], **fast)
    row = overall(summary, "ngram")
    assert (row["speedup"], row["speedup_ci"], row["speedup_baseline"], row["speedups"]) == (None, None, None, {})
    assert row["tau"] > 1


def test_one_prompt_has_values_but_no_intervals(make_run, fast):
    row = overall(summarise(make_run(num_prompts=1), **fast), "ngram")
    assert row["tau"] is not None
    assert (row["tau_ci"], row["speedup_ci"]) == (None, None)


def test_answers_of_one_token_give_null_and_not_nan(make_record, fast):
    shared = {"num_output_tokens": 1, "decode_s": 0.0}
    records = [make_record(**shared), make_record(method="ar", kind="baseline", lossless="reference", **shared)]
    summary = summarise(records, **fast)
    json.dumps(summary, allow_nan=False)
    row = overall(summary, "ngram")
    assert (row["tau"], row["speedup"], row["tokens_per_s"], row["acceptance_by_depth"]) == (None, None, None, [])
    assert row["speedup_baseline"] is None
    assert summary["baselines"][0]["tokens_per_s"] is None


def test_two_suites_keep_their_prompts_and_categories_apart(make_record, fast):
    step = (7, 4, 2, 3, 1.0, 2.0, 0.5)
    records = [make_record(steps=[step], suite=suite) for suite in ("b", "a")]
    summary = summarise(records, **fast)
    assert summary["suite"] == "a+b"
    assert [(r["category"], r["num_prompts"]) for r in summary["results"]] == [(None, 2), ("a/chat", 1), ("b/chat", 1)]


def test_temperatures_are_kept_apart(make_record, fast):
    step = (7, 4, 2, 3, 1.0, 2.0, 0.5)
    records = [make_record(steps=[step], mode="stochastic", temperature=t) for t in (1.0, 0.5)]
    rows = [r for r in summarise(records, **fast)["results"] if r["category"] is None]
    assert [r["temperature"] for r in rows] == [0.5, 1.0]


def test_what_cannot_be_summarised_is_said(make_record):
    with pytest.raises(ConfigError, match="no records yet"):
        summarise([])
    two = [make_record(num_output_tokens=2), make_record(num_output_tokens=2, repeat=1, dtype="bfloat16")]
    with pytest.raises(ConfigError, match=r"records of one dtype, got \['float32', 'bfloat16'\]"):
        summarise(two)


def test_the_flat_form_keeps_every_number(make_run, fast):
    summary = summarise(make_run(), **fast)
    frame = summary_frame(summary)
    assert len(frame) == len(summary["results"])
    row = summary["results"][0]
    flat = flatten_result(row)
    assert (flat["tau_lo"], flat["tau_hi"]) == tuple(row["tau_ci"])
    assert flat["speedup_vs_hf-generate"] == row["speedup"]
    assert flat["time_share_draft"] == row["time_share"]["draft"]
    assert flat["lossless_checked"] == 24
    assert frame.loc[0, "speedup_vs_autoregressive_hi"] == row["speedups"]["autoregressive"]["ci"][1]


STEPS = [(5, 2, 2, 3, 1.0, 2.0, 0.5), (5, 2, 0, 1, 1.0, 2.0, 0.5)]
CALIBRATION = {
    "count": [2, 0, 0, 0, 0, 4, 0, 0, 0, 0],
    "sum_confidence": [0.1, 0.0, 0.0, 0.0, 0.0, 2.2, 0.0, 0.0, 0.0, 0.0],
    "kept": [0, 0, 0, 0, 0, 2, 0, 0, 0, 0],
    "brier_sum": 1.2,
}
DIAGNOSTICS = {
    "num_steps": 2, "num_pruned": 1, "num_kept_steps": 1, "num_greedy_steps": 1, "greedy_tokens": 2, "tree_tokens": 2,
    "calibration": CALIBRATION, "kept_by_rank": [1, 1],
}  # fmt: skip
BRANCHED = DIAGNOSTICS | {"num_pruned": 0, "num_greedy_steps": 0, "greedy_tokens": 1, "kept_by_rank": [1, 0, 1]}


def diagnosed(make_record):
    """Records of two prompts with counts, of a third without, and of another drafter without any."""
    return [
        make_record(steps=STEPS, diagnostics=DIAGNOSTICS, category="chat"),
        make_record(steps=STEPS, diagnostics=BRANCHED, category="code", prompt_id="p1"),
        make_record(steps=STEPS, category="chat", prompt_id="p2"),
        make_record(steps=STEPS, category="chat", method="older"),
    ]


def test_diagnostics_are_of_summed_counts(make_record, fast):
    summary = summarise(diagnosed(make_record), **fast)
    found = {(r["drafter"], r["category"]): r["diagnostics"] for r in summary["results"]}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert found["older", None] is found["older", "chat"] is None
    bins = found["ngram", None].pop("calibration")
    assert found["ngram", None] == {
        "greedy_pruned_share": 1 / 4,
        "accepted_is_greedy_share": 1 / 2,
        "greedy_path_length": 3 / 4,
        "tree_path_length": 1.0,
        "brier": pytest.approx(2.4 / 12),
        "nodes_for_95": 3,
    }
    assert [entry["count"] for entry in bins] == [4, 0, 0, 0, 0, 8, 0, 0, 0, 0]
    assert bins[5] == {"confidence": pytest.approx(0.55), "accepted": 0.5, "count": 8}
    assert bins[1] == {"confidence": None, "accepted": None, "count": 0}
    assert found["ngram", "chat"]["greedy_pruned_share"] == 1 / 2
    assert found["ngram", "chat"]["nodes_for_95"] == 2
    assert found["ngram", "code"]["accepted_is_greedy_share"] == 0


def test_diagnostics_are_flat_in_the_parquet_file(make_record, fast, tmp_path):
    summary = summarise(diagnosed(make_record), **fast)
    summary_frame(summary).to_parquet(tmp_path / "summary.parquet")
    frame = pd.read_parquet(tmp_path / "summary.parquet")
    assert frame.loc[0, "diagnostics_greedy_path_length"] == 3 / 4
    assert frame.loc[0, "diagnostics_calibration_count"].tolist() == [4, 0, 0, 0, 0, 8, 0, 0, 0, 0]
    assert frame.loc[frame["drafter"] == "older", "diagnostics_brier"].isna().all()
    without = summary_frame(summarise([r for r in diagnosed(make_record) if r.method == "older"], **fast))
    assert set(without) == set(frame)


def test_a_seed_gives_the_same_summary(make_run, fast):
    records = make_run(num_prompts=6)
    assert summarise(records, seed=1, **fast) == summarise(records, seed=1, **fast)
    assert summarise(records, seed=1, **fast) != summarise(records, seed=2, **fast)


def test_new_domains_take_categories_for_the_sample(make_run):
    records = make_run(num_prompts=12, num_repeats=1)
    rows = summarise(records, num_resamples=300)["results"]
    seconds = {}
    for r in records:
        of = seconds.setdefault((r.method, r.category), {})
        of[r.prompt_id] = r.decode_s / (r.num_output_tokens - 1)
    for row in (row for row in rows if row["category"] is None):
        means = [
            np.mean([np.log(seconds[row["speedup_baseline"], c][p] / s) for p, s in seconds[row["drafter"], c].items()])
            for c in ("chat", "code", "maths")
        ]
        half = 4.302652729911275 * np.std(means, ddof=1) / np.sqrt(3)  # t quantile 0.975, 2 degrees of freedom
        assert np.log(row["domain_speedup"]) == pytest.approx(np.mean(means))
        assert np.log(row["domain_speedup_ci"]) == pytest.approx([np.mean(means) - half, np.mean(means) + half])
        low, high = row["domain_speedup_bootstrap_ci"]
        assert low < row["domain_speedup"] < high
    assert {row["domain_speedup"] for row in rows if row["category"] is not None} == {None}
    single = [record for record in records if record.category == "chat"]
    assert {row["domain_speedup"] for row in summarise(single, num_resamples=50)["results"]} == {None}
