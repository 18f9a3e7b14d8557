"""What a report is made of, before it is set in any format: tables, pictures, prose, sections.

Prose is plain text with four marks: `` `name` `` for names and commands, ``**words**`` for a run-in head,
``[[table:main]]`` or ``[[figure:pareto]]`` for a cross-reference, ``[[cite:vsd]]`` for a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from matplotlib.figure import Figure

from vsdbench.bench.spans import Span

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One entry of a table.

    Attributes:
        text: As it is printed.
        number: The unrounded value, for CSV; None where the text is all there is.
        ends: Both ends of the interval as they are printed.
        interval: The same, unrounded.
        strong: Set in bold.
    """

    text: str
    number: float | None = None
    ends: tuple[str, str] | None = None
    interval: tuple[float, float] | None = None
    strong: bool = False

    def inline(self) -> str:
        """Return the text and, where there is one, its interval: ``1.52 [1.47, 1.58]``."""
        return self.text if self.ends is None else f"{self.text} [{self.ends[0]}, {self.ends[1]}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with a name (of its files and of references to it), ready to be set.

    Attributes:
        name: Lower case, hyphens.
        title: Of the caption.
        columns: Headers.
        rows: As long as ``columns`` each.
        note: What the columns mean, below the table.
        num_left: Columns, from the first, that are aligned to the left; the others are to the right.
        rules: Rows above which a thin rule separates groups.
        stretch: The columns behind the first share the width and wrap; else every column is as wide as its text.
        wide: Over both columns of the page.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    num_left: int = 1
    rules: tuple[int, ...] = ()
    stretch: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table '{self.name}' has {len(self.columns)} columns, but not in every row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure with its caption; ``alt`` says in words what is to be seen, for those who cannot see it."""

    name: str
    title: str
    note: str
    alt: str
    figure: Figure
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of short paragraphs."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines to be typed into a shell."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnAnswer:
    """An answer as spans, under a line that says whose it is; ``left`` says what is left out of it."""

    head: str
    spans: tuple[Span, ...]
    left: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnExample:
    """A prompt with its pictures (PNG files) and some answers to it."""

    head: str
    prompt: str
    pictures: tuple[Path, ...]
    answers: tuple[DrawnAnswer, ...]


Block: TypeAlias = str | Table | Picture | Bullets | Commands | DrawnExample


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it; ``inline`` tables stand in the text, others go where a page has room."""

    title: str
    blocks: tuple[Block, ...]
    inline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        title: Of the document.
        subtitle: What was measured, on what, when.
        summary: The result in plain words, a paragraph each.
        sections: In order; none is empty.
        appendix: A last section that may be left out where its page has no room for it; None if there is nothing in it.
        extra_tables: Written as files beside the report, not set in it.
        references: Source key to reference line, of every source that may be cited.
        timestamp: Seconds since 1970 of the document's date.
    """

    title: str
    subtitle: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    appendix: Section | None
    extra_tables: tuple[Table, ...]
    references: dict[str, str]
    timestamp: int

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table, those outside the text included."""
        sections = (*self.sections, *([self.appendix] if self.appendix else []))
        return (*(b for s in sections for b in s.blocks if isinstance(b, Table)), *self.extra_tables)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Every figure."""
        return tuple(b for s in self.sections for b in s.blocks if isinstance(b, Picture))

    @property
    def files(self) -> tuple[Path, ...]:
        """Pictures of prompts, which are copied beside the figures; two of one name are the same."""
        found = (file for s in self.sections for b in s.blocks if isinstance(b, DrawnExample) for file in b.pictures)
        return tuple({file.name: file for file in found}.values())


# --- cells ---------------------------------------------------------------------------------------------------------


def words(text: object) -> Cell:
    """Return a cell of text; None is a dash, a line break is a space."""
    return Cell(text=MISSING if text is None else " ".join(str(text).split()))


def count(value: int | None) -> Cell:
    """Return a whole number with thousands set apart."""
    return Cell(text=MISSING) if value is None else Cell(text=f"{value:,}".replace(",", "\u202f"), number=value)


def number(value: float | None, digits: int = 2) -> Cell:
    """Return a rounded number."""
    return estimate(value, None, digits)


def estimate(
    value: float | None, interval: tuple[float, float] | list[float] | None, digits: int = 2, *, strong: bool = False
) -> Cell:
    """Return a rounded number with its interval."""
    if value is None:
        return Cell(text=MISSING)
    ends = None if interval is None else (fixed(interval[0], digits), fixed(interval[1], digits))
    unrounded = None if interval is None else (interval[0], interval[1])
    return Cell(text=fixed(value, digits), number=value, ends=ends, interval=unrounded, strong=strong)


def change(
    value: float | None, interval: tuple[float, float] | list[float] | None = None, *, strong: bool = False
) -> Cell:
    """Return a change in per cent with its sign, one decimal."""
    cell = estimate(value, interval, 1, strong=strong)
    if value is None:
        return cell
    ends = None if interval is None else (signed(interval[0]), signed(interval[1]))
    return Cell(text=signed(value), number=value, ends=ends, interval=cell.interval, strong=strong)


def percent(share: float | None, digits: int = 0) -> Cell:
    """Return a share as per cent (the number stays a share)."""
    return Cell(text=MISSING) if share is None else Cell(text=fixed(100 * share, digits), number=share)


def fixed(value: float, digits: int) -> str:
    """Return a number with a real minus and without a minus zero.

    >>> fixed(-0.004, 2), fixed(-1.5, 1) == MINUS + "1.5"
    ('0.00', True)
    """
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """Return a change with its sign, one decimal; none for one that rounds to 0.

    >>> signed(2.04), signed(-0.01)
    ('+2.0', '0.0')
    """
    text = fixed(value, 1)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def spelled(value: int) -> str:
    """Return a small number in words.

    >>> spelled(2), spelled(14)
    ('two', '14')
    """
    small = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    return small[value] if value < len(small) else str(value)


def named(name: str) -> str:
    """Return a name as it is set in prose; a mark in it cannot end the span.

    >>> named("eagle3-kl")
    '`eagle3-kl`'
    """
    return "`" + " ".join(name.replace("`", "'").split()) + "`"


def listed(items: list[str]) -> str:
    """Return items joined as in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
