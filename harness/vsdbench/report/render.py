"""Tables in four formats, and a document as Typst source: the only place that knows what each format must escape."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator

from vsdbench.bench.spans import Span
from vsdbench.report.model import (
    Block,
    Bullets,
    Cell,
    Commands,
    Document,
    DrawnExample,
    Picture,
    Section,
    Table,
)

_MARKS = re.compile(r"`([^`]*)`|\*\*(.+?)\*\*|\[\[(table|figure|cite):([a-z0-9-]+)\]\]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&@^])")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "#": r"\#", "$": r"\$", "%": r"\%", "&": r"\&", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "\N{EN DASH}": "--", "\N{MINUS SIGN}": "$-$", "\u202f": r"\,",
    "\N{MIDDLE DOT}": r"$\cdot$", "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{GREEK SMALL LETTER TAU}": r"$\tau$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$", "\N{GREEK SMALL LETTER BETA}": r"$\beta$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$", "\N{LESS-THAN OR EQUAL TO}": r"$\leq$",
}  # fmt: skip
_SIGNS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}
_HIGH = 16
"""Rows: a table with more would leave too much of a column empty if it stood in the text and had to go to the next."""
FORMATS: dict[str, Callable[[Table], str]] = {}
"""File suffix to renderer, of the formats in which every table is written beside the report."""


# --- tables --------------------------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """Return the table with numbers of ten digits; ``low`` and ``high`` columns follow one of intervals."""
    with_interval = [any(row[index].interval for row in table.rows) for index in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = [
        [name, f"{name} low", f"{name} high"] if has else [name]
        for name, has in zip(table.columns, with_interval, strict=True)
    ]
    writer.writerow([name for names in header for name in names])
    for row in table.rows:
        writer.writerow([v for cell, has in zip(row, with_interval, strict=True) for v in _csv(cell, has)])
    return out.getvalue()


def _csv(cell: Cell, has_interval: bool) -> list[str]:
    value = cell.text if cell.number is None else _digits(cell.number)
    if not has_interval:
        return [value]
    return [value, *(("", "") if cell.interval is None else map(_digits, cell.interval))]


def _digits(value: float) -> str:
    """Return a number with ten digits: the last of sixteen depend on the processor, and no result does."""
    return str(value) if isinstance(value, int) else f"{value:.10g}"


def to_markdown(table: Table) -> str:
    """Return the table as GitHub-flavoured Markdown with its title above and its note below."""
    lines = [
        _markdown_row([_markdown(name) for name in table.columns]),
        "|" + "|".join(" --- " if i < table.num_left else " ---: " for i in range(len(table.columns))) + "|",
    ]
    lines += [_markdown_row([_markdown_cell(cell) for cell in row]) for row in table.rows]
    parts = [f"**{_markdown(plain(table.title))}**", "\n".join(lines)]
    parts += [_markdown(plain(table.note))] if table.note else []
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = _markdown(cell.text)
    interval = "" if cell.ends is None else f" ({cell.ends[0]} to {cell.ends[1]})"
    return (f"**{text}**" if cell.strong else text) + interval


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def to_latex(table: Table) -> str:
    r"""Return the table as a LaTeX float; the preamble needs ``\usepackage{booktabs}``."""
    kind = "table*" if table.wide else "table"
    align = "l" * table.num_left + "r" * (len(table.columns) - table.num_left)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{{kind}}}[t]",
        "\\centering\\small",
        f"\\caption{{{_latex(plain(table.title))}}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{@{{}}{align}@{{}}}}",
        "\\toprule",
        _latex_row([_latex(name) for name in table.columns]),
        "\\midrule",
    ]
    for index, row in enumerate(table.rows):
        lines += ["\\midrule"] if index in table.rules else []
        lines.append(_latex_row([_latex_cell(cell) for cell in row]))
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"\\par\\smallskip\\footnotesize {_latex(plain(table.note))}"] if table.note else []
    return "\n".join([*lines, f"\\end{{{kind}}}"]) + "\n"


def _latex_row(cells: list[str]) -> str:
    first = "{}" + cells[0] if cells[0][:1] in {"[", "*"} else cells[0]  # the line break above would take them
    return " & ".join([first, *cells[1:]]) + r" \\"


def _latex_cell(cell: Cell) -> str:
    text = f"\\textbf{{{_latex(cell.text)}}}" if cell.strong else _latex(cell.text)
    interval = "" if cell.ends is None else f" {{\\scriptsize [{_latex(cell.ends[0])}, {_latex(cell.ends[1])}]}}"
    return text + interval


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def plain(prose: str) -> str:
    """Return prose without its marks; what it refers to is left out.

    >>> plain("the drafter `a_b` (**bold**) [[cite:vsd]]")
    'the drafter a_b (bold)'
    """
    return _MARKS.sub(lambda match: match[1] or match[2] or "", prose).strip()


FORMATS |= {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}


# --- Typst ---------------------------------------------------------------------------------------------------------


def to_typst(
    document: Document, *, template: str, figures: str, size_pt: float, appendix: bool, squeezed: Collection[str] = ()
) -> str:
    """Return the document as Typst source. Every text is a string literal, so nothing in it is read as markup.

    Args:
        document: All of it.
        template: Name of the template file, beside the source.
        figures: Folder of the SVG figures, beside the source.
        size_pt: Of the type.
        appendix: Whether it is set.
        squeezed: Labels (``table-main``) of tables and figures for which a column had no room: they stand in the text,
            high tables over both columns.

    Raises:
        ValueError: A source is cited that ``document.references`` lacks.
    """
    writer = _Typst(document.references, figures, squeezed)
    last = [document.appendix] if document.appendix and appendix else []
    body = "\n\n".join(writer.section(section) for section in (*document.sections, *last))
    summary = ", ".join(writer.prose(paragraph) for paragraph in document.summary)
    head = (
        f"#import {literal(template)}: *\n\n#show: paper.with(\n  title: {literal(document.title)},\n"
        f"  subtitle: {writer.prose(document.subtitle)},\n  summary: ({summary},),\n  size: {size_pt:g}pt,\n)\n"
    )
    cited = ", ".join(literal(document.references[key]) for key in writer.cited)
    return f"{head}\n{body}\n\n" + (f"#references({cited})\n" if cited else "")


def literal(text: str) -> str:
    r"""Return a Typst string literal.

    >>> print(literal('a "quoted" \\ name'))
    "a \"quoted\" \\ name"
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "").replace("\t", " ")
    return f'"{escaped}"'


