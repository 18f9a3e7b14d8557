"""Comparisons find what was put into synthetic runs, pair like with like, and say where runs differ."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
from tests.bench.synthetic import save_run

from vsdbench.bench import compare, gates
from vsdbench.errors import ConfigError, GateError
from vsdbench.store.store import RunStore, load_records

FAST = {"num_resamples": 300}


@pytest.fixture
def save(tmp_path, make_record):
    return functools.partial(save_run, tmp_path, make_record)


@pytest.fixture
def sides(tmp_path):
    return lambda *specs: [compare.load_side(spec, tmp_path) for spec in specs]


def test_a_better_drafter_is_seen_in_another_run_on_a_slower_machine(save, sides):
    save("old", {"kl": (2.0, 1.5), "ce": (2.0, 1.5)}, seed=1)
    save("new", {"kl": (2.4, 1.8), "ce": (2.0, 1.5)}, seed=2, slow=3.0)
    got = compare.compare(*sides("old", "new"), **FAST)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["schema"], got["a"]["run_id"], got["b"]["run_id"], got["same_run"]) == (1, "old", "new", False)
    assert [(row["a"], row["b"]) for row in got["rows"]] == [("kl", "kl"), ("ce", "ce")]
    better, same = got["rows"]
    assert better["delta_speedup_pct"] == pytest.approx(20, abs=2)
    assert better["delta_speedup_ci"][0] < 20 < better["delta_speedup_ci"][1]
    assert better["delta_tau_ci"][0] > 10
    assert better["p_tau_holm"] == pytest.approx(2 * 2 / 301)  # two rows; what 300 resamples can tell
    assert same["delta_speedup_ci"][0] < 0 < same["delta_speedup_ci"][1]
    assert same["p_tau_holm"] > 0.05
    assert (better["num_prompts"], better["num_seeds"]) == (20, 1)
    assert got["warnings"] == []


def test_numbers_are_those_of_a_few_independent_lines(save, sides):
    a, b = save("old", {"kl": (2.0, 1.5)}, seed=1), save("new", {"kl": (2.4, 1.8)}, seed=2, slow=2.0)
    [row] = compare.compare(*sides("old", "new"), **FAST)["rows"]

    def tau(run):
        emitted = [n for r in load_records(run) if r.method == "kl" for n in r.steps.num_emitted]
        return sum(emitted) / len(emitted)

    def log_time(run, method):
        by_prompt = {}
        for r in load_records(run):
            if r.method == method:
                by_prompt.setdefault(r.prompt_hash, []).append((r.num_output_tokens - 1, r.decode_s))
        return np.array(
            [math.log(np.mean(t) / np.mean(n)) for n, t in (zip(*by_prompt[k], strict=True) for k in sorted(by_prompt))]
        )

    assert (row["tau_a"], row["tau_b"]) == pytest.approx((tau(a), tau(b)))
    assert row["delta_tau_pct"] == pytest.approx(100 * (tau(b) / tau(a) - 1))
    speedups = [log_time(run, "autoregressive") - log_time(run, "kl") for run in (a, b)]
    assert row["delta_speedup_pct"] == pytest.approx(100 * math.expm1(np.mean(speedups[1] - speedups[0])))


def test_two_methods_of_one_run_are_timed_against_each_other(save, sides):
    save("one", {"kl": (2.0, 1.5), "ce": (2.0, 1.2)})
    got = compare.compare(*sides("one:kl", "one:ce"), **FAST)
    [row] = got["rows"]
    assert got["same_run"]
    assert (row["a"], row["b"]) == ("kl", "ce")
    assert row["delta_speedup_pct"] == pytest.approx(100 * (1.2 / 1.5 - 1), abs=1)
    [back] = compare.compare(*sides("one:ce", "one:kl"), **FAST)["rows"]
    assert back["delta_speedup_pct"] == pytest.approx(100 * (1.5 / 1.2 - 1), abs=1.5)
    [plain] = compare.compare(*sides("one:autoregressive", "one:kl"), **FAST)["rows"]
    assert plain["tau_a"] == 1


def test_seeds_of_an_arm_are_a_level(save, sides):
    arms = {
        f"{arm}@{seed}": (tau * (1 + 0.03 * seed), 1.5) for arm, tau in (("vsd", 2.0), ("kl", 2.0)) for seed in range(3)
    }
    save("one", arms | {"ngram": (1.5, 1.2)})
    [row] = compare.compare(*sides("one:kl", "one:vsd"), **FAST)["rows"]
    assert (row["num_seeds"], row["a"], row["b"]) == (3, "kl", "vsd")
    [exact] = compare.compare(*sides("one:kl@0", "one:vsd@2"), **FAST)["rows"]
    assert exact["num_seeds"] == 1
    assert exact["delta_tau_pct"] > row["delta_tau_pct"]
    [single] = compare.compare(*sides("one:ngram", "one:vsd"), **FAST)["rows"]
    assert single["num_seeds"] == 3
    save("two", {"vsd@0": (2.0, 1.5), "vsd@1": (2.1, 1.5), "vsd@7": (2.5, 1.5)})
    got = compare.compare(*sides("one", "two"), **FAST)
    assert [(row["a"], row["num_seeds"]) for row in got["rows"]] == [("vsd", 2)]
    assert any("training seeds 2, 7" in sentence for sentence in got["warnings"])
    save("three", {"vsd@8": (2.0, 1.5), "vsd@9": (2.1, 1.5)})
    with pytest.raises(ConfigError, match="no seed in common"):
        compare.compare(*sides("one:vsd", "three:vsd"), **FAST)


def test_what_is_not_the_same_in_both_runs_is_said(save, sides):
    save("old", {"kl": (2.0, 1.5), "ce": (2.0, 1.5)})
    other = {"cpu": {"model": "Slow", "num_usable_cores": 2}, "gpus": [{"name": "H100"}], "versions": {"torch": "2.13"}}
    save(
        "new", {"kl": (2.0, 1.5)}, first=5, machine=other, target="bigger", suite_version="2", dtype="bfloat16",
        template_hash="x", max_new_tokens=128,
    )  # fmt: skip
    got = compare.compare(*sides("old", "new"), **FAST)
    assert got["warnings"][:7] == [
        f"the targets differ: toy {'f' * 64} and bigger {'f' * 64}",
        "the suites differ: tiny 1 and tiny 2",
        "the dtypes differ: float32 and bfloat16",
        f"the chat templates differ: {'1' * 64} and x",
        "the token limits differ: 64 and 128",
        "the machines differ: processor Fast and Slow; GPUs none and H100",
        "of 20 and 20 prompts, 15 are in both runs and compared",
    ]
    assert "only 'old' has ce" in got["warnings"]
    assert got["rows"][0]["num_prompts"] == 15


def test_another_way_of_sampling_is_said_where_both_runs_sampled(save, sides):
    hot = {"mode": "stochastic", "temperature": 1.0}
    save("old", {"kl": (2.0, 1.5)}, rule="coupled", **hot)
    save("new", {"kl": (2.0, 1.5)}, rule="rejection", top_p=0.9, sampling_top_k=50, **hot)
    assert compare.compare(*sides("old", "new"), **FAST)["warnings"] == [
        "the verification rules differ: coupled and rejection",
        "the values of top_p differ: none and 0.9",
        "the values of sampling_top_k differ: none and 50",
    ]
    for run_id in ("old", "new"):  # both decode greedily too, the one beside records that have a top_p
        other = save(f"{run_id}-cold", {"kl": (2.0, 1.5)}, rule="greedy")
        if run_id == "new":
            with RunStore.open(other) as store:
                for record in load_records(save("hot", {"kl": (2.0, 1.5)}, top_p=0.9, **hot)):
                    store.append(record.model_copy(update={"run_id": "new-cold"}))
    assert compare.compare(*sides("old-cold", "new-cold"), **FAST)["warnings"] == []


def test_a_noisy_run_is_said(save, sides, make_record):
    save("old", {"kl": (2.0, 1.5)})
    folder = save("new", {"kl": (2.0, 1.5)}, keep=lambda record: record.repeat == 0)
    with RunStore.open(folder) as store:
        for record in load_records(folder):
            store.append(record.model_copy(update={"repeat": 1, "decode_s": record.decode_s * 2 + 0.01}))
    [sentence] = compare.compare(*sides("old", "new"), **FAST)["warnings"]
    assert sentence.startswith("new: A/A control: autoregressive")


def test_only_prompts_and_turns_of_both_count(save, sides):
    """Half of B's run is missing (it was interrupted): tau of A is of the other half too."""
    save("old", {"kl": (2.0, 1.5)}, num_prompts=10)
    save("whole", {"kl": (2.0, 1.5)}, num_prompts=5)
    save("new", {"kl": (2.0, 1.5)}, num_prompts=10, seed=3, keep=lambda record: int(record.prompt_id[1:]) < 5)
    [row], [expected] = (compare.compare(*sides(a, "new"), **FAST)["rows"] for a in ("old", "whole"))
    assert row["num_prompts"] == 5
    assert row["tau_a"] == expected["tau_a"]
    assert row["delta_speedup_pct"] == pytest.approx(expected["delta_speedup_pct"])


