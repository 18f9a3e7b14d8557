"""All benchmarks with one command: every ratio in one table, and all results with the machine they are of in one file.

Each benchmark is a file beside this one that also runs alone; here each has a process of its own, one after the other.

    python -m benchmarks --quick
    python -m benchmarks --only autoregressive long_context --json speed.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vsdbench.bench.decode_step import KINDS
from vsdbench.paths import results_dir
from vsdbench.provenance import machine

Row: TypeAlias = tuple[str, float, str]
"""What was compared, the number, and its unit (``x``: a ratio)."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One file.

    Attributes:
        rows: Takes from its JSON what the table shows.
        arguments: Of a full measurement.
        quick: Of a short one.
        by_default: Whether it runs without being asked for by ``--only``.
    """

    rows: Callable[[Any], Iterator[Row]]
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    by_default: bool = True


def products(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield the speed of packed products over that of plain ones."""
    for line in result:
        for kind in ("onednn", "native"):
            if line[f"{kind}_ratio"]:
                yield f"{kind} products / plain ones, {line['dtype']}, {line['rows']} rows", line[f"{kind}_ratio"], "x"


def decode_step(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield a step's time over its bounds, by rows."""
    for line in result["lines"]:
        rows = f"{line['rows']} rows"
        yield f"step / its matrix products, {rows}", line["step_over_products"], "x"
        yield f"step / reading its weights, {rows}", line["step_ms"] / result["reading_ms"], "x"
        for name in KINDS:
            if line.get(f"{name}_ms"):
                yield f"{name} layers / matrix products, {rows}", line[f"{name}_over_products"], "x"


def draft_step(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield how much faster kernels and compiled steps draft than operations one by one."""
    parts = [(f"{line['rows']} rows", line["ms"]) for line in result["lines"]]
    for what, times in [*parts, (f"a tree of {result['budget']}", result["tree"])]:
        for name, ms in times.items():
            if name != "operations":
                yield f"draft step, {what}: {name} / operation by operation", times["operations"] / ms, "x"


def autoregressive(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield our plain decoding's speed over that of others."""
    for name, found in result["methods"].items():
        if name != "autoregressive":
            yield f"plain decoding's speed / {name}", found["our_speed_over_it"], "x"


def speculative(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield speeds over plain decoding, and shares of decode time."""
    for name, found in result["methods"].items():
        if name != "autoregressive":
            yield f"{name}: speed / plain decoding", found["speed_over_plain"], "x"
        if "tau" in found and not name.startswith("hf-"):
            yield f"{name}: neither drafter nor target", 100 * found["overhead_share"], "%"
            if name != "autoregressive":
                yield f"{name}: drafting", 100 * found["draft_share"], "%"


def long_context(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield steps behind long contexts over those behind the shortest."""
    first = result["lines"][0]["context"]
    for line in result["lines"][1:]:
        where = f"{line['context']} tokens / {first}"
        yield f"plain step, {where}", line["plain_ratio"], "x"
        yield f"tree step, {where}", line["tree_ratio"], "x"
        for name, ratio in line["draft_ratio"].items():
            yield f"{name} drafting, {where}", ratio, "x"


def visual_tokens(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield what ViSpec costs over the drafters that keep all visual tokens."""
    for line in result["lines"]:
        for name, ratios in line["ratios"].items():
            for part, (middle, *_) in ratios.items():
                yield f"vispec / {name}: {part}, {line['visual_tokens']} visual tokens", middle, "x"


def batch(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield drafters' throughput over plain decoding's in batches of the same size, and plain decoding's own growth."""
    plain = {
        line["batch_size"]: line["tokens_per_s"] for line in result["lines"] if line["drafter"] == "autoregressive"
    }
    for size, speed in plain.items():
        if size > min(plain):
            yield f"plain decoding, batches of {size} / of {min(plain)}", speed / plain[min(plain)], "x"
    for line in result["lines"]:
        if line["drafter"] != "autoregressive":
            yield f"{line['drafter']}: speed / plain decoding, batches of {line['batch_size']}", line["speedup"], "x"


def data_throughput(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield slot-wise decoding over batched ``generate``."""
    yield "making data: slot-wise / batched generate, tokens a second", result["ratio_tokens_per_s"], "x"
    yield "making data: the same by processor time", result["ratio_tokens_per_processor_s"], "x"
    yield "making data: slot-wise", result["slot_wise"]["tokens_per_s"], "tokens/s"


def training_throughput(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield every objective's training speed over that of the first."""
    first = result["objectives"][0]
    yield f"training with {first['objective']}", first["tokens_per_s"], "tokens/s"
    for line in result["objectives"][1:]:
        yield f"training with {line['objective']} / {first['objective']}", line["ratio"], "x"


def report_time(result: Any) -> Iterator[Row]:  # noqa: ANN401 - its JSON
    """Yield a large report's time."""
    yield f"report of {result['records']} records", result["parts"]["in all"]["processor_s"], "s"


BENCHMARKS: Mapping[str, Benchmark] = {
    "products": Benchmark(products, quick=("--rows", "1", "8", "--repeats", "5")),
    "decode_step": Benchmark(decode_step, ("--rows", "1", "8", "16"), ("--rows", "1", "8", "--repeats", "9")),
    "draft_step": Benchmark(draft_step, quick=("--rows", "1", "8", "--repeats", "9", "--no-compile")),
    "autoregressive": Benchmark(autoregressive, ("--static",), ("--prompts", "2", "--repeats", "2", "--tokens", "32")),
    "speculative": Benchmark(
        speculative, (), ("--methods", "ngram,hf-prompt-lookup", "--prompts", "2", "--repeats", "1")
    ),
    "long_context": Benchmark(long_context, (), ("--contexts", "256", "1024", "--repeats", "5")),
    "visual_tokens": Benchmark(visual_tokens, (), ("--tokens", "81", "576", "--repeats", "5")),
    "batch": Benchmark(batch, (), ("--sizes", "1", "4", "--prompts", "4", "--repeats", "1", "--tokens", "16")),
    "data_throughput": Benchmark(data_throughput, (), ("--slots", "16", "--max-new-tokens", "48", "--turn", "2")),
    "training_throughput": Benchmark(
        training_throughput, (), ("--objectives", "kl,vsd", "--batches", "3", "--batch-tokens", "256")
    ),
    "report_time": Benchmark(report_time, (), ("--records", "2000"), by_default=False),
}


def measure(name: str, *, quick: bool, more: Mapping[str, str | None]) -> dict[str, Any]:
    """Return what a benchmark printed as JSON (``result``) and its seconds, or why there is none (``error``)."""
    arguments = BENCHMARKS[name].quick if quick else BENCHMARKS[name].arguments
    passed = [text for flag, value in more.items() if value is not None for text in (flag, value)]
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", *arguments, *passed]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    found: dict[str, Any] = {"arguments": [*arguments, *passed], "seconds": time.perf_counter() - started}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and no word"]
        return found | {"error": lines[-1]}
    return found | {"result": json.loads(done.stdout)}


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return all numbers, one a line."""
    shown = Table("benchmark", "what", "", box=None, pad_edge=False)
    shown.columns[2].justify = "right"
    for name, entry in found.items():
        if "error" in entry:
            shown.add_row(name, f"[red]failed:[/] {entry['error']}", "")
            continue
        for index, (what, number, unit) in enumerate(BENCHMARKS[name].rows(entry["result"])):
            shown.add_row("" if index else name, what, f"{number:.2f} {unit}")
    return shown


def main() -> int:
    """Measure, print, store; return 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="short measurements, to see that all works")
    parser.add_argument("--dtype", help="auto, bf16 or fp32, for those that take it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go (default: in results/benchmarks)")
    options = parser.parse_args()
    console = Console(stderr=True)
    names = options.only or [name for name, benchmark in BENCHMARKS.items() if benchmark.by_default]
    started = datetime.now(tz=UTC)
    report: dict[str, Any] = {"schema": 1, "started": started.isoformat(timespec="seconds"), "quick": options.quick}
    report["machine"] = machine()
    found: dict[str, Any] = {}
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        for name in names:
            task = progress.add_task(name, total=1)
            takes_dtype = name not in {"products", "report_time"}
            found[name] = measure(name, quick=options.quick, more={"--dtype": options.dtype if takes_dtype else None})
            progress.update(task, completed=1)
    report |= {"machine_after": machine(), "benchmarks": found}
    file = options.json or results_dir() / "benchmarks" / f"{started:%Y%m%d-%H%M%S}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console().print(table(found), highlight=False)
    console.print(f"all of it: {file}")
    return int(any("error" in entry for entry in found.values()))


if __name__ == "__main__":
    sys.exit(main())
