"""Which token came from whom, told from records alone."""

from __future__ import annotations

import pytest

from vsdbench.bench.spans import Span, drawn, split, to_json
from vsdbench.errors import ConfigError
from vsdbench.store.examples import ExamplePrompt, Examples
from vsdbench.store.frames import to_frames
from vsdbench.store.records import hash_tokens

TIMES = (1.0, 1.0, 0.1)


def step(accepted, emitted):
    return (7, 4, accepted, emitted, *TIMES)


ANSWERS = {  # (prompt, drafter) -> steps: 6 tokens each, the prefill's included
    ("p0", "kl@0"): [step(2, 3), step(0, 1), step(1, 1)],  # the last step was cut behind its draft token
    ("p0", "kl@1"): [step(0, 1), step(3, 4)],
    ("p0", "ngram"): [step(0, 1)] * 5,
    ("p1", "kl@0"): [step(4, 5)],
    ("p1", "kl@1"): [step(0, 1), step(3, 4)],
    ("p1", "ngram"): [step(1, 2), step(1, 2), step(0, 1)],
}
WORDS = {"p0": ("A", " cat", " sat", "", " é", "."), "p1": ("One", " two", " three", " four", " five", " six")}
IDS = {"p0": [1, 2, 3, 4, 5, 6], "p1": [11, 12, 13, 14, 15, 16]}


@pytest.fixture(scope="module")
def frames(make_record):
    records = []
    for (prompt, method), steps in ANSWERS.items():
        sha = hash_tokens(IDS[prompt])
        for repeat in (0, 1):
            records.append(make_record(prompt_id=prompt, method=method, steps=steps, output_sha256=sha, repeat=repeat))
        more = {"output_sha256": hash_tokens([9, 9, 9, 9]), "num_output_tokens": 4}
        records.append(make_record(prompt_id=prompt, method=method, steps=[step(2, 3)], turn=1, **more))
        records.append(make_record(prompt_id=prompt, method=method, mode="stochastic", temperature=1.0, steps=steps))
    records.append(make_record(prompt_id="p0", method="autoregressive", kind="baseline", steps=[step(0, 1)] * 5))
    records.append(
        make_record(prompt_id="p0", method="peer", num_output_tokens=6, output_sha256=hash_tokens(IDS["p0"]))
    )
    return to_frames(records)


@pytest.fixture(scope="module")
def examples():
    prompts = (ExamplePrompt(prompt_id="p0", category="chat", text="What?"),)
    return Examples(
        drafters=("kl@0", "ngram"),
        mode="greedy",
        temperature=0.0,
        prompts=prompts,
        pieces={hash_tokens(IDS["p0"]): WORDS["p0"]},
    )


def test_every_token_is_of_one_span_and_only_the_end_lacks_a_token_of_the_target():
    assert split(WORDS["p0"], [2, 0, 1], [3, 1, 1]) == (
        Span("A", drafted=False, step=0, num_tokens=1),
        Span(" cat sat", drafted=True, step=1, num_tokens=2),
        Span("", drafted=False, step=1, num_tokens=1),  # half of a character, which the next span completes
        Span(" é", drafted=False, step=2, num_tokens=1),
        Span(".", drafted=True, step=3, num_tokens=1),
    )
    with pytest.raises(ValueError, match="the steps emit 6 tokens and the prefill one, but there are 6"):
        split(WORDS["p0"], [2, 0, 1], [3, 1, 2])


def test_an_answer_has_its_own_counts_and_all_of_its_text(frames, examples):
    (example,) = drawn(frames, examples)
    first, second = example.answers
    assert (first.drafter, first.num_steps, first.num_tokens, first.num_drafted) == ("kl@0", 3, 6, 3)
    assert first.tau == pytest.approx(5 / 3)
    assert (second.drafter, second.num_steps, second.num_drafted) == ("ngram", 5, 0)
    for answer in example.answers:
        assert "".join(span.text for span in answer.spans) == "".join(WORDS["p0"])


def test_drafters_can_be_named(frames, examples):
    (example,) = drawn(frames, examples, ["kl@1"])
    assert [answer.drafter for answer in example.answers] == ["kl@1"]
    with pytest.raises(ConfigError, match=r"No answer of a drafter 'ngramm' is kept\. Did you mean 'ngram'"):
        drawn(frames, examples, ["ngramm"])
    with pytest.raises(ConfigError, match="No answer of a drafter 'peer' is kept"):
        drawn(frames, examples, ["peer"])  # it recorded no steps


def test_an_answer_whose_text_is_not_there_is_said(frames, examples):
    without = examples.model_copy(update={"pieces": {}})
    with pytest.raises(ConfigError, match=r"examples\.json lacks an answer of 'kl@0'"):
        drawn(frames, without)


def test_as_data_a_step_has_what_was_drafted_and_what_was_not(frames, examples):
    (example,) = map(to_json, drawn(frames, examples, ["kl@0"]))
    assert (example["prompt_id"], example["text"], example["images"]) == ("p0", "What?", ())
    (answer,) = example["answers"]
    assert answer["prefill"] == "A"
    assert answer["steps"] == [
        {"drafted": " cat sat", "num_drafted": 2, "target": ""},
        {"drafted": "", "num_drafted": 0, "target": " é"},
        {"drafted": ".", "num_drafted": 1, "target": ""},
    ]
