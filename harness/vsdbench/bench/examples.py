"""Which answers of a run are kept to be drawn, and how the text of every token is found.

The choice depends on the records alone: of every category (the first eight) the prompt at the median of tau, by the
drafter whose tau is the largest over all prompts. So what is shown is neither the best nor the worst of a category.

Only pictures that the program draws itself are kept. Those of data sets have licences and owners of their own, which a
suite's licence need not cover; of them it is said how many there were.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vsdbench.bench import metrics
from vsdbench.bench.image_controls import family, misled
from vsdbench.bench.spans import answers_of
from vsdbench.store.examples import PICTURES, ExamplePrompt, Examples, save_examples
from vsdbench.store.frames import to_frames
from vsdbench.store.store import load_manifest, load_outputs, load_records

if TYPE_CHECKING:
    import pandas as pd

    from vsdbench.bench.paired import Frames
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.prompts import Prompt

MAX_CATEGORIES = 8
MAX_CHARACTERS = 600
MAX_SIDE = 256
"""Pixels of a kept picture's longer side."""
_TAIL = 150
_OPEN = "\N{REPLACEMENT CHARACTER}"
Decode = Callable[[Sequence[int]], str]


def keep_examples(run: Path, suite: Suite, decode: Decode) -> Examples | None:
    """Choose the examples of a finished run, write them beside its records, and return them.

    Args:
        run: The run's folder.
        suite: What was run.
        decode: Gives the text of token ids, special tokens included, nothing tidied up.

    Returns:
        The examples; None, and nothing written, where no drafter recorded its steps.
    """
    frames = to_frames(load_records(run))
    records = frames[0][(frames[0]["kind"] == "drafter") & (frames[0]["num_steps"] > 0)]
    records = records[~records["method"].isin(misled(load_manifest(run)))]
    if records.empty:
        return None
    first = records.sort_values("temperature", kind="stable").iloc[0]
    mode, temperature = str(first["mode"]), float(first["temperature"])
    drafters = two_best((records, frames[1]), mode, temperature)
    chosen = choose(answers_of(frames, mode, temperature, method=drafters[0]), suite.prompts)
    drawn = {source.name for source in suite.config.sources if source.loader == "scenes"}
    pictures: dict[str, bytes] = {}
    prompts = [_shown_prompt(prompt, pictures, is_drawn=prompt.source in drawn) for prompt in chosen]
    examples = Examples(
        drafters=drafters,
        mode=mode,
        temperature=temperature,
        prompts=tuple(prompts),
        pieces=_pieces_of(answers_of(frames, mode, temperature)[0], chosen, load_outputs(run), decode),
    )
    save_examples(run, examples, pictures)
    return examples


def two_best(frames: Frames, mode: str, temperature: float) -> tuple[str, ...]:
    """Return the drafter of the largest tau in a mode and the best of another name: seeds of one share their name."""
    records, steps = metrics.select(*frames, mode=mode, temperature=temperature, kind="drafter")
    names = records.loc[records["num_steps"] > 0, "method"].unique()
    taus = {str(name): metrics.tau(metrics.select(records, steps, method=name)[1]) or 0.0 for name in sorted(names)}
    best = max(taus, key=taus.__getitem__)
    others = {name: tau for name, tau in taus.items() if family(name) != family(best)}
    return (best, *([max(others, key=others.__getitem__)] if others else []))


def choose(frames: Frames, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return of every category, in the suite's order, the prompt at the median of tau, of two middle ones the larger.

    Args:
        frames: Answers to the first turns, of one drafter and mode.
        prompts: Of the suite.
    """
    records, steps = frames
    tau = {
        str(prompt_id): metrics.tau(steps[steps["record"].isin(rows.index)])
        for prompt_id, rows in records.groupby("prompt_id", sort=False)
    }
    by_category: dict[str, list[tuple[float, int]]] = {}
    for number, prompt in enumerate(prompts):
        value = tau.get(prompt.id)
        if value is not None:
            by_category.setdefault(prompt.category, []).append((value, number))
    places = [sorted(found)[len(found) // 2][1] for found in by_category.values()]
    return [prompts[place] for place in places[:MAX_CATEGORIES]]


def pieces(token_ids: Sequence[int], decode: Decode) -> tuple[str, ...]:
    """Return the text that each token adds to an answer.

    A token may hold a part of a character only (byte-level BPE); then it adds nothing, and the token that completes the
    character adds all of it. Joined, the pieces are the whole text.

    >>> pieces([72, 195, 182], lambda ids: bytes(ids).decode(errors="replace"))
    ('H', '', 'ö')
    """
    found: list[str] = []
    length = 0
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[:end])
        if text.endswith(_OPEN) and end < len(token_ids):
            found.append("")
            continue
        found.append(text[length:])
        length = len(text)
    return tuple(found)


def _pieces_of(
    records: pd.DataFrame, prompts: Sequence[Prompt], outputs: Mapping[str, Sequence[int]], decode: Decode
) -> dict[str, tuple[str, ...]]:
    """Return the pieces of every different answer of drafters to some prompts."""
    ours = records["prompt_id"].isin([prompt.id for prompt in prompts]) & (records["num_steps"] > 0)
    return {str(sha): pieces(outputs[sha], decode) for sha in sorted(records.loc[ours, "output_sha256"].unique())}


def shortened(text: str) -> str:
    """Return a text of at most ``MAX_CHARACTERS`` or so: its beginning and its end.

    >>> len(shortened("word " * 1000)) <= MAX_CHARACTERS
    True
    """
    text = text.strip()
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[: MAX_CHARACTERS - _TAIL - 3].rstrip()} \N{HORIZONTAL ELLIPSIS} {text[-_TAIL:].lstrip()}"


def _shown_prompt(prompt: Prompt, pictures: dict[str, bytes], *, is_drawn: bool) -> ExamplePrompt:
    """Return a prompt as it is shown; its pictures, if they may be kept, are added to ``pictures``."""
    files = {f"{PICTURES}/{image.sha256[:16]}.png": image for image in prompt.images} if is_drawn else {}
    pictures |= {name: _png(image.open()) for name, image in files.items()}
    return ExamplePrompt(
        prompt_id=prompt.id,
        category=prompt.category,
        text=shortened(prompt.turns[0]),
        num_images=len(prompt.images),
        images=tuple(files),
    )


def _png(image: Image.Image) -> bytes:
    """Return a picture as a PNG file of at most ``MAX_SIDE`` pixels a side."""
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
