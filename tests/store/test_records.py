"""The schema holds what a record promises, and lines written long ago still load."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from vsdbench.decoding.interfaces import StepRecord
from vsdbench.errors import ConfigError
from vsdbench.store.records import Diagnostics, Divergence, Steps, hash_tokens, parse_record

GOLDEN = Path(__file__).parents[1] / "golden" / "records_v1.jsonl"
WITH_DIAGNOSTICS = GOLDEN.with_name("records_v1_diagnostics.jsonl")
STEP = (7, 4, 2, 3, 1.0, 2.0, 0.5)


def test_golden_lines_load_and_write_back_unchanged():
    lines = GOLDEN.read_text().splitlines()
    records = [parse_record(line, where="golden") for line in lines]
    assert [r.method for r in records] == ["autoregressive", "hf-generate", "eagle3-kl", "ngram"]
    assert [json.loads(r.to_line()) for r in records] == [json.loads(line) for line in lines]
    eagle = records[2]
    assert eagle.steps.num_emitted == (3, 1, 2)
    assert eagle.tree is not None
    assert eagle.tree.budget == 7
    assert eagle.divergence == Divergence(index=4, gap=0.0003, kind="near_tie", reference_token=11, token=12)
    assert eagle.key == ("mtbench", "81", 0, "eagle3-kl", "greedy", 0.0, 0)
    assert records[3].temperature == 0.7


def test_thresholds_of_a_tree_are_kept():
    eagle = json.loads(GOLDEN.read_text().splitlines()[2])
    eagle["tree"]["min_level_prob"] = 0.5
    record = parse_record(json.dumps(eagle), where="golden")
    assert (record.tree.min_node_prob, record.tree.min_level_prob) == (0, 0.5)
    assert json.loads(record.to_line()) == eagle


def test_golden_lines_with_diagnostics_load_and_write_back_unchanged():
    lines = WITH_DIAGNOSTICS.read_text().splitlines()
    eagle, ngram = [parse_record(line, where="golden") for line in lines]
    assert [json.loads(r.to_line()) for r in (eagle, ngram)] == [json.loads(line) for line in lines]
    assert eagle.diagnostics.kept_by_rank == (2, 1, 1, 0, 1)
    assert eagle.diagnostics.calibration.count[5] == 3
    assert (ngram.diagnostics.num_pruned, ngram.diagnostics.calibration) == (None, None)


def test_lines_from_before_diagnostics_were_measured_have_none():
    assert [parse_record(line, where="golden").diagnostics for line in GOLDEN.read_text().splitlines()] == [None] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 1}, "num_steps is 1, fewer than num_kept_steps"),
        ({"num_pruned": 4}, "num_steps is 3, fewer than"),
        ({"num_greedy_steps": 3}, "fewer than"),
        ({"greedy_tokens": 4}, "does not go with greedy_tokens"),
        ({"kept_by_rank": [1, 1]}, r"kept_by_rank \(in all 2\)"),
        ({"calibration": {"count": [0] * 9}}, "at least 10 items"),
        ({"calibration": {"kept": [1] * 10}}, "more than count"),
        ({"calibration": {"brier_sum": float("nan")}}, "finite"),
    ],
)
def test_diagnostics_that_cannot_be_are_refused(change, message):
    empty = {"count": [0] * 10, "kept": [0] * 10, "sum_confidence": [0.0] * 10, "brier_sum": 0.0}
    counts = {"num_steps": 3, "num_pruned": 1, "num_kept_steps": 2, "num_greedy_steps": 1, "greedy_tokens": 1}
    counts |= {"tree_tokens": 3, "kept_by_rank": [1, 1, 0, 0, 1], "calibration": empty}
    assert Diagnostics.model_validate(counts).num_steps == 3
    if "calibration" in change:
        change = {"calibration": empty | change["calibration"]}
    with pytest.raises(ValidationError, match=message):
        Diagnostics.model_validate(counts | change)


def test_round_trip_is_one_line_that_begins_with_the_schema(make_record):
    record = make_record(steps=[STEP, (0, 0, 0, 1, 0.0, 2.0, 0.1)], sampling_top_k=5)
    line = record.to_line()
    assert line.startswith('{"schema":1,')
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert parse_record(line, where="here") == record


def test_image_tokens_are_in_the_line_where_there_are_any(make_record):
    text, image = make_record(), make_record(num_image_tokens=9)
    assert "num_image_tokens" not in text.to_line()
    assert json.loads(image.to_line())["num_image_tokens"] == 9
    assert [parse_record(r.to_line(), where="here") for r in (text, image)] == [text, image]
    with pytest.raises(ValidationError, match=r"num_image_tokens is 11, more than num_prompt_tokens \(10\)"):
        make_record(num_image_tokens=11)


def test_steps_from_engine_steps():
    steps = Steps.from_steps([StepRecord(*STEP), StepRecord(3, 2, 0, 1, 0.123456, 2.0, 0.25)])
    assert steps.num_nodes == (7, 3)
    assert steps.num_accepted == (2, 0)
    assert steps.draft_ms == (1.0, 0.1235)
    assert steps.other_ms == (0.5, 0.25)
    assert len(steps) == 2
    assert len(Steps.from_steps([])) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_output_tokens": 9}, "emit 3 tokens"),
        ({"mode": "stochastic"}, "does not go with temperature"),
        ({"temperature": 1.0}, "does not go with temperature"),
        ({"lossless": "near_tie"}, "does not go with divergence"),
        ({"decode_s": float("nan")}, "finite"),
        ({"decode_s": -1.0}, "greater than or equal to 0"),
        ({"surprise": 1}, "Extra inputs"),
        ({"output_sha256": "abc"}, "pattern"),
        ({"schema": 2}, "Input should be 1"),
        ({"steps": [(7, 4, 5, 3, 0, 0, 0)]}, "num_accepted <= depth"),
        ({"steps": [(3, 4, 2, 3, 0, 0, 0)]}, "depth <= num_nodes"),
        ({"steps": [(7, 4, 1, 3, 0, 0, 0)]}, "at most num_accepted"),
        ({"steps": [(7, 4, 1, 0, 0, 0, 0)]}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(make_record, fields, message):
    with pytest.raises(ValidationError, match=message):
        make_record(**({"steps": [STEP]} | fields))


def test_divergence_must_match_the_verdict(make_record):
    tie = Divergence(index=0, gap=0.0, kind="near_tie", reference_token=1, token=2)
    assert make_record(steps=[STEP], lossless="near_tie", divergence=tie).divergence == tie
    with pytest.raises(ValidationError, match="does not go with divergence"):
        make_record(steps=[STEP], lossless="violation", divergence=tie)
    with pytest.raises(ValidationError, match="does not go with divergence"):
        make_record(steps=[STEP], lossless="equal", divergence=tie)


def test_unequal_columns_are_refused():
    with pytest.raises(ValidationError, match="equal lengths"):
        Steps(num_nodes=(1,), depth=(1, 1))


def test_records_are_frozen(make_record):
    with pytest.raises(ValidationError, match="frozen"):
        make_record().turn = 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nope", "f.jsonl line 3 is not JSON"),
        ('{"schema": 2}', "record schema 2"),
        ("[1]", "record schema None"),
        ('{"schema": 1}', "run_id: Field required"),
    ],
)
def test_lines_that_do_not_load_are_named(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_record(line, where="f.jsonl line 3")


def test_every_part_of_the_key_counts(make_record):
    base = make_record(num_output_tokens=5)
    changes = [
        {"suite": "x"}, {"prompt_id": "x"}, {"turn": 1}, {"method": "x"}, {"repeat": 1},
        {"mode": "stochastic", "temperature": 1.0}, {"mode": "stochastic", "temperature": 0.5},
    ]  # fmt: skip
    keys = {make_record(num_output_tokens=5, **change).key for change in changes} | {base.key}
    assert len(keys) == len(changes) + 1
    assert make_record(num_output_tokens=7, seed=3).key == base.key


def test_hash_depends_on_every_token_and_on_where_one_ends():
    assert len({hash_tokens(ids) for ids in ([], [1], [1, 2], [12], [2, 1])}) == 5