def test_without_a_baseline_there_is_tau_but_no_speedup(save, sides):
    save("old", {"kl": (2.0, 1.5)})
    save("new", {"kl": (2.4, 1.5)}, keep=lambda record: record.kind == "drafter")
    [row] = compare.compare(*sides("old", "new"), **FAST)["rows"]
    assert row["delta_tau_pct"] > 10
    assert (row["delta_speedup_pct"], row["delta_speedup_ci"], row["p_speedup_holm"]) == (None, None, None)
    with pytest.raises(GateError, match=r"speedup>=-3% .*kl at T = 0 cannot be judged"):
        gates.enforce(gates.judge([row], [gates.parse_gate("speedup>=-3%")], "interval"))


def test_modes_are_kept_apart(save, sides):
    for run_id, tau in (("old", 2.0), ("new", 2.5)):
        folder = save(run_id, {"kl": (tau, 1.5)})
        other = save(f"{run_id}-hot", {"kl": (2.0, 1.5)}, mode="stochastic", temperature=1.0)
        with RunStore.open(folder) as store:
            for record in load_records(other):
                store.append(record.model_copy(update={"run_id": run_id}))
    rows = compare.compare(*sides("old", "new"), **FAST)["rows"]
    assert [(row["mode"], row["temperature"]) for row in rows] == [("greedy", 0.0), ("stochastic", 1.0)]
    assert rows[0]["delta_tau_pct"] > 15
    assert abs(rows[1]["delta_tau_pct"]) < 5
    assert rows[0]["p_tau_holm"] == pytest.approx(2 * rows[0]["p_tau"])
    save("cold", {"kl": (2.0, 1.5)})
    with pytest.raises(ConfigError, match="no common mode"):
        compare.compare(*sides("old-hot", "cold"), **FAST)


