"""Every metric against values computed by hand."""

import pytest

from vsdbench.bench import metrics
from vsdbench.store.frames import to_frames

# num_nodes, depth, num_accepted, num_emitted, draft_ms, verify_ms, other_ms
A = [(7, 4, 4, 5, 10.0, 30.0, 1.0), (7, 4, 0, 1, 10.0, 30.0, 1.0)]
B = [(7, 3, 3, 2, 20.0, 40.0, 1.0)]  # cut: 3 drafts kept, but only 2 tokens emitted
C = [(7, 4, 1, 2, 10.0, 20.0, 1.0), (7, 1, 1, 2, 10.0, 20.0, 1.0), (0, 0, 0, 1, 0.0, 20.0, 1.0)]


@pytest.fixture
def frames(make_record):
    return to_frames(
        [
            make_record(steps=A, prompt_id="p0", turn=0, decode_s=0.1),
            make_record(steps=B, prompt_id="p0", turn=1, decode_s=0.08),
            make_record(steps=C, prompt_id="p1", decode_s=0.2),
        ]
    )


def test_tau_is_pooled_with_the_bonus(frames):
    assert metrics.tau(frames[1]) == pytest.approx((5 + 1 + 2 + 2 + 2 + 1) / 6)


def test_other_definitions_of_tau(frames):
    values = metrics.tau_definitions(*frames)
    assert values == pytest.approx(
        {
            "pooled": 13 / 6,
            "prompt_mean": ((5 + 1 + 2) / 3 + (2 + 2 + 1) / 3) / 2,
            "answer_mean": (6 / 2 + 2 / 1 + 5 / 3) / 3,
            "without_bonus": (4 + 0 + 3 + 1 + 1 + 0) / 6,
            "accepted_plus_one": (5 + 1 + 4 + 2 + 2 + 1) / 6,
            "with_prefill": (13 + 3) / (6 + 3),
        }
    )


def test_an_oracle_chain_has_depth_plus_one_and_a_wrong_drafter_one(make_record):
    _, oracle = to_frames([make_record(steps=[(4, 4, 4, 5, 1, 1, 0)] * 3)])
    _, wrong = to_frames([make_record(steps=[(4, 4, 0, 1, 1, 1, 0)] * 3)])
    assert (metrics.tau(oracle), metrics.tau(wrong)) == (5.0, 1.0)
    assert metrics.acceptance_by_depth(oracle) == [1.0, 1.0, 1.0, 1.0]
    assert metrics.acceptance_by_depth(wrong) == [0.0, None, None, None]


def test_acceptance_by_depth(frames):
    # depth 1: the 5 steps that drafted reach it, 4 keep it. Depth 2: reached by 4/4, 3/3 and 1/4 (kept 1 of 4), not by
    # the tree of depth 1; kept by two. Depth 3: reached by two, kept by two. Depth 4: only the tree of depth 4.
    assert metrics.acceptance_by_depth(frames[1]) == pytest.approx([4 / 5, 2 / 3, 2 / 2, 1 / 1])
    assert metrics.acceptance_rate_at_depth(frames[1], 5) is None


def test_what_stands_behind_the_end_of_an_answer_was_not_refused(make_record):
    # Chains of four right tokens: the limit cut the second answer after two of them, an end token the third after one.
    whole, cut, ended = (4, 4, 4, 5, 1, 1, 0), (4, 4, 2, 2, 1, 1, 0), (4, 4, 1, 1, 1, 1, 0)
    answers = [[whole, whole], [whole, cut], [ended]]
    _, steps = to_frames([make_record(steps=steps, prompt_id=str(n)) for n, steps in enumerate(answers)])
    assert metrics.acceptance_by_depth(steps) == [1.0, 1.0, 1.0, 1.0]
    bonus = (4, 4, 2, 3, 1, 1, 0)  # the answer ended too, but with the target's own token in the place of the third
    _, steps = to_frames([make_record(steps=[whole, bonus])])
    assert metrics.acceptance_by_depth(steps) == [1.0, 1.0, 0.5, 1.0]


