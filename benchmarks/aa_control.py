"""Does the A/A control cry wolf here? The same small run again and again, and how often its controls hold 1.

In every run each baseline is measured twice, prompt by prompt, and its first repeat is held against its second. The
intervals of a run hold 1 together in 99 of 100 quiet runs, so of 20 runs one may fail and a second would be a surprise
(it happens to 2 in 100 such series): then the machine is too noisy, or the intervals are too narrow. Beside that it is
counted how often each control's plain 95 % interval holds 1. Runs stay in a folder of their own; the same command goes
on where an earlier one stopped, in the middle of a run too.

    python benchmarks/aa_control.py --runs 20
    python benchmarks/aa_control.py --runs 2 --limit 4 generation.max_new_tokens=16
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import special

from vsdbench.bench import script
from vsdbench.bench.checks import controls
from vsdbench.bench.run import InterruptedRunError, load_target, open_suite, run_key, run_suite
from vsdbench.errors import ConfigError
from vsdbench.store.frames import to_frames
from vsdbench.store.store import list_runs, load_manifest, load_records

LEAST = 0.95
"""Of the runs, how many must hold: 19 of 20."""
PLAIN = 0.95
ROUNDING = 1e-9


def finished(folder: Path, key: str) -> list[Path]:
    """Return the complete runs of one kind, oldest first.

    Raises:
        ConfigError: The folder holds runs of another kind, which must not be counted with these.
    """
    manifests = {run: load_manifest(run) for run in list_runs(folder)}
    others = [run.name for run, manifest in manifests.items() if manifest.get("run_key") != key]
    if others:
        raise ConfigError(
            f"{folder} holds runs of another suite, target, dtype or device ({others[0]}); name a folder of its own "
            "for these with --results."
        )
    return [run for run, manifest in manifests.items() if manifest.get("status") == "complete"]


def entry(run: Path) -> dict[str, Any]:
    """Return what one run's controls say, as JSON data.

    Raises:
        ConfigError: It has no controls, for want of repeats or of prompts.
    """
    found = [control for control in controls(to_frames(load_records(run))[0]) if control["holds"] is not None]
    if not found:
        raise ConfigError(f"{run.name} has no control: it takes two repeats of two prompts; add repeats=2.")
    load = load_manifest(run)["machine"]["cpu"].get("load_average")
    return {
        "run": run.name,
        "load_average": load[0] if load else None,
        "holds": all(control["holds"] for control in found),
        "controls": [control | {"holds_plain": holds_plain(control)} for control in found],
    }


def holds_plain(control: dict[str, Any]) -> bool:
    """Return whether the control's own 95 % interval holds 1: Student's t, of the width that the wider one has."""
    freedom = control["num_prompts"] - 1
    half = math.log(control["ci"][1]) - math.log(control["value"])
    narrower = special.stdtrit(freedom, (1 + PLAIN) / 2) / special.stdtrit(freedom, (1 + control["confidence"]) / 2)
    return bool(abs(math.log(control["value"])) <= half * narrower + ROUNDING)


def verdict(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts over all runs, and whether enough of them hold."""
    each = [control for found in entries for control in found["controls"]]
    held = sum(found["holds"] for found in entries)
    return {
        "num_runs": len(entries),
        "num_held": held,
        "enough": held >= math.ceil(LEAST * len(entries) - 1e-9),
        "num_controls": len(each),
        "num_controls_held": sum(control["holds"] for control in each),
        "num_controls_held_plain": sum(control["holds_plain"] for control in each),
        "runs": list(entries),
    }


def measure(options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Yield the entry of every run, those that are there already first."""
    settings = replace(script.run_options(options), results=options.results, resume=True)
    suite = open_suite(options.suite, settings, console)
    key = run_key(suite, load_target(suite.config.target, settings, console))
    done = finished(options.results, key)[: options.runs]
    yield from map(entry, done)
    for number in range(len(done) + 1, options.runs + 1):
        console.print(f"run {number} of {options.runs}")
        yield entry(run_suite(suite, settings, console)[0])


def table(result: dict[str, Any]) -> Table:
    """Return one row a run, counted, and control."""
    found = Table("run", "load", "baseline", "T", "A/A", "interval", "holds 1", "at 95 %")
    for count, run in enumerate(result["runs"], start=1):
        for control in run["controls"]:
            load = run["load_average"]
            found.add_row(
                str(count),
                "" if load is None else f"{load:.1f}",
                control["name"],
                f"{control['temperature']:g}",
                f"{control['value']:.3f}",
                f"{control['ci'][0]:.3f} to {control['ci'][1]:.3f}",
                "yes" if control["holds"] else "[red]no[/]",
                "yes" if control["holds_plain"] else "no",
            )
    return found


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_suite(parser, "smoke", limit="--limit", overrides=True)
    parser.add_argument("--runs", type=int, default=20, help="in all, those of earlier calls included (default: 20)")
    parser.add_argument("--results", type=Path, default=Path("results/aa-control"), help="folder of these runs alone")
    return parser.parse_intermixed_args()


@script.guarded
def main() -> int:
    """Measure, print, and return 1 if fewer than 19 of 20 runs held."""
    options = parse()
    console = Console(stderr=True)
    entries: list[dict[str, Any]] = []
    try:
        for found in measure(options, console):
            entries.append(found)  # noqa: PERF402 - those before an interruption count
    except InterruptedRunError as error:
        console.print(f"stopped: {error}")
    result = verdict(entries)
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(table(result))
        print(
            f"{result['num_held']} of {result['num_runs']} runs hold; of {result['num_controls']} controls "
            f"{result['num_controls_held']} do, at 95 % each {result['num_controls_held_plain']}"
        )
    return 0 if result["enough"] else 1


if __name__ == "__main__":
    sys.exit(main())
