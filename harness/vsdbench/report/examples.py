"""The part of a report that shows answers: what the drafter guessed and what the target gave, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from vsdbench.bench.spans import Answer, Example, Span, drawn
from vsdbench.report.facts import Run
from vsdbench.report.model import Block, DrawnAnswer, DrawnExample, Section, fixed, named, spelled

_MAX_EXAMPLES = 4
"""Of all runs together."""
_MAX_TOKENS = 72
"""Of an answer: more are left out, at the end of a step."""
_MAX_PROMPT = 320


def accepted_spans(runs: Sequence[Run]) -> Section | None:
    """Return a few answers drawn as spans; None where no run kept any."""
    each = max(1, _MAX_EXAMPLES // len(runs))
    blocks: list[Block] = []
    for run in runs:
        if run.examples is None:
            continue
        shown = [example for example in drawn(run.frames, run.examples) if example.answers][:each]
        if shown:
            blocks += [_reading(run, shown), *(_block(run, example) for example in shown)]
    return Section("Accepted spans", tuple(blocks)) if blocks else None


def _reading(run: Run, shown: Sequence[Example]) -> str:
    """Return how the examples were chosen and how they are read."""
    examples = run.examples
    assert examples is not None
    drafters = list(dict.fromkeys(answer.drafter for example in shown for answer in example.answers))
    where = f"Of run {run.label}, answers" if run.label else "Answers"
    which = "one prompt" if len(shown) == 1 else f"one prompt of each of {spelled(len(shown))} categories"
    beside = f" and with {named(drafters[1])}, the best of the others" if drafters[1:] else ""
    seeds = f" ({named('ARM@SEED')} is one training seed of an arm)" if any("@" in name for name in drafters) else ""
    return (
        f"{where} at T = {examples.temperature:g} to {which}: the prompt whose τ is the median of its category with "
        f"{named(examples.drafters[0])}, the drafter with the largest τ{seeds}. Shown are the answers with that drafter"
        f"{beside}. **Underlined on a tint:** draft tokens that the target kept. **Plain:** the target's own tokens, "
        "the first from the prefill, then one at the end of every step. A bar ends a step."
    )


def _block(run: Run, example: Example) -> DrawnExample:
    prompt = example.prompt
    kept = [run.folder / name for name in prompt.images]
    missing = prompt.num_images - len(kept)
    pictures = "" if missing <= 0 else (
        f" ({spelled(missing)} picture{'s' if missing > 1 else ''}, not kept with the run)"
    )  # fmt: skip
    text = prompt.text if len(prompt.text) <= _MAX_PROMPT else f"{prompt.text[:_MAX_PROMPT].rstrip()} …"
    return DrawnExample(
        head=f"**{prompt.category}** {named(prompt.prompt_id)}{pictures}",
        prompt=text,
        pictures=tuple(kept),
        answers=tuple(map(_answer, example.answers)),
    )


def _answer(answer: Answer) -> DrawnAnswer:
    spans, left = _beginning(answer)
    return DrawnAnswer(head=f"{named(answer.drafter)} {words_of(answer)}", spans=spans, left=left)


def words_of(answer: Answer) -> str:
    """Return an answer's counts in words."""
    steps = f"{answer.num_steps} step{'s' if answer.num_steps > 1 else ''}"
    return f"τ = {fixed(answer.tau, 2)}: {answer.num_tokens} tokens in {steps}, {answer.num_drafted} of them drafted"


def _beginning(answer: Answer) -> tuple[tuple[Span, ...], str]:
    """Return the steps that are drawn, and what is said of the others."""
    totals = accumulate(span.num_tokens for span in answer.spans)
    beyond = [span.step for span, total in zip(answer.spans, totals, strict=True) if total > _MAX_TOKENS]
    if not beyond:
        return answer.spans, ""
    rest = answer.num_steps - beyond[0] + 1
    return tuple(span for span in answer.spans if span.step < beyond[0]), f"… {rest} more step{'s' * (rest > 1)}"
