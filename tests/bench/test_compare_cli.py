"""``vsdbench compare`` from the command to the exit code."""

from __future__ import annotations

import json

import pytest
from tests.bench.synthetic import save_run
from typer.testing import CliRunner

from vsdbench.cli import app


@pytest.fixture(scope="module")
def results(tmp_path_factory, make_record):
    """Two runs: from the old to the new, ``kl`` gains a fifth and ``ngram`` stays as it is."""
    folder = tmp_path_factory.mktemp("results")
    save_run(folder, make_record, "old", {"kl": (2.0, 1.5), "ngram": (1.5, 1.2)}, seed=1)
    save_run(folder, make_record, "new", {"kl": (2.4, 1.8), "ngram": (1.5, 1.2)}, seed=2, slow=2, suite_version="2")
    return folder


@pytest.fixture
def call(results, monkeypatch):
    monkeypatch.chdir(results)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: CliRunner().invoke(app, ["compare", "--results", str(results), *words])


def test_two_runs_pair_methods_of_the_same_name_and_say_what_differs(call):
    result = call("old", "new")
    assert result.exit_code == 0
    for words in ("kl", "ngram", "own autoregressive baseline", "Holm-adjusted over the 2 rows"):
        assert words in " ".join(result.stdout.split())
    assert result.stderr.splitlines() == ["warning: the suites differ: tiny 1 and tiny 2"]
    quiet = call("old", "new", "--quiet", "--json", "--seed", "3")
    assert quiet.stderr == ""
    got = json.loads(quiet.stdout)
    assert (got["schema"], got["a"]["run_id"], got["b"]["run_id"]) == (1, "old", "new")
    assert got["warnings"] == ["the suites differ: tiny 1 and tiny 2"]
    assert [row["a"] for row in got["rows"]] == ["kl", "ngram"]
    assert got["rows"][0]["delta_tau_ci"] != json.loads(call("old", "new", "--json").stdout)["rows"][0]["delta_tau_ci"]


def test_two_drafters_of_a_run(call):
    result = call("old:ngram", "old:kl", "--json", "--gate", "tau>=-1%", "--gate", "speedup>=5%")
    assert (result.exit_code, result.stderr) == (0, "")
    got = json.loads(result.stdout)
    assert (got["a"]["method"], got["b"]["method"], len(got["rows"])) == ("ngram", "kl", 1)
    assert got["rows"][0]["p_tau_holm"] < 0.001
    assert [(gate["gate"], gate["passed"]) for gate in got["gates"]] == [("tau>=-1%", True), ("speedup>=5%", True)]


def test_a_regression_ends_with_1_after_the_table(call):
    result = call("new", "old", "--gate", "tau>=-1%", "--quiet")
    assert result.exit_code == 1
    assert "gate tau>=-1% (on interval): failed in 1 of 2 rows" in result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: 1 of 1 gates failed: tau>=-1% (on interval): kl at T = 0 changed by -1")
    as_json = call("new", "old", "--gate", "tau>=-1%", "--quiet", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["gates"][0]["failures"][0]["a"] == "kl"


def test_what_a_gate_is_on_decides(call):
    """A change that noise leaves open passes on the interval, and fails where it has to be shown."""
    words = ("old:ngram", "new:ngram", "--quiet", "--gate")
    [row] = json.loads(call(*words[:3], "--json").stdout)["rows"]
    low, high = row["delta_tau_ci"]
    between = f"tau>={(low + high) / 2:.2f}%"
    assert call(*words, between).exit_code == 0
    assert call(*words, between, "--gate-on", "lower").exit_code == 1
    point = row["delta_tau_pct"]
    assert call(*words, f"tau>={point - 0.1:.2f}%", "--gate-on", "point").exit_code == 0
    assert call(*words, f"tau>={point + 0.1:.2f}%", "--gate-on", "point").exit_code == 1
    assert call(*words, f"tau>={high + 0.1:.2f}%").exit_code == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("old", "new", "--gate", "tau>1"), ["'tau>1'", '--gate "tau>=-1%"']),
        (("old", "new", "--gate", "tau>=-1%", "--gate-on", "mean"), ["'mean'", "interval, lower, point"]),
        (("old", "nev"), ["'nev'", "Did you mean 'new'?"]),
        (("old", "old"), ["name two of its methods"]),
        (("old:ngramm", "new"), ["Did you mean 'ngram'?"]),
        ((__file__, "new"), ["is not a run", "OTHER --suite SUITE"]),
    ],
)
def test_a_mistake_is_one_sentence_and_ends_with_2(call, words, said):
    result = call(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in said:
        assert part in line


def test_help_names_the_way_to_compare_checkpoints(call):
    text = " ".join(call("--help").stdout.replace("│", " ").split())
    assert "vsdbench compare old/ new/ --suite quickstart" in text