class _Typst:
    """Writes blocks and numbers sources in the order in which they are first cited."""

    def __init__(self, references: dict[str, str], figures: str, squeezed: Collection[str] = ()) -> None:
        self._references = references
        self._figures = figures
        self._squeezed = squeezed
        self.cited: list[str] = []

    def section(self, section: Section) -> str:
        blocks = "\n\n".join(self._block(block, inline=section.inline) for block in section.blocks)
        return f"#heading(level: 1, {literal(section.title)})\n\n{blocks}"

    def _block(self, block: Block, *, inline: bool) -> str:
        match block:
            case Table():
                return self.table(block, inline=inline)
            case Picture():
                return self._picture(block)
            case Bullets():
                return f"#bullets({', '.join(self.prose(item) for item in block.items)})"
            case DrawnExample():
                return self._example(block)
            case Commands():
                return f"#commands({', '.join(literal(line) for line in block.lines)})"
            case str():
                return f"#par({self.prose(block)})"

    def prose(self, text: str) -> str:
        """Return a code block whose parts join to the paragraph."""
        return "{ " + "; ".join(self._parts(text)) + " }"

    def _parts(self, text: str) -> Iterator[str]:
        end = 0
        for match in _MARKS.finditer(text):
            if match.start() > end:
                yield literal(_tied(text[end : match.start()]))
            code, bold, kind, key = match.groups()
            if code is not None:
                yield f"name({literal(code)})"
            elif bold is not None:
                yield f"strong({literal(bold)})"
            elif kind == "cite":
                yield f"cited({self._number(key)})"
            else:
                yield f"ref(label({literal(f'{kind}-{key}')}))"
            end = match.end()
        if end < len(text):
            yield literal(_tied(text[end:]))

    def _number(self, key: str) -> int:
        if key not in self._references:
            raise ValueError(f"'{key}' is cited, but there is no such reference")
        if key not in self.cited:
            self.cited.append(key)
        return self.cited.index(key) + 1

    def table(self, table: Table, *, inline: bool = False) -> str:
        """Return the call that sets a table, in the text or where a page has room."""
        squeezed, high = f"table-{table.name}" in self._squeezed, len(table.rows) > _HIGH
        inline, wide = inline or (squeezed and not high), table.wide or squeezed
        rows = "".join(f"    ({', '.join(_typst_cell(cell) for cell in row)},),\n" for row in table.rows)
        align = ", ".join("left" if i < table.num_left else "right" for i in range(len(table.columns)))
        return (
            f"#data-table(\n  key: {literal(table.name)}, wide: {_typst_bool(wide and not inline)}, "
            f"inline: {_typst_bool(inline)}, stretch: {_typst_bool(table.stretch)},\n  title: "
            f"{self.prose(table.title)},\n  note: {self.prose(table.note) if table.note else 'none'},\n"
            f"  align: ({align},), rules: ({''.join(f'{rule}, ' for rule in table.rules)}),\n"
            f"  header: ({', '.join(literal(name) for name in table.columns)},),\n  rows: (\n{rows}  ),\n)"
        )

    def _picture(self, picture: Picture) -> str:
        path = f"{self._figures}/{picture.name}.svg"
        inline = " inline: true," if f"figure-{picture.name}" in self._squeezed else ""
        return (
            f"#picture(\n  key: {literal(picture.name)}, wide: {_typst_bool(picture.wide)},{inline}\n"
            f"  file: read({literal(path)}, encoding: none), alt: {literal(plain(picture.alt))},\n"
            f"  title: {self.prose(picture.title)},\n  note: {self.prose(picture.note)},\n)"
        )

    def _example(self, example: DrawnExample) -> str:
        pictures = "".join(
            f"read({literal(f'{self._figures}/{file.name}')}, encoding: none), " for file in example.pictures
        )
        answers = "".join(
            f"    (head: {self.prose(answer.head)}, spans: ({''.join(map(_typst_span, answer.spans))}), "
            f"left: {literal(answer.left)}),\n"
            for answer in example.answers
        )
        return (
            f"#example(\n  head: {self.prose(example.head)},\n  prompt: {literal(printable(example.prompt))},\n"
            f"  pictures: ({pictures}),\n  answers: (\n{answers}  ),\n)"
        )


def printable(text: str) -> str:
    r"""Return text on one line: line ends and tabs as signs, other characters that control something as a question.

    >>> printable("a\n\tb\x1b")
    'a\u21b5\u2192b\ufffd'
    """
    return "".join(_SIGNS.get(c, "\ufffd" if unicodedata.category(c)[0] == "C" else c) for c in text)


def _typst_span(span: Span) -> str:
    return f"({literal(printable(span.text))}, {_typst_bool(span.drafted)}, {span.step}), "


def _typst_bool(value: bool) -> str:
    return "true" if value else "false"


def _tied(text: str) -> str:
    """Return text whose lines cannot break before a per cent sign or around an equals sign."""
    return text.replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0")


def _typst_cell(cell: Cell) -> str:
    ends = "" if cell.ends is None else f", ends: ({literal(cell.ends[0])}, {literal(cell.ends[1])})"
    return f"cell({literal(cell.text)}{ends}{', bold: true' if cell.strong else ''})"
