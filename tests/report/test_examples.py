"""Drawn answers: in the PDF's source with the picture beside them, in the terminal, as data; and old runs."""

from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vsdbench.bench.spans import drawn
from vsdbench.cli import app
from vsdbench.report.document import build
from vsdbench.report.facts import load_run
from vsdbench.report.paper import write_report
from vsdbench.report.spans import print_spans
from vsdbench.store.examples import ExamplePrompt, Examples, load_examples, save_examples
from vsdbench.store.frames import to_frames
from vsdbench.store.records import hash_tokens
from vsdbench.store.store import load_records

SHA = hash_tokens(range(41))  # what every answer of a synthetic run is
WORDS = ("Once", *(f" w{number}" for number in range(1, 38)), " \x1b[2J\n", " #x", ' "y"\\')
PICTURE = "examples/0123456789abcdef.png"


@pytest.fixture
def run(make_run, store_run):
    """A run with examples: a long prompt, and one with two pictures of which none is kept."""
    folder = store_run(make_run(num_prompts=6, num_repeats=1, drafters=("ngram", "eagle3-kl")), "drawn")
    prompts = (
        ExamplePrompt(prompt_id="p0", category="chat", text="What is #this? " * 30, num_images=1, images=(PICTURE,)),
        ExamplePrompt(prompt_id="p1", category="code", text="def f(x):\n\treturn", num_images=2),
    )
    examples = Examples(
        drafters=("eagle3-kl", "ngram"), mode="greedy", temperature=0.0, prompts=prompts, pieces={SHA: WORDS}
    )
    png = io.BytesIO()
    Image.new("RGB", (20, 10), (9, 90, 200)).save(png, format="PNG")
    save_examples(folder, examples, {PICTURE: png.getvalue()})
    return folder


def answer_in(folder, method, prompt):
    (record,) = [r for r in load_records(folder) if (r.method, r.prompt_id) == (method, prompt)]
    return record


def drafted_in(folder, method, prompt):
    """Draft tokens kept, a number a step; those of a synthetic run may go beyond the end of the answer."""
    steps = answer_in(folder, method, prompt).steps
    return [min(pair) for pair in zip(steps.num_accepted, steps.num_emitted, strict=True)]


def test_the_report_draws_which_tokens_were_drafted(run, tmp_path):
    written = write_report([run], tmp_path / "r.pdf")
    assert tmp_path / "r/figures/0123456789abcdef.png" in written
    assert (tmp_path / "r/figures/0123456789abcdef.png").read_bytes() == (run / PICTURE).read_bytes()
    source = (tmp_path / "r/report.typ").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert '#heading(level: 1, "Accepted spans")' in source
    first, second = source.split("#example(")[1:]
    assert 'read("figures/0123456789abcdef.png", encoding: none)' in first
    assert "…" in first[: first.index("pictures:")]
    assert "(two pictures, not kept with the run)" in second
    assert "def f(x):\u21b5\u2192return" in second
    emitted = answer_in(run, "eagle3-kl", "p0").steps.num_emitted
    kept = drafted_in(run, "eagle3-kl", "p0")
    assert f"40 tokens in {len(kept)} steps" not in first  # the prefill's token is one more
    assert f"41 tokens in {len(kept)} steps, {sum(kept)} of them drafted" in first
    spans = re.findall(r'\("((?:[^"\\]|\\.)*)", (true|false), (\d+)\)', first.split("left:")[0])
    assert spans[0] == ("Once", "false", "0")
    text = "".join(said for said, is_drafted, _ in spans if is_drafted == "true")
    places = [start + i for start, n in zip(starts(emitted), kept, strict=True) for i in range(n)]
    assert text == "".join(shown(WORDS[place]) for place in places)


def starts(emitted):
    place = 1
    for count in emitted:
        yield place
        place += count


def shown(word):
    """A token as it stands in the source: controls as signs, then as a Typst string."""
    word = word.replace("\x1b", "\ufffd").replace("\n", "\u21b5")
    return word.replace("\\", "\\\\").replace('"', '\\"')


def sections(folder):
    return {section.title: section.blocks for section in build([load_run(folder)], title=None, files="x/").sections}


