"""``batch_sizes`` of a suite, from the command to the files."""

from __future__ import annotations

import json

import pytest

from vsdbench.store.batches import load_batches
from vsdbench_drafters.architectures.ngram import NgramDrafter

BATCHED = ("batch_sizes=[1,2]", "repeats=1", "baselines=[autoregressive]", "generation.max_new_tokens=8")
GREEDY = "modes=[{name: greedy, temperature: 0, rule: greedy}]"
METHODS = ("autoregressive", "ngram", "itself")


def test_a_suite_is_decoded_in_batches_and_every_answer_is_plain_decodings(workspace):
    result = workspace.run("--json", "--limit", "4", *BATCHED)
    assert result.code == 0
    summary = json.loads(result.out)
    rows = {(row["drafter"], row["mode"], row["batch_size"]): row for row in summary["batches"]}
    assert set(rows) == {(m, mode, size) for m in METHODS for mode in ("greedy", "stochastic") for size in (1, 2)}
    for (method, _, size), row in rows.items():
        assert row["lossless"]["equal"] == row["lossless"]["checked"] >= 4, row
        assert 1 < row["mean_sequences"] <= 2 if size == 2 else row["mean_sequences"] == pytest.approx(1, rel=1e-3)
        assert (row["speedup"] is None) == (method == "autoregressive")
        assert row["num_groups"] == 2
    assert rows["itself", "greedy", 2]["tau"] > 2  # a model agrees with itself
    single = {(row["drafter"], row["mode"]): row for row in summary["results"] if row["category"] is None}
    for (method, mode), row in single.items():
        assert rows[method, mode, 2]["tau"] == pytest.approx(row["tau"])
    assert {record.run_id for record in load_batches(workspace.only_run)} == {summary["run_id"]}


def test_a_run_goes_on_where_its_batches_stopped(workspace):
    assert workspace.run(*BATCHED, GREEDY).code == 0
    run = workspace.only_run
    lines = (run / "batches.jsonl").read_bytes().splitlines(keepends=True)
    (run / "batches.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:50])
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    result = workspace.run("--resume", *BATCHED, GREEDY)
    assert result.code == 0
    again = (run / "batches.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:-3] == lines[:-3]
    assert len(again) == len(lines) == 3 * 2 * len(METHODS)  # two groups, of two turns and of one; sizes; methods
    assert len({record.key for record in load_batches(run)}) == len(lines)
    for words in ("batch", "in a step", "ms a token", "to the end", "while the batch is full"):
        assert words in result.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("batch_sizes=[2,1]", "in increasing order"),
        ("batch_sizes=[0]", "batch_sizes"),
        ("batch_sizes=[1,9]", "batch_sizes has 9, but the suite has 5 prompts"),
    ],
)
def test_a_mistake_ends_with_2(workspace, change, said):
    result = workspace.run(change)
    assert result.code == 2
    assert said in result.said
    assert workspace.runs == []


def test_a_target_that_decodes_one_at_a_time_is_refused_before_anything_is_decoded(workspace, monkeypatch):
    monkeypatch.setattr("vsdbench.models.target.choose_attention", lambda _config: "eager")
    result = workspace.run(*BATCHED, GREEDY)
    assert result.code == 2
    assert "which decodes one sequence at a time" in result.said
    assert workspace.runs == []


def test_a_drafter_that_serves_one_sequence_is_refused_before_anything_is_decoded(workspace, monkeypatch):
    monkeypatch.delattr(NgramDrafter, "fork")
    result = workspace.run(*BATCHED, GREEDY)
    assert result.code == 2
    assert "drafter 'ngram' drafts for one sequence at a time" in result.said
    assert workspace.runs == []