def test_what_cannot_be_compared_is_one_sentence(save, sides, tmp_path):
    save("old", {"kl": (2.0, 1.5)}, num_prompts=3)
    save("other", {"ce": (2.0, 1.5)}, num_prompts=3)
    save("elsewhere", {"kl": (2.0, 1.5)}, num_prompts=3, first=50)
    for specs, words in {
        ("old", "old"): "Both sides are of 'old': name two of its methods, for example old:autoregressive old:kl",
        ("old:kl", "old"): "Both sides are of 'old'",
        ("old:kl", "old:kl"): "Both sides are of 'old'",
        ("old", "other"): r"No method has the same name .* for example old:kl other:ce",
        ("old:kl", "other"): "No method has the same name",
        ("old:kll", "other:ce"): "Run 'old' has no method 'kll'. Did you mean 'kl'",
        ("old", "elsewhere"): "have no prompt in common",
    }.items():
        with pytest.raises(ConfigError, match=words):
            compare.compare(*sides(*specs), **FAST)
    with pytest.raises(ConfigError, match=r"No run 'odl'.*Did you mean 'old'"):
        sides("odl")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match=r"is not a run: to compare checkpoints .* OTHER --suite SUITE"):
        sides(str(tmp_path / "checkpoint"))
    RunStore.create(tmp_path / "empty", {"run_id": "empty"}).close()
    with pytest.raises(ConfigError, match="no records yet"):
        sides("empty")


def test_a_run_is_named_by_its_folder_too(save, sides, tmp_path):
    save("old", {"kl": (2.0, 1.5), "ce": (2.0, 1.5)})
    [whole, one] = sides(str(tmp_path / "old"), f"{tmp_path / 'old'}:kl")
    assert (whole.run_id, whole.method, one.run_id, one.method) == ("old", None, "old", "kl")
