"""Progress displays that speak where they cannot move: in a log file or a pipe, a line now and then."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_EVERY_S = 30.0
_LOG_WIDTH = 120  # a log has no width, and 80 columns cut off what is left
_SPEED_OVER_S = 300.0
"""Seconds whose mean speed the time left is told from: longer than any pause, such as decoding held-out prompts."""


class Bars(Progress):
    """What ``rich`` shows on a terminal; elsewhere the same columns are printed as a line every half minute.

    Args:
        columns: As ``rich.progress.Progress`` takes them.
        console: Where to.
        every_s: Seconds between two lines where there is no terminal.
        options: Of ``rich.progress.Progress``.
    """

    def __init__(
        self,
        *columns: str | ProgressColumn,
        console: Console,
        every_s: float = _EVERY_S,
        **options: Any,  # noqa: ANN401 - of rich
    ) -> None:
        super().__init__(*columns, console=console, speed_estimate_period=_SPEED_OVER_S, **options)
        self._every_s = every_s
        self._said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:  # noqa: ANN401 - of rich
        """Change a task as ``rich`` does, and say how far it is if it is time to."""
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task on as ``rich`` does, and say how far it is if it is time to."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        now = time.monotonic()
        console = self.console
        if self.disable or console.quiet or console.is_terminal or now - self._said < self._every_s:
            return
        self._said = now
        log = Console(file=console.file, width=max(_LOG_WIDTH, console.width), no_color=console.no_color)
        log.print(self.make_tasks_table([self._tasks[task_id]]))


def counting_bars(console: Console) -> Bars:
    """Return a display of steps done and to do, with the time that has gone and that is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Bars(*columns, console=console, disable=console.quiet)
