"""Answers that the reference reports draw, put together anew: which they are, their counts, the spans of each step."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from itertools import accumulate

import pytest
from tests.report.recompute import tau
from tests.report.recorded import (
    ROOT,
    RUNS,
    categories,
    chosen,
    drafters,
    examples,
    fixed,
    folder,
    prose,
    source,
    spelled,
    temperatures,
)

with_examples = pytest.mark.parametrize("name", tuple(filter(examples, RUNS)))
MAX_SHOWN, MAX_TOKENS, MAX_PROMPT = 4, 72, 320
BLOCK = re.compile(r"#example\(\n(.*?)\n\)", flags=re.DOTALL)
ANSWER = re.compile(
    r'\(head: \{ name\("([^"]*)"\); "([^"]*)" \}, spans: \((.*)\), left: "([^"]*)"\),', flags=re.MULTILINE
)
SPAN = re.compile(r'\(("(?:[^"\\]|\\.)*"), (true|false), (\d+)\)')
SIGNS = {"\n": "\u21b5", "\t": "\u2192", "\u00a0": " "}


def on_one_line(text):
    """With signs for line ends and tabs, and for what else controls something."""
    return "".join(SIGNS.get(c, "\ufffd" if unicodedata.category(c).startswith("C") else c) for c in text)


def two_best(name):
    """The drafter of the largest tau, and the best of another name, seeds of one being of one name."""
    of = {drafter: tau(chosen(name, drafter, temperatures(name)[0])) for drafter in sorted(drafters(name))}
    best = max(of, key=lambda drafter: of[drafter])
    others = [drafter for drafter in of if drafter.partition("@")[0] != best.partition("@")[0]]
    return [best, max(others, key=lambda drafter: of[drafter])]


def first_answers(name, drafter):
    """By prompt, those of the first turn and repeat."""
    of = chosen(name, drafter, temperatures(name)[0])
    return {a["prompt_id"]: a for a in of if a["turn"] == 0 and a["repeat"] == 0}


def spans(pieces, steps):
    """The text of consecutive tokens of one origin and step, whether they were drafted, the step, how many they are."""
    origins = [(False, 0)]
    for step, (kept, emitted) in enumerate(zip(steps["num_accepted"], steps["num_emitted"], strict=True), start=1):
        origins += [(place < kept, step) for place in range(emitted)]
    found = defaultdict(list)
    for origin, piece in zip(origins, pieces, strict=True):
        found[origin].append(piece)
    return [("".join(of), drafted, step, len(of)) for (drafted, step), of in found.items()]


def drawn(name, drafter, prompt):
    """What is printed of an answer: whose it is, its counts, its spans, and how many steps are left out."""
    answer = first_answers(name, drafter)[prompt]
    steps = answer["steps"]
    parts = spans(examples(name)["pieces"][answer["output_sha256"]], steps)
    num_steps = len(steps["num_emitted"])
    counts = (
        f" τ = {fixed(tau([answer]), 2)}: {answer['num_output_tokens']} tokens in {num_steps} step"
        f"{'s' * (num_steps > 1)}, {sum(n for _, drafted, _, n in parts if drafted)} of them drafted"
    )
    ends = accumulate(n for *_, n in parts)
    last = min([step for (*_, step, _), end in zip(parts, ends, strict=True) if end > MAX_TOKENS], default=None)
    rest = 0 if last is None else num_steps - last + 1
    left = f"\N{HORIZONTAL ELLIPSIS} {rest} more step{'s' * (rest > 1)}" if rest else ""
    kept = [(on_one_line(text), of, step) for text, of, step, _ in parts if last is None or step < last]
    return drafter, counts, kept, left


@with_examples
def test_examples_are_the_medians_of_their_categories(name):
    kept = examples(name)
    assert (kept["drafters"], kept["temperature"]) == (two_best(name), temperatures(name)[0])
    of = first_answers(name, two_best(name)[0])
    assert len({prompt["category"] for prompt in kept["prompts"]}) == min(8, len(set(categories(name).values())))
    for prompt in kept["prompts"]:
        values = sorted(tau([a]) for a in of.values() if a["category"] == prompt["category"])
        assert tau([of[prompt["prompt_id"]]]) == values[len(values) // 2]


@with_examples
def test_every_number_and_span_of_the_drawn_answers(name):
    best, second = two_best(name)
    shown = examples(name)["prompts"][:MAX_SHOWN]
    blocks = BLOCK.findall(source(name))
    assert len(blocks) == len(shown)
    for prompt, block in zip(shown, blocks, strict=True):
        assert f'strong("{prompt["category"]}"); " "; name("{prompt["prompt_id"]}")' in block
        text, long = prompt["text"], len(prompt["text"]) > MAX_PROMPT
        asked = f"{text[:MAX_PROMPT].rstrip()} \N{HORIZONTAL ELLIPSIS}" if long else text
        assert json.loads(re.search('prompt: (".*"),', block)[1]) == on_one_line(asked)
        found = [
            (drafter, counts, [(json.loads(t), of == "true", int(step)) for t, of, step in SPAN.findall(parts)], left)
            for drafter, counts, parts, left in ANSWER.findall(block)
        ]
        assert found == [drawn(name, drafter, prompt["prompt_id"]) for drafter in (best, second)]
    seeds = " (ARM@SEED is one training seed of an arm)" if "@" in best else ""
    assert (
        f"Answers at T = {temperatures(name)[0]:g} to one prompt of each of {spelled(len(shown))} categories: the "
        f"prompt whose τ is the median of its category with {best}, the drafter with the largest τ{seeds}. Shown are "
        f"the answers with that drafter and with {second}, the best of the others. "
    ) in prose(name)


@with_examples
def test_pictures_of_the_examples_are_those_of_the_run(name):
    for prompt, block in zip(examples(name)["prompts"], BLOCK.findall(source(name)), strict=False):
        files = [path.partition("/")[2] for path in prompt["images"]]
        assert re.findall(r'read\("figures/([^"]*\.png)"', block) == files
        for file in files:
            report = ROOT / "reports/reference" / name / "figures"
            assert (report / file).read_bytes() == (folder(name) / "examples" / file).read_bytes()
