"""Answers drawn in the terminal: what the drafter guessed and what the target gave, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from vsdbench.bench.spans import Answer, Example
from vsdbench.report.examples import words_of
from vsdbench.report.render import printable
from vsdbench.store.examples import Examples

_DRAFTED, _OWN, _FAINT = "underline cyan", "", "dim"
_BAR = "\N{BOX DRAWINGS LIGHT VERTICAL}"


def print_spans(examples: Examples, drawn: Sequence[Example], console: Console) -> None:
    """Print examples; where a console has no colours and no underlining, drafted tokens stand in brackets."""
    plain = console.color_system is None
    marks = "in angle brackets" if plain else "underlined"
    console.print(
        f"Answers at T = {examples.temperature:g}. Of every category the prompt whose τ is the median by "
        f"{examples.drafters[0]}. Draft tokens that the target kept are {marks}; the others are the target's own; "
        f"{_BAR} ends a step.",
        style=_FAINT,
        markup=False,
    )
    for example in drawn:
        prompt = example.prompt
        pictures = f", {prompt.num_images} picture{'s' if prompt.num_images > 1 else ''}" if prompt.num_images else ""
        kept = f" ({', '.join(prompt.images)})" if prompt.images else ""
        console.print()
        console.print(Text(f"{prompt.category} · {prompt.prompt_id}{pictures}{kept}", style="bold"), soft_wrap=True)
        console.print(Text(_lines(prompt.text), style=_FAINT))
        for answer in example.answers:
            console.print(Text(f"{answer.drafter}: {words_of(answer)}"))
            console.print(_text(answer, plain=plain))


def _text(answer: Answer, *, plain: bool) -> Text:
    text = Text()
    step = 0
    for span in answer.spans:
        if span.step != step:
            text.append(_BAR, style=_FAINT)
            step = span.step
        said = _lines(span.text)
        if span.drafted and said and plain:
            said = f"\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}{said}\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
        text.append(said, style=_DRAFTED if span.drafted else _OWN)
    text.append(_BAR, style=_FAINT)
    return text


def _lines(text: str) -> str:
    """Return text whose lines end where they do, and in which nothing controls the terminal."""
    return "\n".join(map(printable, text.split("\n")))