def test_emitted_and_steps_by_prompt(frames):
    sums = metrics.emitted_and_steps(*frames)
    assert sums.to_dict("index") == {
        "tiny/p0": {"num_emitted": 8, "num_steps": 3},
        "tiny/p1": {"num_emitted": 5, "num_steps": 3},
    }


def test_throughput_leaves_the_prefill_and_its_token_out(frames):
    assert metrics.tokens_per_s(frames[0]) == pytest.approx(13 / (0.1 + 0.08 + 0.2))


def test_time_shares_add_up_to_one(frames):
    shares = metrics.time_share(*frames)
    assert shares["draft"] == pytest.approx(0.060 / 0.38)
    assert shares["verify"] == pytest.approx(0.160 / 0.38)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_time_shares_ignore_answers_without_steps(make_record):
    records, steps = to_frames(
        [make_record(steps=A, decode_s=0.1), make_record(num_output_tokens=9, decode_s=5.0, prompt_id="p1")]
    )
    assert metrics.time_share(records, steps)["draft"] == pytest.approx(0.2)


def test_seconds_per_token_averages_repeats_then_pools_turns(make_record):
    records, _ = to_frames(
        [
            make_record(num_output_tokens=11, decode_s=1.0, repeat=0),
            make_record(num_output_tokens=11, decode_s=3.0, repeat=1),
            make_record(num_output_tokens=31, decode_s=2.0, repeat=0, turn=1),
            make_record(num_output_tokens=1, decode_s=0.0, prompt_id="p1"),
        ]
    )
    values = metrics.seconds_per_token(records)
    assert values.to_dict() == pytest.approx({"tiny/p0": (2.0 + 2.0) / (10 + 30)})


def test_pairs_count_what_both_did(make_record):
    ours, _ = to_frames(
        [
            make_record(num_output_tokens=11, decode_s=1.0),
            make_record(num_output_tokens=11, decode_s=9.0, turn=1),  # the other never got to this turn
            make_record(num_output_tokens=11, decode_s=1.0, prompt_id="p1"),
            make_record(num_output_tokens=11, decode_s=1.0, prompt_id="p2"),
        ]
    )
    theirs, _ = to_frames(
        [
            make_record(num_output_tokens=11, decode_s=2.0),
            make_record(num_output_tokens=11, decode_s=4.0, repeat=1),
            make_record(num_output_tokens=1, decode_s=0.0, prompt_id="p1"),
        ]
    )
    paired = metrics.paired_seconds_per_token(metrics.by_turn(ours), metrics.by_turn(theirs))
    assert paired.to_dict("index") == {"tiny/p0": pytest.approx({"method_s": 0.1, "reference_s": 0.3})}


def test_lossless_counts(make_record):
    verdicts = ["equal", "equal", "near_tie", "violation", "unchecked", "reference"]
    records = []
    for repeat, verdict in enumerate(verdicts):
        divergence = None
        if verdict in {"near_tie", "violation"}:
            divergence = {"index": 0, "gap": 1.0, "kind": verdict, "reference_token": 1, "token": 2}
        records.append(make_record(num_output_tokens=3, repeat=repeat, lossless=verdict, divergence=divergence))
    counts = metrics.lossless_counts(to_frames(records)[0])
    assert counts == {"checked": 4, "equal": 2, "near_tie": 1, "violations": 1}


def test_select_keeps_steps_of_the_chosen_records(frames):
    records, steps = metrics.select(*frames, prompt_id="p0", turn=1)
    assert records.index.tolist() == [1]
    assert steps["num_accepted"].tolist() == [3]
    assert metrics.tau_prompt_mean(metrics.emitted_and_steps(records, steps)) == 2.0


def test_nothing_measured_is_none_and_never_nan(make_record):
    records, steps = to_frames([make_record(num_output_tokens=1, decode_s=0.0)])
    assert set(metrics.tau_definitions(records, steps).values()) == {None}
    assert metrics.acceptance_by_depth(steps) == []
    assert metrics.tokens_per_s(records) is None
    assert metrics.time_share(records, steps) == {"draft": None, "verify": None, "other": None}
    assert len(metrics.seconds_per_token(records)) == 0
