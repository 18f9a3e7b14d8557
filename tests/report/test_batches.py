"""Batches in a report: the section of a run that has them, its figure, its table."""

from __future__ import annotations

import pytest
from tests.bench.test_batches import make_batch

from vsdbench.report.costs import batches
from vsdbench.report.facts import load_run


@pytest.fixture
def run(make_run, store_run):
    """A run of three prompts, and batches of two sizes in which drafting pays for one answer but not for two."""
    folder = store_run(make_run(num_prompts=3, num_repeats=1, drafters=("fast",)), "batched")
    records = [make_batch("autoregressive", size, group=group) for group in range(2) for size in (1, 2)]
    records += [
        make_batch("fast", size, group=group, emitted=2, slowness=slowness)
        for group in range(2)
        for size, slowness in ((1, 1.0), (2, 4.0))
    ]
    (folder / "batches.jsonl").write_text("".join(record.to_line() for record in records), encoding="utf-8")
    return folder


def test_a_run_with_batches_has_a_section(run):
    section = batches([load_run(run)])
    text, picture, table = section.blocks
    assert "Slower than plain decoding in batches of the same size: fast at T = 0: 2." in text
    rows = {(row[0].text, row[2].text): row for row in table.rows}
    assert [rows["autoregressive", size][5].number for size in "12"] == [pytest.approx(100), pytest.approx(200)]
    assert [rows["fast", size][8].number for size in "12"] == [pytest.approx(2), pytest.approx(0.5)]
    throughput, speedup = picture.figure.axes
    assert {line.get_label() for line in throughput.lines} == {"autoregressive", "fast"}
    assert list(throughput.lines[0].get_ydata()) == [pytest.approx(100), pytest.approx(200)]
    assert list(speedup.lines[0].get_ydata()) == [pytest.approx(2), pytest.approx(0.5)]


def test_others_have_none(make_run, store_run):
    folder = store_run(make_run(num_prompts=3, num_repeats=1, drafters=("fast",)), "single")
    assert batches([load_run(folder)]) is None
