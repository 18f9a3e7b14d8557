"""How long ``vsdbench report`` takes on a large run: seconds of every part, on one core, Typst included.

Beside the clock stands the processor's time, which is what an idle machine would take.
The run is made by drawing prompts of a reference run with replacement, each with all its records under a new name, so
that methods, repeats, answers and times are real and stay paired.

    python benchmarks/report_time.py --records 20000
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from vsdbench.bench import script
from vsdbench.paths import results_dir
from vsdbench.store.store import CONFIG, MANIFEST, RECORDS, find_run

PARTS = {
    "records": "vsdbench.report.facts.load_records",
    "frames": "vsdbench.report.facts.to_frames",
    "summary": "vsdbench.report.facts.summarise_frames",
    "text, tables, figures": "vsdbench.report.paper.build",
    "files of figures": "vsdbench.report.paper._write_figures",
    "size of type": "vsdbench.report.paper._write_source",
    "typesetting": "vsdbench.report.paper.typeset",
}
"""What is timed; the rest of the time is given as such."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the clock and of the processor."""

    wall_s: float = 0.0
    processor_s: float = 0.0

    @classmethod
    def now(cls) -> Times:
        """Return both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def minus(self, other: Times) -> Times:
        """Return the difference."""
        return Times(self.wall_s - other.wall_s, self.processor_s - other.processor_s)


def enlarge(run: Path, num_records: int, folder: Path) -> int:
    """Write a run of about ``num_records`` records, made of those of ``run``, into ``folder``; return their number."""
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (run / RECORDS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_prompt[record["prompt_id"]].append(record)
    prompts = list(by_prompt.values())
    generator = np.random.default_rng(0)
    shutil.copy(run / MANIFEST, folder / MANIFEST)
    shutil.copy(run / CONFIG, folder / CONFIG)
    written = 0
    with (folder / RECORDS).open("w", encoding="utf-8") as file:
        for number in range(max(1, round(num_records * len(prompts) / sum(map(len, prompts))))):
            for record in prompts[generator.integers(len(prompts))]:
                new = {"prompt_id": f"drawn/{number}", "prompt_hash": f"{number:016x}"}
                file.write(json.dumps(record | new, separators=(",", ":")) + "\n")
                written += 1
    return written


def measure(folder: Path, output: Path) -> dict[str, Times]:
    """Return the seconds of every part of writing the report of the run in ``folder``, and of all of it."""
    seconds = dict.fromkeys(PARTS, Times())
    with ExitStack() as stack:
        for part, name in PARTS.items():
            module, _, attribute = name.rpartition(".")
            function = getattr(importlib.import_module(module), attribute)
            stack.enter_context(mock.patch(name, _timed(function, part, seconds)))
        write_report = importlib.import_module("vsdbench.report.paper").write_report
        total = {"in all": Times()}
        _timed(write_report, "in all", total)([folder], output)
    rest = functools.reduce(Times.minus, seconds.values(), total["in all"])
    return seconds | {"rest": rest} | total


def _timed(function: Callable[..., Any], part: str, seconds: dict[str, Times]) -> Callable[..., Any]:
    def timed(*args: object, **keywords: object) -> Any:  # noqa: ANN401 - whatever the function gives
        start = Times.now()
        try:
            return function(*args, **keywords)
        finally:
            seconds[part] = seconds[part].minus(start.minus(Times.now()))

    return timed


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    parser.add_argument("--run", default="mtbench-hour-cpu-2026-11-25", help="the run whose prompts are drawn from")
    parser.add_argument("--results", type=Path, default=Path("results/reference"), help="folder of runs")
    parser.add_argument("--records", type=int, default=20_000, help="about so many (default: 20000)")
    parser.add_argument("--all-cores", action="store_true", help="do not keep to one core")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    if not options.all_cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run = find_run(results_dir(options.results), options.run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        folder.mkdir()
        num_records = enlarge(run, options.records, folder)
        seconds = measure(folder, Path(scratch) / "report.pdf")
    if options.json:
        parts = {part: asdict(times) for part, times in seconds.items()}
        print(json.dumps({"run": run.name, "records": num_records, "parts": parts}))
        return 0
    print(f"report of {num_records} records drawn from {run.name}, {len(os.sched_getaffinity(0))} core(s)")
    for part, times in seconds.items():
        print(f"{part:<24} {times.wall_s:6.2f} s {times.processor_s:6.2f} s of the processor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
