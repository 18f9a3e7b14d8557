"""A step behind 256 to 8,192 tokens of context: plain decoding, a tree, and what drafters add, as ratios to the first.

A step may grow by reading the keys and values of its context, linearly, and by nothing else. The text is that of a
suite's prompts, one after the other. Beside it stand the bytes of the cache, and what ``--dry-run`` computes for them.

    python benchmarks/long_context.py --dtype bf16
    python benchmarks/long_context.py --contexts 256 2048 --checkpoint drafter-folder --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vsdbench import registry
from vsdbench.bench import script
from vsdbench.bench.long_context import measure_contexts, rows_behind
from vsdbench.bench.run import RunOptions, load_target, open_suite
from vsdbench.decoding.interfaces import Drafter, TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.target import Target
from vsdbench.suites.loaders import Suite


def text_tokens(target: Target, suite: Suite, count: int) -> Sequence[int]:
    """Return ``count`` tokens of the suite's prompts, one after the other, over again if they are too few."""
    texts = [turn for prompt in suite.prompts for turn in prompt.turns]
    tokens: list[int] = []
    for text in itertools.cycle(texts):
        tokens += target.encode_text(text + "\n\n")
        if len(tokens) >= count:
            return tokens[:count]
    raise ConfigError(f"The suite '{suite.config.name}' has no prompts.")


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_target(parser)
    parser.add_argument("--suite", default="grounded", help="whose prompts are the text (default: grounded)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, default=8, help="root and draft tokens of a tree step (default: 8)")
    parser.add_argument("--checkpoint", type=Path, help="a trained drafter, measured beside ngram")
    parser.add_argument("--architecture", default="eagle3", help="of the checkpoint (default: eagle3)")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    console = Console(stderr=True)
    run_options = RunOptions(device=options.device, dtype=options.dtype)
    suite = open_suite(options.suite, run_options, console)
    target = load_target(options.target, run_options, console)
    shape = TreeShape(budget=options.rows - 1)
    # A context gives way to the steps behind it where the target's positions end there.
    longest = target.max_positions - rows_behind(shape.budget, rows=options.rows, repeats=options.repeats)
    contexts = list(dict.fromkeys(min(count, longest) for count in options.contexts))
    drafters: dict[str, Drafter] = {
        "ngram": registry.load("vsdbench.drafters", "ngram")(target, checkpoint=None, options={})
    }
    if options.checkpoint:
        builder = registry.load("vsdbench.drafters", options.architecture)
        drafters[options.architecture] = builder(target, checkpoint=options.checkpoint, options={})
    result = measure_contexts(
        target,
        text_tokens(target, suite, contexts[-1]),
        contexts,
        rows=options.rows,
        drafters=drafters,
        shape=shape,
        repeats=options.repeats,
    )
    result |= script.setting(target)
    print(json.dumps(result) if options.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Return the lines as text."""
    names = list(result["lines"][0]["draft_ms"])
    heads = ["plain", f"tree of {result['rows']}", *(f"{name} drafts" for name in names)]
    rows = ["context  " + "".join(f"{head:>22}" for head in heads)]
    for line in result["lines"]:
        cells = [(line["plain_ms"], line["plain_ratio"]), (line["tree_ms"], line["tree_ratio"])]
        cells += [(line["draft_ms"][name], line["draft_ratio"][name]) for name in names]
        rows.append(f"{line['context']:7}  " + "".join(f"{ms:11.2f} ms ({ratio:4.2f}x)" for ms, ratio in cells))
    cache = result["cache"]
    rows.append(
        f"cache of {cache['rows']} rows: {cache['bytes'] / 1e6:.1f} MB measured, "
        f"{cache['computed_bytes'] / 1e6:.1f} MB computed"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