def test_a_long_answer_is_cut_at_the_end_of_a_step(run, monkeypatch):
    monkeypatch.setattr("vsdbench.report.examples._MAX_TOKENS", 10)
    _, first, _ = sections(run)["Accepted spans"]
    emitted = answer_in(run, "eagle3-kl", "p0").steps.num_emitted
    whole = max(n for n in range(len(emitted)) if 1 + sum(emitted[:n]) <= 10)
    answer = first.answers[0]
    assert answer.left == f"… {len(emitted) - whole} more steps"
    assert answer.spans[-1].step == whole
    assert sum(span.num_tokens for span in answer.spans) == 1 + sum(emitted[:whole])


def test_a_run_from_before_has_no_such_section_and_says_so_when_asked(make_run, store_run):
    old = store_run(make_run(num_prompts=3, num_repeats=1), "old")
    assert "Accepted spans" not in sections(old)
    assert "has no example answers: it was made before runs kept them. Run its suite again." in spans_refused(old)


def test_a_run_that_has_nothing_to_draw_says_why(make_record, make_run, store_run):
    stopped = store_run(make_run(num_prompts=1, num_repeats=1), "stopped", status="running")
    assert "has no example answers: it is not finished." in spans_refused(stopped)
    silent = store_run([make_record(), make_record(method="autoregressive", kind="baseline")], "silent")
    assert "has no example answers: no token of it was drafted" in spans_refused(silent)


def spans_refused(run):
    done = CliRunner().invoke(app, ["show", run.name, "--results", str(run.parent), "--spans"])
    assert done.exit_code == 2
    return " ".join(done.stderr.split())


def drawing(run, **console):
    examples = load_examples(run)
    out = Console(file=io.StringIO(), width=100, highlight=False, **console)
    print_spans(examples, drawn(to_frames(load_records(run)), examples), out)
    return out.file.getvalue()


def test_the_terminal_underlines_drafted_tokens_and_brackets_them_without_colours(run):
    kept, emitted = drafted_in(run, "eagle3-kl", "p0"), answer_in(run, "eagle3-kl", "p0").steps.num_emitted
    place = next(start for start, n, e in zip(starts(emitted), kept, emitted, strict=True) if (n, e) == (1, 2))
    coloured = drawing(run, force_terminal=True, color_system="standard")
    assert f"\x1b[4;36m{WORDS[place]}\x1b[0m" in coloured
    plain = drawing(run, color_system=None)
    assert f"\u2039{WORDS[place]}\u203a{WORDS[place + 1]}│" in plain.replace("\n", "")
    for text in (coloured, plain):
        assert "\x1b[2J" not in text  # no token controls the terminal
        assert "\ufffd[2J" in text


def test_the_verb_gives_data_and_refuses_what_does_not_fit(run):
    def show(*words):
        return CliRunner().invoke(app, ["show", *words, "--results", str(run.parent)])

    data = json.loads(show("drawn", "--spans", "--json", "--drafter", "ngram").stdout)
    assert (data["schema"], data["run_id"], data["chosen_by"]) == (1, "drawn", "eagle3-kl")
    assert [example["prompt_id"] for example in data["examples"]] == ["p0", "p1"]
    for example in data["examples"]:
        (answer,) = example["answers"]
        steps = answer["steps"]
        assert answer["prefill"] + "".join(step["drafted"] + step["target"] for step in steps) == "".join(WORDS)
        assert answer["num_tokens"] == len(WORDS)
        assert answer["num_drafted"] == sum(step["num_drafted"] for step in steps) > 0
    assert "eagle3-kl: τ = " in show("drawn", "--spans").stdout
    for words, message in {
        ("drawn", "--drafter", "ngram"): "--drafter ngram is for --spans",
        ("ngram", "--spans"): "--spans is for runs, but 'ngram' is among the drafters",
        ("drawn", "--spans", "--drafter", "engram"): "No answer of a drafter 'engram' is kept",
    }.items():
        done = show(*words)
        assert done.exit_code == 2
        assert message in done.stderr.replace("\n", " ")
