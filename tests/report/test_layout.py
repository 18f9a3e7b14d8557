"""Where things stand on the pages: nothing lies over anything else or leaves its page, however many wide figures."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import typst
from PIL import Image

from vsdbench.bench.spans import Span
from vsdbench.report import paper
from vsdbench.report.model import Document, DrawnAnswer, DrawnExample, Section, Table, words
from vsdbench.report.render import to_typst
from vsdbench.store.examples import ExamplePrompt, Examples, save_examples
from vsdbench.store.records import hash_tokens

REFERENCE = Path(__file__).parents[2] / "reports/reference"
PAGE_PT, EDGES_PT = (595.28, 841.89), (17 / 25.4 * 72, 19 / 25.4 * 72)
WHERE = """
#context [#metadata(query(<piece>).map(it => {
  let at = it.location().position()
  it.value + (page: at.page, left: at.x.pt(), top: at.y.pt())
})) <where>]
"""


def pieces(source):
    """Every table, figure, example and block of commands: name, page, left, top, width, height (points)."""
    asked = source.with_name("where.typ")
    asked.write_text(source.read_text(encoding="utf-8") + WHERE, encoding="utf-8")
    found = typst.query(asked, "<where>", field="value", one=True, root=source.parent, ignore_system_fonts=True)
    return json.loads(found)


def faults(found):
    """Names of those that lie over each other, and of those that leave their page's text."""

    def common(a, b, start, size):
        return min(a[start] + a[size], b[start] + b[size]) - max(a[start], b[start])

    over = [
        (a["name"], b["name"])
        for a, b in itertools.combinations(found, 2)
        if a["page"] == b["page"] and min(common(a, b, "left", "width"), common(a, b, "top", "height")) > 0.1
    ]
    off = [
        p["name"]
        for p in found
        if p["left"] + p["width"] > PAGE_PT[0] - EDGES_PT[0] + 0.1
        or p["top"] + p["height"] > PAGE_PT[1] - EDGES_PT[1] + 0.1
    ]
    return over + off


# --- made pages ----------------------------------------------------------------------------------------------------


def table(name, num_rows, *, wide):
    return Table(
        name=name,
        title=name,
        columns=("drafter", "τ"),
        rows=tuple((words(f"d{row}"), words("1.00")) for row in range(num_rows)),
        wide=wide,
    )


def gap_of(num_rows, num_rows_beside):
    """A document whose second page has, between wide tables, a gap that more rows of them make narrower."""
    answers = tuple(
        DrawnAnswer(head=f"d{i}", spans=tuple(Span(f" word{s}", s % 2 == 1, s, 1) for s in range(40))) for i in (1, 2)
    )
    example = DrawnExample(head="chat", prompt="What is this? " * 8, pictures=(), answers=answers)
    text = "One sentence after another fills the page. " * 12
    wide = tuple(table(f"wide{i}", num_rows, wide=True) for i in range(5))
    blocks = (text, text, *wide, table("beside", num_rows_beside, wide=False), *(text, example) * 3, text)
    return Document(
        title="Made",
        subtitle="of tables",
        summary=("None.",),
        sections=(Section("All", blocks),),
        appendix=None,
        extra_tables=(),
        references={},
        timestamp=0,
    )


@pytest.fixture
def folder(tmp_path):
    template = files("vsdbench.report").joinpath("template", paper.TEMPLATE).read_bytes()
    (tmp_path / paper.TEMPLATE).write_bytes(template)
    return tmp_path


GAPS = [(num_rows, beside) for num_rows in (10, 16, 17) for beside in (6, 14, 30)]


def test_nothing_is_set_into_a_gap_that_is_too_low_for_it(folder):
    squeezed = 0
    for num_rows, beside in GAPS:
        document = gap_of(num_rows, beside)
        plain = to_typst(document, template=paper.TEMPLATE, figures="figures", size_pt=9.4, appendix=False)
        (folder / paper.SOURCE).write_text(plain, encoding="utf-8")
        over = faults(pieces(folder / paper.SOURCE))
        squeezed += bool(over)
        assert all("table-beside" in pair for pair in over), over  # blocks of the text are never squeezed
        source, _ = paper._write_whole(document, folder, 9.4, appendix=False)
        assert (source.decode() == plain) == (not over)
        found = pieces(folder / paper.SOURCE)
        assert faults(found) == []
        assert [p["name"] for p in found].count("example") == 3
        assert {"table-beside", *(f"table-wide{i}" for i in range(5))} <= {p["name"] for p in found}
    assert 0 < squeezed < len(GAPS)  # else the gaps above are no test


def test_what_is_higher_than_a_page_is_made_smaller(folder):
    paper._write_whole(gap_of(90, 80), folder, 9.4, appendix=False)
    found = pieces(folder / paper.SOURCE)
    assert faults(found) == []
    assert max(p["height"] for p in found) == pytest.approx(PAGE_PT[1] - sum(EDGES_PT), abs=0.1)


# --- reports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in REFERENCE.glob("*.pdf")))
def test_nothing_lies_over_anything_in_the_reference_reports(name, tmp_path):
    copied = shutil.copytree(REFERENCE / name, tmp_path / name)
    found = pieces(copied / paper.SOURCE)
    assert faults(found) == []
    assert len(found) > 8


def test_nothing_lies_over_anything_in_a_report_of_many_drafters(make_run, store_run, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "_SIZES_PT", (9.4,))
    monkeypatch.setattr(paper, "_PICTURE_KINDS", ("svg",))
    drafters = ("ngram", *(f"{kind}-{aim}" for kind in ("eagle3", "msd", "vispec") for aim in ("kl", "vsd")))
    records = [
        record.model_copy(update={"category": f"category{int(record.prompt_id[1:]) % 4}"})
        for record in make_run(num_prompts=4, num_repeats=1, modes=("greedy", "stochastic"), drafters=drafters)
    ]
    folder = store_run(records, "many")
    picture, png = "examples/0123456789abcdef.png", io.BytesIO()
    Image.new("RGB", (40, 30), (9, 90, 200)).save(png, format="PNG")
    prompts = tuple(
        ExamplePrompt(prompt_id=f"p{i}", category=f"category{i}", text="What is this?", num_images=1, images=(picture,))
        for i in range(4)
    )
    said = {hash_tokens(range(41)): tuple(f" word{i}" for i in range(41))}
    examples = Examples(drafters=("vispec-vsd", "msd-kl"), mode="greedy", temperature=0.0, prompts=prompts, pieces=said)
    save_examples(folder, examples, {picture: png.getvalue()})
    paper.write_report([folder], tmp_path / "r.pdf")
    found = pieces(tmp_path / "r" / paper.SOURCE)
    assert faults(found) == []
    names = [p["name"] for p in found]
    assert names.count("example") == 4
    assert {"figure-speedup-by-category-greedy", "figure-speedup-by-category-stochastic-t1"} <= set(names)
