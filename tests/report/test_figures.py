"""Figures are the same bytes each time, show the summary's numbers, and leave matplotlib as it was."""

import hashlib

import matplotlib as mpl
import pytest

from vsdbench.bench.summary import summarise
from vsdbench.report import figures, plots


@pytest.fixture(scope="module")
def summary(make_run):
    return summarise(make_run(modes=("greedy", "stochastic")), num_resamples=200)


def digests(paths):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_files_are_the_same_bytes_twice_and_global_state_is_untouched(summary, tmp_path):
    before = dict(mpl.rcParams)
    first = digests(figures.write_figures(summary, tmp_path / "a"))
    second = digests(figures.write_figures(summary, tmp_path / "b"))
    assert first == second
    stems = ["acceptance_by_depth", "speedup", "speedup_by_category_greedy", "speedup_by_category_stochastic_t1"]
    assert sorted(first) == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    assert dict(mpl.rcParams) == before


def test_svg_has_paths_and_no_text_date_or_version(summary, tmp_path):
    svg, png = figures.save(figures.speedup_figure(summary), tmp_path / "name.with.dots")
    text = svg.read_text()
    assert svg.name == "name.with.dots.svg"
    assert "<path" in text
    assert "<text" not in text
    assert "dc:date" not in text
    assert mpl.__version__ not in text
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"Software" not in png.read_bytes()


def bars(axes):
    return [bar for container in axes.containers for bar in getattr(container, "patches", [])]


def test_bars_and_intervals_are_those_of_the_summary(summary):
    figure = figures.speedup_figure(summary)
    (axes,) = figure.axes
    rows = [row for row in summary["results"] if row["category"] is None]
    heights = [bar.get_height() for bar in bars(axes)]
    assert set(heights) == {row["speedup"] for row in rows}
    ends = sorted(y for c in axes.collections for segment in c.get_segments() for y in segment[:, 1])
    assert ends == pytest.approx(sorted(end for row in rows for end in row["speedup_ci"]))
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [1.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["greedy (T = 0)", "stochastic (T = 1)"]
    assert {text.get_text() for text in axes.texts} == {f"{row['speedup']:.2f}" for row in rows}
    assert axes.get_ylabel() == "speedup vs hf-generate"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ngram", "eagle3-kl"]


def test_lines_are_the_acceptance_of_the_summary(summary):
    panels = figures.acceptance_figure(summary).axes
    assert [axes.get_title() for axes in panels] == ["greedy (T = 0)", "stochastic (T = 1)"]
    for axes, mode in zip(panels, ("greedy", "stochastic"), strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        rows = [row for row in summary["results"] if row["category"] is None and row["mode"] == mode]
        assert drawn == {row["drafter"]: row["acceptance_by_depth"] for row in rows}


def overlaps(boxes):
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


@pytest.mark.parametrize("num_drafters", [1, 3, 14])
def test_no_text_overlaps_other_text(make_run, num_drafters):
    names = ["ngram", "eagle3-kl", "eagle3-vsd-without-confidence", *(f"method-{i}" for i in range(11))]
    summary = summarise(make_run(num_prompts=9, num_repeats=1, drafters=names[:num_drafters]), num_resamples=100)
    renamed = {None: None, "chat": "information extraction", "code": "humanities", "maths": "long-form reasoning"}
    summary["results"] = [row | {"category": renamed[row["category"]]} for row in summary["results"]]
    made = [
        figures.speedup_figure(summary),
        figures.category_figure(summary, mode="greedy", temperature=0.0),
        figures.acceptance_figure(summary),
    ]
    for figure in made:
        figure.draw_without_rendering()
        for axes in figure.axes:
            labels = axes.get_xticklabels()
            if not labels[0].get_rotation():
                assert not overlaps([label.get_window_extent() for label in labels if label.get_text()])
            texts = [text.get_window_extent() for text in axes.texts]
            assert not overlaps(texts)
            assert not any(box.overlaps(axes.title.get_window_extent()) for box in texts if axes.get_title())
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.width


def test_rays_are_named_inside_their_frame_and_beside_all_intervals(summary):
    figure = plots.pareto_figure(summary)
    figure.draw_without_rendering()
    for axes in figure.axes:
        frame = axes.get_window_extent()
        names = [text.get_window_extent() for text in axes.texts]
        assert names
        assert all(frame.x0 <= name.x0 and name.x1 <= frame.x1 for name in names)
        assert all(frame.y0 <= name.y0 and name.y1 <= frame.y1 for name in names)
        bars = [axes.transData.transform(line) for c in axes.collections for line in c.get_segments()]
        assert bars
        assert not any(name.x0 < x < name.x1 and name.y0 < high and low < name.y1
                       for name in names for (x, low), (_, high) in bars)  # fmt: skip


def test_methods_look_different_beyond_the_number_of_colours():
    names = [f"m{i}" for i in range(12)]
    looks = figures.looks({"results": [{"drafter": name} for name in names]})
    assert len({(look["color"], look["hatch"]) for look in looks.values()}) == 12
    assert len({(look["color"], look["marker"], look["dashes"]) for look in looks.values()}) == 12
    assert len({look["hatch"] for look in list(looks.values())[:8]}) == 8


def test_what_has_no_numbers_has_no_figure(make_record, tmp_path):
    summary = summarise([make_record(num_output_tokens=1, decode_s=0.0)])
    assert figures.write_figures(summary, tmp_path / "new") == []


def test_depths_never_reached_are_left_out(make_record):
    records = [
        make_record(steps=[(4, 4, 0, 1, 1, 1, 0)] * 3),
        make_record(steps=[(4, 4, 1, 2, 1, 1, 0)] * 3, method="other"),
    ]
    (axes,) = figures.acceptance_figure(summarise(records)).axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {"ngram": [0.0], "other": [1.0, 0.0]}
