"""Answers as spans: which tokens the drafter guessed and the target kept, and which the target gave itself.

Everything is counted from records: a step keeps ``num_accepted`` draft tokens and ends, unless the answer ends before,
with one token of the target's own (the correction or bonus). The first token of an answer is the prefill's. The words
are those that the run kept (``store.examples``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vsdbench.bench import metrics
from vsdbench.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from vsdbench.bench.paired import Frames
    from vsdbench.store.examples import ExamplePrompt, Examples


class Span(NamedTuple):
    """Consecutive tokens of one step that have one origin.

    Attributes:
        text: What they say; "" where a character is completed by the span behind them, which then has all of it.
        drafted: Whether the drafter guessed them.
        step: Counted from 1; 0 is the prefill.
        num_tokens: How many they are.
    """

    text: str
    drafted: bool
    step: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One drafter's answer.

    Attributes:
        drafter: Its name.
        tau: Tokens emitted a step of this answer.
        num_steps: Steps of it.
        spans: All of it, in order.
    """

    drafter: str
    tau: float
    num_steps: int
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of it, the prefill's included."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def num_drafted(self) -> int:
        """Those that the drafter guessed."""
        return sum(span.num_tokens for span in self.spans if span.drafted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and how it was answered."""

    prompt: ExamplePrompt
    answers: tuple[Answer, ...]


def split(pieces: Sequence[str], num_accepted: Sequence[int], num_emitted: Sequence[int]) -> tuple[Span, ...]:
    """Return an answer as spans.

    Args:
        pieces: The text of every token; one more than all steps emitted.
        num_accepted: Draft tokens kept, a number a step.
        num_emitted: Tokens emitted, a number a step.

    >>> [(span.text, span.drafted) for span in split(["A", " b", " c", " d"], [2], [3])]
    [('A', False), (' b c', True), (' d', False)]

    Raises:
        ValueError: The numbers are those of another answer.
    """
    if len(pieces) != 1 + sum(num_emitted):
        raise ValueError(f"the steps emit {sum(num_emitted)} tokens and the prefill one, but there are {len(pieces)}")

    def found() -> Iterator[Span]:
        yield Span(pieces[0], drafted=False, step=0, num_tokens=1)
        start = 1
        for step, (accepted, emitted) in enumerate(zip(num_accepted, num_emitted, strict=True), start=1):
            middle, stop = start + min(accepted, emitted), start + emitted
            for drafted, part in ((True, pieces[start:middle]), (False, pieces[middle:stop])):
                if part:
                    yield Span("".join(part), drafted, step, len(part))
            start = stop

    return tuple(found())


def answers_of(frames: Frames, mode: str, temperature: float, method: str | None = None) -> Frames:
    """Return drafters' records and steps of a mode that are shown: those of the first turn and repeat."""
    shown = metrics.select(*frames, mode=mode, temperature=temperature, kind="drafter", turn=0, repeat=0)
    return shown if method is None else metrics.select(*shown, method=method)


def drawn(frames: Frames, examples: Examples, drafters: Sequence[str] = ()) -> list[Example]:
    """Return the examples of a run with the answers of the drafters asked for, or of those that the run names.

    Raises:
        ConfigError: A drafter has no answer to them.
    """
    records, steps = answers_of(frames, examples.mode, examples.temperature)
    known = [str(name) for name in records.loc[records["num_steps"] > 0, "method"].unique()]
    for name in drafters:
        if name not in known:
            raise ConfigError(f"No answer of a drafter '{name}' is kept.{did_you_mean(name, known)}")
    wanted = list(drafters) or examples.drafters
    found: list[Example] = []
    for prompt in examples.prompts:
        parts = [(name, metrics.select(records, steps, method=name, prompt_id=prompt.prompt_id)) for name in wanted]
        answers = [_answer(name, part, examples) for name, part in parts if len(part[1])]
        found.append(Example(prompt=prompt, answers=tuple(answers)))
    return found


def to_json(example: Example) -> dict[str, Any]:
    """Return an example as plain data: the prefill's token, then what each step kept of the drafter and added."""
    return example.prompt.model_dump() | {
        "answers": [
            {
                "drafter": answer.drafter,
                "tau": answer.tau,
                "num_steps": answer.num_steps,
                "num_tokens": answer.num_tokens,
                "num_drafted": answer.num_drafted,
                "prefill": answer.spans[0].text,
                "steps": _steps(answer.spans[1:]),
            }
            for answer in example.answers
        ]
    }


def _steps(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Return one entry a step; a part that it does not have is empty."""
    steps: dict[int, dict[str, Any]] = {}
    for span in spans:
        entry = steps.setdefault(span.step, {"drafted": "", "num_drafted": 0, "target": ""})
        entry |= {"drafted": span.text, "num_drafted": span.num_tokens} if span.drafted else {"target": span.text}
    return list(steps.values())


def _answer(name: str, frames: Frames, examples: Examples) -> Answer:
    records, steps = frames
    sha = str(records["output_sha256"].iloc[0])
    if sha not in examples.pieces:
        raise ConfigError(f"examples.json lacks an answer of '{name}': restore it or delete it.")
    tau = metrics.tau(steps)
    assert tau is not None
    counts = ([int(number) for number in steps[column]] for column in ("num_accepted", "num_emitted"))
    return Answer(drafter=name, tau=tau, num_steps=len(steps), spans=split(examples.pieces[sha], *counts))
