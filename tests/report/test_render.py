"""Four renderings of one table: each holds the same numbers and escapes what its own format would read as markup."""

import csv
import io
import json
import re

import pytest
import typst

from vsdbench.report.model import MINUS, MISSING, Cell, Document, Section, Table, estimate, named, words
from vsdbench.report.render import literal, plain, to_csv, to_latex, to_markdown, to_typst

NASTY = [
    "a_b", "50%", "#1", "$5", "x&y", "@ref", "*bold*", "a|b", "[x]", "~n^2", "{y}", r"back\slash", 'say "hi"', "<tag>",
    "`code`", "=1+1", "// no", "a,b", f"τ {MINUS} 1",
]  # fmt: skip


def table(*, wide=False):
    rows = tuple((words(name), estimate(1.234567, (-1.0, 2.5), strong=not i)) for i, name in enumerate(NASTY))
    return Table(
        name="nasty", title="Title of `a_b` & more", columns=("name_#", "τ"), rows=rows, note="50 % of $x_1$",
        rules=(3,), wide=wide,
    )  # fmt: skip


def test_csv_has_every_name_and_unrounded_numbers():
    header, *rows = csv.reader(io.StringIO(to_csv(table())))
    assert header == ["name_#", "τ", "τ low", "τ high"]
    assert [row[0] for row in rows] == NASTY
    assert {tuple(map(float, row[1:])) for row in rows} == {(1.234567, -1.0, 2.5)}


def test_csv_without_numbers_has_the_text_and_missing_intervals_are_empty():
    cells = ((words("a"), Cell(text=MISSING)), (words("b"), estimate(1.0, (0.5, 2.0))))
    text = to_csv(Table(name="t", title="", columns=("x", "y"), rows=cells))
    assert list(csv.reader(io.StringIO(text)))[1:] == [["a", MISSING, "", ""], ["b", "1", "0.5", "2"]]


def test_markdown_cells_are_the_names_once_unescaped():
    lines = [line for line in to_markdown(table()).splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert [len(row) for row in cells] == [2] * (len(NASTY) + 2)
    assert [re.sub(r"\\(.)", r"\1", row[0]).strip() for row in cells[2:]] == NASTY
    assert cells[2][1].strip() == f"**1.23** ({MINUS}1.00 to 2.50)"
    assert cells[3][1].strip() == f"1.23 ({MINUS}1.00 to 2.50)"
    for row in cells[2:]:
        assert not re.search(r"(?<!\\)[*_`<#$@\[\]~]", row[0]), row[0]


def latex_plain(text):
    """Undo the escapes by hand."""
    named_characters = {
        "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<", "textgreater": ">",
        "textbar": "|", "textquotedbl": '"',
    }  # fmt: skip
    text = text.replace(r"$\tau$", "τ").replace("$-$", MINUS)
    for name, character in named_characters.items():
        text = text.replace(f"\\{name}{{}}", f"\0{ord(character)}\0")
    text = re.sub(r"\\([{}#$%&_])", r"\1", text)
    return re.sub("\0(\\d+)\0", lambda match: chr(int(match[1])), text)


def test_latex_rows_are_the_names_once_unescaped_and_braces_balance():
    text = to_latex(table())
    rows = [line for line in text.splitlines() if line.endswith(r"\\")][1:]
    firsts = [re.split(r"(?<!\\)&", row)[0].strip() for row in rows]
    assert [latex_plain(first.removeprefix("{}")) for first in firsts] == NASTY
    assert not [first for first in firsts if first[0] in "[*"]  # a row may not begin with what \\ would take
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert r"\textbf{1.23} {\scriptsize [$-$1.00, 2.50]}" in rows[0]
    assert text.count(r"\midrule") == 2
    assert r"50 \% of \$x\_1\$" in text
    assert "\\begin{table}[t]" in text
    assert "\\begin{table*}[t]" in to_latex(table(wide=True))


def evaluate(expression):
    """The value of a Typst expression, by Typst itself."""
    source = f"#metadata({expression}) <it>".encode()
    return typst.query(source, "<it>", field="value", one=True, ignore_system_fonts=True)


@pytest.mark.parametrize("name", [*NASTY, "line\nbreak", "tab\there"])
def test_a_typst_literal_is_the_text(name):
    assert json.loads(evaluate(literal(name))) == name.replace("\t", " ")


def test_a_typst_table_is_set_as_it_is():
    text = typst_of(document(sections=(Section("A", (table(),)),)))
    call = text[text.index("#data-table(") :]
    assert typst.compile(set_alone(call), ignore_system_fonts=True).startswith(b"%PDF")
    for name in NASTY:
        assert f"cell({literal(name)}" in call


def set_alone(call):
    return ("#let cell(a, ends: none, bold: false) = a\n#let name(a) = a\n"
            "#let data-table(rows: (), header: (), ..rest) = table(columns: header.len(), ..header, ..rows.flatten())\n"
            + call).encode()  # fmt: skip


def document(**changes):
    section = Section("A", ("See [[cite:b]] and [[cite:a]].",))
    fields = {
        "title": "T", "subtitle": "s", "summary": ("one",), "sections": (section,), "appendix": None,
        "extra_tables": (), "references": {"a": "First", "b": "Second", "c": "Third"}, "timestamp": 0,
    }  # fmt: skip
    return Document(**(fields | changes))


def typst_of(doc):
    return to_typst(doc, template="paper.typ", figures="figures", size_pt=9, appendix=False)


def test_sources_are_numbered_as_they_are_cited_and_others_are_left_out():
    text = typst_of(document())
    assert text.index("cited(1)") < text.index("cited(2)")
    assert '#references("Second", "First")' in text
    assert "Third" not in text


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="'zzz' is cited"):
        typst_of(document(sections=(Section("A", ("[[cite:zzz]]",)),)))


def test_names_in_prose_cannot_open_a_mark():
    text = typst_of(document(sections=(Section("A", (f"The drafter {named('a`[[cite:zzz]]**')} is fast.",)),)))
    assert 'name("a\'[[cite:zzz]]**")' in text
    assert plain(f"{named('a_b')} [[table:main]]") == "a_b"


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="'t' has 2 columns"):
        Table(name="t", title="", columns=("x", "y"), rows=((words("a"),),))
