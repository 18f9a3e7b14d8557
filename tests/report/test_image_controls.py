"""What drafters lose with another picture: the paired change, by drafter, mode and all seeds together."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vsdbench.bench.image_controls import image_controls, misled
from vsdbench.bench.paired import tau_difference
from vsdbench.bench.summary import summarise
from vsdbench.report.document import build
from vsdbench.report.facts import load_run
from vsdbench.report.tables import print_summary
from vsdbench.store.frames import to_frames

NUM_PROMPTS = 12
KEPT = {"kl@0": 3, "kl@1": 2, "kl-off@0": 1, "kl-off@1": 1, "lonely": 4, "ngram": 0}


def method(name, **more):
    return {"name": name, "kind": "drafter", "training": {}, **more}


MANIFEST = {
    "device": "cpu",
    "methods": [
        method("kl@0"),
        method("kl@1"),
        method("kl-off@0", images="shuffled", control_of="kl@0"),
        method("kl-off@1", images="shuffled", control_of="kl@1"),
        method("lonely", images="shuffled", control_of=None),
        method("ngram"),
    ],
}


def steps(kept, prompt):
    return [(7, 4, count, count + 1, 1.0, 9.0, 0.1) for count in [kept] * (4 + prompt % 3) + [min(kept, 1)] * 4]


@pytest.fixture(scope="module")
def records(make_record):
    found = []
    for prompt in range(NUM_PROMPTS):
        for name, kept in KEPT.items():
            about = {"run_id": "r", "prompt_id": f"p{prompt}", "method": name, "num_image_tokens": 5}
            found.append(make_record(steps=steps(kept, prompt), **about))
    # A prompt without a picture, on which nobody can be misled.
    found += [make_record(run_id="r", prompt_id="text", method=name, steps=steps(4, 0)) for name in KEPT]
    return found


def test_the_change_is_the_paired_one_on_prompts_with_pictures(records):
    frames = to_frames(records)
    (entry,) = image_controls(frames, MANIFEST, num_resamples=499)
    seeing = [record for record in records if record.num_image_tokens]
    of = {name: to_frames([record for record in seeing if record.method == name]) for name in KEPT}
    expected = tau_difference([of["kl-off@0"], of["kl-off@1"]], [of["kl@0"], of["kl@1"]], num_resamples=499)
    assert (entry["drafter"], entry["control"], entry["mode"], entry["temperature"]) == ("kl", "kl-off", "greedy", 0.0)
    assert (entry["num_prompts"], entry["num_seeds"]) == (NUM_PROMPTS, 2)
    assert entry["delta_tau_pct"] == expected.change_pct < 0
    assert entry["delta_tau_ci"] == list(expected.ci_pct)
    assert entry["delta_tau_pct"] == pytest.approx(100 * (entry["tau_shuffled"] / entry["tau"] - 1))


def test_a_run_without_controls_says_nothing(records):
    frames = to_frames(records)
    assert image_controls(frames, {}, num_resamples=99) == []
    assert "image_controls" not in summarise(records, num_resamples=99)
    missing = to_frames([record for record in records if not record.method.startswith("kl-off")])
    assert image_controls(missing, MANIFEST, num_resamples=99) == []


def test_it_is_printed_and_reported_and_controls_compete_with_nobody(records, store_run):
    summary = summarise(records, manifest=MANIFEST, num_resamples=99)
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=200))
    assert "Shown another picture, kl at T = 0: tau 2." in out.getvalue()
    run = load_run(store_run(records, "seen", **MANIFEST))
    assert run.misled == misled(MANIFEST) == {"kl-off@0", "kl-off@1", "lonely"}
    document = build([run], title=None, files="x/")
    (section,) = [section for section in document.sections if section.title.startswith("Negative control")]
    (row,) = section.blocks[1].rows
    entry = run.summary["image_controls"][0]
    assert (row[0].text, row[4].number, row[4].interval) == ("kl", entry["delta_tau_pct"], tuple(entry["delta_tau_ci"]))
    assert run.leaders[("greedy", 0.0), "tau"].best == "kl@0"  # and not `lonely`, whose tau is larger
    assert "`lonely`" not in " ".join(document.summary)
