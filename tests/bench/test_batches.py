"""What batches show, from records whose answer is known by hand."""

from __future__ import annotations

import math

import pytest

from vsdbench.bench.batches import summarise_batches, to_frames
from vsdbench.bench.stats import t_estimate
from vsdbench.errors import ConfigError
from vsdbench.report.tables import batch_rows, slower
from vsdbench.store.batches import BatchAnswer, BatchRecord, BatchStore, load_batches
from vsdbench.store.records import Steps, hash_tokens

STEP_MS = {"draft_ms": 2.0, "verify_ms": 7.0, "other_ms": 1.0}


def make_answer(name, num_sequences, emitted, slowness=1.0):
    """An answer whose steps took 10 ms each, times ``slowness``."""
    columns = {
        "num_nodes": [3] * len(num_sequences),
        "depth": [3] * len(num_sequences),
        "num_accepted": [emitted - 1] * len(num_sequences),
        "num_emitted": [emitted] * len(num_sequences),
        **{key: [ms * slowness] * len(num_sequences) for key, ms in STEP_MS.items()},
    }
    tokens = 1 + emitted * len(num_sequences)
    return BatchAnswer(
        prompt_id=name,
        seed=0,
        stop_reason="length",
        num_prompt_tokens=5,
        num_output_tokens=tokens,
        output_sha256=hash_tokens(range(tokens)),
        prefill_s=0.1,
        decode_s=0.01 * slowness * len(num_sequences),
        steps=Steps(**columns),
        num_sequences=num_sequences,
        lossless="equal",
    )


def make_batch(method, size, *, group=0, emitted=1, slowness=1.0, repeat=0, **changes):
    """Two answers of four steps that share all, or one after the other."""
    answers = [make_answer(f"p{group}-{i}", [size] * 4, emitted, slowness) for i in range(2)]
    fields = {
        "run_id": "run",
        "suite": "tiny",
        "group": group,
        "turn": 0,
        "repeat": repeat,
        "order_in_block": 0,
        "batch_size": size,
        "method": method,
        "kind": "baseline" if method == "autoregressive" else "drafter",
        "mode": "greedy",
        "temperature": 0.0,
        "rule": "greedy",
        "max_new_tokens": 9,
        "answers": answers,
    }
    return BatchRecord(**(fields | changes))


@pytest.fixture
def records():
    """Plain decoding and a drafter of two tokens a step, which is half as fast a step at batch size 2, by group."""
    found = []
    for group, noise in enumerate((1.0, 1.25)):
        found += [make_batch("autoregressive", size, group=group) for size in (1, 2)]
        found += [make_batch("fast", 1, group=group, emitted=2, slowness=noise)]
        found += [make_batch("fast", 2, group=group, emitted=2, slowness=4.0 * noise)]
    return found


def test_throughput_waiting_and_speedup_are_what_they_are_by_hand(records):
    rows = {(row["drafter"], row["batch_size"]): row for row in summarise_batches(records)}
    alone, both = rows["autoregressive", 1], rows["autoregressive", 2]
    assert (alone["tokens_per_s"], alone["ms_per_token"]) == (pytest.approx(100), pytest.approx(10))
    assert (both["tokens_per_s"], both["ms_per_token"]) == (pytest.approx(200), pytest.approx(10))
    assert (alone["mean_sequences"], both["mean_sequences"]) == (pytest.approx(1), pytest.approx(2))
    assert alone["speedup"] is None
    assert both["scaling"] == pytest.approx(2)
    fast = rows["fast", 1]
    assert fast["tau"] == 2
    assert fast["speedup"] == pytest.approx(2 / math.sqrt(1.25))
    expected = t_estimate([math.log(2), math.log(2 / 1.25)]).map(math.exp)
    assert fast["speedup_ci"] == pytest.approx(list(expected.ci))
    assert fast["time_share"] == {
        "draft": pytest.approx(0.2),
        "verify": pytest.approx(0.7),
        "other": pytest.approx(0.1),
    }
    assert fast["lossless"] == {"checked": 4, "equal": 4, "near_tie": 0, "violations": 0}
    assert rows["fast", 2]["speedup"] == pytest.approx(0.5 / math.sqrt(1.25))
    assert rows["fast", 2]["scaling"] == pytest.approx(0.5)
    assert [row["drafter"] for row in summarise_batches(records)] == ["autoregressive"] * 2 + ["fast"] * 2


