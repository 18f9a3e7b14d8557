"""Long work says how far it is, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vsdbench.bars import Bars, counting_bars


def shown(*, terminal: bool, every_s: float) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Bars(
        "{task.description}", "{task.completed} of {task.total}", console=console, every_s=every_s, auto_refresh=False
    ) as bars:
        task = bars.add_task("decoding", total=4)
        bars.update(task, completed=1)
        bars.advance(task)
    return console.file.getvalue()


def test_a_log_gets_a_line_whenever_it_is_time():
    lines = shown(terminal=False, every_s=0).splitlines()
    assert [line.rstrip() for line in lines[:2]] == ["decoding 1 of 4", "decoding 2 of 4"]


def test_a_line_of_a_log_is_not_cut_at_the_width_of_a_terminal():
    console = Console(file=io.StringIO(), width=80)
    with counting_bars(console) as bars:
        bars._every_s = 0
        bars.update(bars.add_task("eagle3-kl-hour-wide, greedy, mtbench/120", total=1120), completed=1029)
    (line,) = console.file.getvalue().splitlines()[:1]
    assert "1029/1120" in line
    assert "left -:--:--" in line


def test_a_log_gets_no_more_lines_than_that():
    assert "1 of 4" not in shown(terminal=False, every_s=60)


def test_on_a_terminal_rich_shows_the_bar_alone():
    assert shown(terminal=True, every_s=0) == shown(terminal=True, every_s=60)


@pytest.mark.parametrize("quiet", [False, True])
def test_counting_bars_are_silent_where_the_console_is(quiet):
    console = Console(file=io.StringIO(), quiet=quiet, width=100)
    with counting_bars(console) as bars:
        bars.update(bars.add_task("decoding", total=3), completed=2)
    assert ("2/3" in console.file.getvalue()) is not quiet


def test_a_pause_does_not_turn_minutes_that_are_left_into_hours():
    now = 0.0
    bars = Bars("", console=Console(file=io.StringIO()), auto_refresh=False, get_time=lambda: now)
    task = bars.add_task("training", total=100)
    for step in range(51):
        now += 100.0 if step == 50 else 1.0  # held-out prompts are decoded in between
        bars.advance(task)
    assert 50 < bars.tasks[0].time_remaining < 200
