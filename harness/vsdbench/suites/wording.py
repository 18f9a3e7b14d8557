"""From a row to a prompt: which rows are used, how the first turn is worded, which images it shows."""

from __future__ import annotations

import ast
import contextlib
import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.suites.articles import part_of, whole_sentences
from vsdbench.suites.images import ImageRef, references
from vsdbench.suites.prompts import Prompt, make_prompt
from vsdbench.suites.rows import Row
from vsdbench.suites.sources import Choices, SourceBase, Variant, template_columns

_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can name it alone, but no file and no tokenizer can hold it."""


@dataclass(frozen=True, slots=True)
class Worded:
    """What became of a row that is used.

    Attributes:
        prompt: Without its images.
        row_number: In the source.
        bare: The texts of the row without a template.
        is_complete: False if the source has images and this row none.
    """

    prompt: Prompt
    row_number: int
    bare: list[str]
    is_complete: bool = True


def prompts_of(source: SourceBase, rows: Iterable[Row]) -> Iterator[Worded]:
    """Yield what becomes of every row that is used.

    Raises:
        ConfigError: A column is not there, or does not hold what it should.
    """
    used = 0
    for number, row in enumerate(rows):
        if not _is_used(source, row):
            continue
        bare = [_text(source, row, source.fields.prompt)] if source.fields.prompt else _turns(source, row)
        variant = source.variants[used % len(source.variants)] if source.variants else None
        prompt = _prompt(source, row, number, turns=list(bare), variant=variant)
        shown = [_column(source, row, name) for name in source.fields.images]
        yield Worded(prompt, number, bare, is_complete=any(shown) or not shown)
        used += 1


def images_of(source: SourceBase, row: Row, *, folder: Path) -> list[ImageRef]:
    """Return the images of a row, in the order of the columns.

    Args:
        source: The row's source.
        row: With everything in it.
        folder: What relative paths are relative to.

    Raises:
        ConfigError: Something in an image column is not an image.
    """
    images: list[ImageRef] = []
    for name in source.fields.images:
        where = f"source '{source.name}', column '{name}'"
        images += references(_column(source, row, name), folder=folder, where=where)
    return images


def _is_used(source: SourceBase, row: Row) -> bool:
    where = source.where
    if where is None:
        return True
    if where.part_by and part_of(str(_column(source, row, where.part_by))) != where.part:
        return False
    if any(str(_column(source, row, name)) != value for name, value in where.equals.items()):
        return False
    return not where.min_characters or len(_text(source, row, source.fields.prompt or "")) >= where.min_characters


def _prompt(source: SourceBase, row: Row, number: int, *, turns: list[str], variant: Variant | None) -> Prompt:
    """Return the prompt that a row is, from its bare texts."""
    fields = source.fields
    if source.max_characters:
        turns[0] = whole_sentences(turns[0], source.max_characters)
    template = variant.template if variant else source.template
    columns = {name: _filled_in(source, row, name, turns[0]) for name in template_columns(template)}
    if template != "{prompt}":
        turns[0] = template.format_map(columns).strip()
    turns[0] += source.suffix
    category = variant.category if variant else fields.constant_category or source.name
    if fields.category:
        category = str(_column(source, row, fields.category))
    return make_prompt(
        identifier=str(_column(source, row, fields.id)) if fields.id else f"{number:05d}",
        category=category,
        turns=turns[: source.max_turns],
        source=source.name,
    )


def _filled_in(source: SourceBase, row: Row, name: str, text: str) -> object:
    """Return what stands for ``{name}`` in a template; ``text`` is that of the prompt."""
    if name == "prompt":
        return text
    if name == "choices" and source.choices:
        return _choices(source, source.choices, row)
    value = _column(source, row, name)
    is_empty = value is None or (isinstance(value, str) and not value.strip())
    return source.empty.get(name, value) if is_empty else value


def _choices(source: SourceBase, choices: Choices, row: Row) -> str:
    """Return the answers to choose from, lettered, as one text."""
    if len(choices.columns) == 1:
        answers = _listed(source, row, choices.columns[0])
    else:
        answers = [_column(source, row, name) for name in choices.columns]
    answers = [answer for answer in answers if answer is not None and str(answer).strip()]
    if not 1 <= len(answers) <= len(string.ascii_uppercase):
        names = "', '".join(choices.columns)
        raise ConfigError(f"source '{source.name}': the choices in '{names}' are {len(answers)}; 1 to 26 are needed.")
    lines = zip(string.ascii_uppercase, answers, strict=False)
    return choices.separator.join(choices.line.format(letter=letter, choice=answer) for letter, answer in lines)


def _listed(source: SourceBase, row: Row, name: str) -> list[object]:
    """Return the list that a column holds, or that is written out in its text."""
    value = _column(source, row, name)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"source '{source.name}': column '{name}' must hold a list of choices, but one row has {value!r}."
        )
    return list(value)


def _column(source: SourceBase, row: Row, name: str) -> object:
    if name not in row:
        raise ConfigError(
            f"source '{source.name}' has no column '{name}'; its columns are {', '.join(row)}.{did_you_mean(name, row)}"
        )
    return row[name]


def _is_text(value: str) -> bool:
    return bool(value.strip()) and _HALF.search(value) is None


def _text(source: SourceBase, row: Row, name: str) -> str:
    value = _column(source, row, name)
    if not isinstance(value, str) or not _is_text(value):
        raise ConfigError(f"source '{source.name}': column '{name}' must hold a text, but one row has {value!r}.")
    return value


def _turns(source: SourceBase, row: Row) -> list[str]:
    name = source.fields.turns or ""
    value = _column(source, row, name)
    texts = list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(text, str) and _is_text(text) for text in texts):
        raise ConfigError(
            f"source '{source.name}': column '{name}' must hold a list of texts, but one row has {value!r}."
        )
    return texts