def test_the_ends_of_groups_count_apart():
    """Both answers of a drafter in two steps, one of them alone in two more; plain decoding is full to its end."""
    drafted = make_batch("fast", 2, answers=[make_answer("a", [2, 2], 2), make_answer("b", [2, 2, 1, 1], 2)])
    plain = make_batch("autoregressive", 2)
    [_, row] = summarise_batches([plain, drafted])
    assert row["speedup"] == pytest.approx(2)  # 4 tokens in 10 ms against 2 in 10 ms
    assert row["tokens_per_s"] == pytest.approx(400)
    assert row["ms_per_token"] == pytest.approx(5)
    assert row["speedup_to_end"] == pytest.approx(12 / 40 / (2 / 10))
    assert row["mean_sequences"] == pytest.approx(6 / 4)


def test_repeats_are_pooled_and_one_group_has_no_interval(records):
    again = [record.model_copy(update={"repeat": 1}) for record in records]
    both = {(row["drafter"], row["batch_size"]): row for row in summarise_batches(records + again)}
    once = {(row["drafter"], row["batch_size"]): row for row in summarise_batches(records)}
    assert both["fast", 2]["speedup_ci"] == pytest.approx(once["fast", 2]["speedup_ci"])
    [row] = [row for row in summarise_batches(records[:3]) if row["drafter"] == "fast"]
    assert (row["speedup"], row["speedup_ci"]) == (pytest.approx(2), None)


def test_nothing_gives_nothing():
    assert summarise_batches([]) == []
    assert to_frames([])[0].empty
    assert batch_rows({}) == []
    assert slower({}) == ""


def test_what_is_slower_than_plain_decoding_is_said(records):
    summary = {"batches": summarise_batches(records)}
    assert (
        slower(summary)
        == "Slower than plain decoding in batches of the same size: fast at T = 0: 2 (interval holds 1)."
    )
    cells = batch_rows(summary)[-1]
    assert cells["speedup"].value == "0.45"
    assert cells["lossless =·≈·≠"].value == "4·0·0"


# --- on disk --------------------------------------------------------------------------------------------------------


def test_batches_are_kept_and_a_torn_line_is_dropped(records, tmp_path):
    store = BatchStore(tmp_path)
    for record in records:
        store.append(record)
    with pytest.raises(ValueError, match="on disk already"):
        store.append(records[0])
    store.close()
    assert load_batches(tmp_path) == records
    path = tmp_path / "batches.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    again = BatchStore(tmp_path)
    assert "torn last line" in again.note
    assert again.done == {record.key for record in records[:-1]}
    again.close()


def test_a_corrupt_line_is_named(records, tmp_path):
    path = tmp_path / "batches.jsonl"
    for line, said in (
        (b"{not json\n", "not JSON"),
        (records[0].to_line().replace('"seed":0', '"sead":0').encode(), "seed"),
    ):
        path.write_bytes(records[0].to_line().encode() + line)
        with pytest.raises(ConfigError, match=rf"line 2 is not a batch.*{said}"):
            load_batches(tmp_path)


def test_counts_that_do_not_go_together_are_refused(records):
    answer = records[0].answers[0]
    for change, said in (({"num_output_tokens": 9}, "emit 4 tokens"), ({"num_sequences": (1,)}, "1 num_sequences")):
        with pytest.raises(ValueError, match=said):
            BatchAnswer(**(answer.model_dump() | change))
