"""Is every drafter lossless on a real target, whatever tree it proposes? Token for token, over a whole suite.

Each first turn is decoded by plain decoding and by every drafter with every tree shape, greedy and with keyed draws
(temperature 1), and compared. One JSON line an answer goes to a file; a second run goes on from what is there. Prompt
comes after prompt, so that a sweep that was stopped early has seen every drafter and shape equally often.

    python benchmarks/lossless_sweep.py --dtype fp32 --limit 8
    python benchmarks/lossless_sweep.py drafters.eagle3-kl.recipe=eagle3-kl-4h --drafters eagle3-kl,draft_model
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from vsdbench.bars import counting_bars
from vsdbench.bench import script
from vsdbench.bench.conversation import encode_turn
from vsdbench.bench.lossless import compare
from vsdbench.bench.methods import REFERENCE, Method, build_methods, engine_method
from vsdbench.decoding.engine import DecodeSettings
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.sampling import SamplingParams
from vsdbench.errors import ConfigError
from vsdbench.models.device import dtype_name
from vsdbench.models.target import Target
from vsdbench.suites.loaders import Suite
from vsdbench.suites.prompts import Prompt
from vsdbench_drafters.architectures import draft_model

EARLY_EXIT = "draft_model"
SHAPES = {
    "chain": TreeShape(kind="chain", budget=4, depth=4, top_k=1),
    "static": TreeShape(kind="static", budget=7, depth=4, top_k=4),
    "dynamic": TreeShape(kind="dynamic", budget=7, depth=4, top_k=4),
    "sampled": TreeShape(kind="sampled", budget=7, depth=4, top_k=4),
}
Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """What differs between the answers to one prompt."""

    method: Method
    shape: str
    mode: str


class Sweep:
    """Decodes and compares what the file does not have yet.

    Args:
        suite: Prompts, and the seed of the keyed draws.
        target: The target.
        methods: The reference and the drafters.
        options: Of the command line.
    """

    def __init__(self, suite: Suite, target: Target, methods: Sequence[Method], options: argparse.Namespace) -> None:
        self.suite, self.target, self.options = suite, target, options
        self.reference = next(method for method in methods if method.name == REFERENCE)
        drafters = [method for method in methods if method.name != REFERENCE]
        self.cases = [Case(m, shape, mode) for mode in options.modes for m in drafters for shape in options.shapes]
        wanted = {self._key(prompt, case) for prompt in suite.prompts for case in self.cases}
        self.lines = {key: line for line in read_lines(options.out) if (key := line_key(line)) in wanted}
        self.total = len(wanted)

    def run(self) -> Iterator[dict[str, Any]]:
        """Yield the line of every answer that was missing, after it has been written."""
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        with self.options.out.open("a", encoding="utf-8") as file:
            if file.tell() and not self.options.out.read_bytes().endswith(b"\n"):
                file.write("\n")  # the last line of a sweep that was killed while writing
            for prompt in self.suite.prompts:
                for mode in self.options.modes:
                    for key, line in self._prompt(prompt, mode):
                        file.write(json.dumps(line) + "\n")
                        file.flush()
                        self.lines[key] = line
                        yield line

    def _prompt(self, prompt: Prompt, mode: str) -> Iterator[tuple[Key, dict[str, Any]]]:
        cases = [case for case in self.cases if case.mode == mode and self._key(prompt, case) not in self.lines]
        if not cases:
            return
        tokens = encode_turn(self.target, prompt, self.suite.config.generation)
        reference = self.reference.run(tokens, self._settings(prompt, mode, TreeShape(budget=0))).token_ids
        for case in cases:
            settings = self._settings(prompt, mode, SHAPES[case.shape])
            answer = case.method.run(tokens, settings)
            verdict, divergence = compare(self.target, tokens, reference, answer.token_ids, settings)
            key = self._key(prompt, case)
            yield (
                key,
                {
                    **dict(zip(KEY_FIELDS, key, strict=True)),
                    "tree": asdict(settings.shape),
                    "seed": settings.seed,
                    "num_prompt_tokens": len(tokens),
                    "num_output_tokens": len(answer.token_ids),
                    "num_steps": len(answer.steps),
                    "num_emitted": sum(step.num_emitted for step in answer.steps),
                    "stop_reason": answer.stop_reason,
                    "verdict": verdict,
                    "divergence": divergence.model_dump(mode="json") if divergence else None,
                },
            )

    def _settings(self, prompt: Prompt, mode: str, shape: TreeShape) -> DecodeSettings:
        return DecodeSettings(
            max_new_tokens=self.options.tokens,
            shape=shape,
            rule="greedy" if mode == "greedy" else "coupled",
            sampling=SamplingParams(temperature=0.0 if mode == "greedy" else 1.0),
            seed=random.Random(f"{self.suite.config.seed}/{prompt.hash}/0").getrandbits(48),
        )

    def _key(self, prompt: Prompt, case: Case) -> Key:
        return (
            self.suite.config.name,
            self.target.fingerprint,
            dtype_name(self.target.dtype),
            self.target.device.type,
            str(self.options.tokens),
            prompt.id,
            case.mode,
            case.method.name,
            case.method.drafter_fingerprint or "",
            case.shape,
        )


KEY_FIELDS = (
    "suite", "target_fingerprint", "dtype", "device", "max_new_tokens", "prompt_id", "mode", "drafter",
    "drafter_fingerprint", "shape",
)  # fmt: skip
"""Two answers that agree in all of these are the same answer."""


def line_key(line: dict[str, Any]) -> Key:
    """Return what identifies a line."""
    return tuple(str(line.get(name, "")) for name in KEY_FIELDS)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of an earlier sweep, except one that was cut while it was written."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            yield line


def make_methods(suite: Suite, target: Target, options: argparse.Namespace, console: Console) -> list[Method]:
    """Return the reference and the drafters that were asked for, in the suite's order, the early exit last.

    Raises:
        ConfigError: A drafter is not in the suite.
    """
    entries = {entry.name: entry for entry in suite.config.drafters}
    names = options.drafters or [*entries, EARLY_EXIT]
    unknown = [name for name in names if name not in entries and name != EARLY_EXIT]
    if unknown:
        raise ConfigError(f"'{unknown[0]}' is not a drafter of this sweep: choose {', '.join([*entries, EARLY_EXIT])}.")
    chosen = [entry for entry in suite.config.drafters if entry.name in names]
    config = suite.config.model_copy(update={"drafters": chosen, "baselines": [REFERENCE]})
    methods = build_methods(config, target, console=console)
    if EARLY_EXIT in names and EARLY_EXIT not in entries:
        layers = {"model": target.name, "num_layers": options.early_exit}
        drafter = draft_model.build(target, checkpoint=None, options=layers)
        fingerprint = f"{target.fingerprint}:{options.early_exit}"
        methods.append(engine_method(EARLY_EXIT, "drafter", target, drafter, drafter_fingerprint=fingerprint))
    return methods


def summary(lines: Iterable[dict[str, Any]]) -> Table:
    """Return counts of verdicts and the mean tokens a step (tau), by mode, drafter and shape."""
    verdicts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    steps: Counter[tuple[str, str, str]] = Counter()
    emitted: Counter[tuple[str, str, str]] = Counter()
    for line in lines:
        group = (line["mode"], line["drafter"], line["shape"])
        verdicts[group][line["verdict"]] += 1
        steps[group] += line["num_steps"]
        emitted[group] += line["num_emitted"]
    table = Table("mode", "drafter", "shape", "equal", "near-tie", "violation", "tau")
    for column in table.columns[3:]:
        column.justify = "right"
    for group, counts in verdicts.items():
        tau = f"{emitted[group] / steps[group]:.3f}" if steps[group] else "-"
        table.add_row(*group, *(str(counts[name]) for name in ("equal", "near_tie", "violation")), tau)
    total = sum(verdicts.values(), Counter())
    table.add_section()
    table.add_row("all", "", "", *(str(total[name]) for name in ("equal", "near_tie", "violation")), "")
    return table


def choices(known: Iterable[str]) -> Any:  # noqa: ANN401 - argparse's converter
    """Return a converter of comma-separated names, each one of ``known``."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {', '.join(known)}")
        return names

    return convert


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__, has_json=False)
    script.add_suite(parser, "mtbench", dtype="fp32", limit="--limit", overrides=True)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens an answer (default: 64)")
    parser.add_argument(
        "--drafters",
        type=lambda text: text.split(","),
        help=f"names, comma-separated (default: those of the suite and {EARLY_EXIT})",
    )
    parser.add_argument("--early-exit", type=int, default=10, help=f"layers of {EARLY_EXIT} (default: 10)")
    parser.add_argument("--shapes", type=choices(SHAPES), default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--modes",
        type=choices(("greedy", "stochastic")),
        default=["greedy", "stochastic"],
        help="greedy, stochastic (temperature 1, keyed draws) or both, comma-separated (default: both)",
    )
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"))
    return parser.parse_intermixed_args()


@script.guarded
def main() -> int:
    """Sweep, print the table, and return 1 if any output was not the reference's."""
    options = parse()
    console = Console(stderr=True)
    suite, target = script.open_both(options, console)
    sweep = Sweep(suite, target, make_methods(suite, target, options, console), options)
    try:
        with counting_bars(console) as progress:
            task = progress.add_task("sweep", total=sweep.total, completed=len(sweep.lines))
            for line in sweep.run():
                text = f"{line['drafter']} · {line['shape']} · {line['mode']} · {line['prompt_id']}"
                progress.update(task, description=f"{text[:48]:<48}", completed=len(sweep.lines))
                if line["verdict"] == "violation":
                    progress.console.print(f"[red]violation:[/] {text}: {line['divergence']}")
    except KeyboardInterrupt:
        console.print(f"stopped: {len(sweep.lines)} of {sweep.total} answers are in {options.out}")
    Console().print(summary(sweep.lines.values()))
    return int(any(line["verdict"] == "violation" for line in sweep.lines.values()))


if __name__ == "__main__":
    sys.exit(main())
