"""Drafters against plain decoding at several batch sizes, on the real target in one run.

The same prompts are answered by every method, B at a time (the next prompt takes the place of an answer that ends), in
an order that changes. ``tokens/s`` is of all of them together in steps in which the batch is full, prefills apart;
``ms/token`` is what one answer waits for its next token then; the speedup is over plain decoding of the same batch
size in the same round, its range over rounds. ``(mean)`` has the ends too, where no prompt waits: answers in a step.

    python benchmarks/batch.py --sizes 1 2 4 8 --drafter eagle3=~/.cache/vsdbench/…/checkpoint
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vsdbench import registry
from vsdbench.bench import script
from vsdbench.bench.methods import forks
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode_together
from vsdbench.decoding.interfaces import Drafter, Generation, TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.target import Target


def describe(generations: Sequence[Generation], size: int) -> dict[str, float]:
    """Return what one round of one method at one batch size gave; a step's time is shared by those that were in it."""
    steps = [step for generation in generations for step in generation.steps]
    full = [step for step in steps if step.num_sequences == size]
    tokens = sum(step.num_emitted for step in full)
    seconds = sum(step.draft_ms + step.verify_ms + step.other_ms for step in full) / size / 1e3
    return {
        "tokens_per_s": tokens / seconds,
        "ms_per_token": 1e3 * size * seconds / tokens,
        "tau": sum(step.num_emitted for step in steps) / len(steps),
        "draft_share": sum(step.draft_ms for step in full) / size / 1e3 / seconds,
        "mean_sequences": len(steps) / sum(1 / step.num_sequences for step in steps),
    }


def measure(
    target: Target,
    drafters: dict[str, tuple[Drafter, TreeShape]],
    prompts: Sequence[Sequence[int]],
    *,
    sizes: Sequence[int],
    repeats: int,
    tokens: int,
) -> list[dict[str, Any]]:
    """Return one line a batch size and method: medians over rounds, and speedups paired by round.

    Raises:
        ConfigError: A batch would never be full.
    """
    if max(sizes) > len(prompts):
        raise ConfigError(f"--sizes has {max(sizes)}, but there are {len(prompts)} prompts: take more with --prompts.")
    rounds: dict[tuple[int, str], list[dict[str, float]]] = {}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):  # the first one warms up
        for size in sizes:
            names = list(drafters)
            random.Random(f"{turn}/{size}").shuffle(names)
            for name in names:
                drafter, shape = drafters[name]
                settings = DecodeSettings(max_new_tokens=tokens if turn else 6, shape=shape)
                generations = decode_together(target, forks(drafter, size), prompts, [settings] * len(prompts))
                if turn:
                    rounds.setdefault((size, name), []).append(describe(generations, size))
                    answers[f"{size}/{name}"] = [generation.token_ids for generation in generations]
    lines = []
    for (size, name), found in rounds.items():
        line: dict[str, Any] = {"batch_size": size, "drafter": name}
        line |= {key: statistics.median(one[key] for one in found) for key in found[0]}
        plain = rounds[size, "autoregressive"]
        ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in zip(found, plain, strict=True)]
        line["speedup"], line["speedup_range"] = script.spread(ratios)
        pairs = zip(answers[f"{size}/{name}"], answers[f"{sizes[0]}/autoregressive"], strict=True)
        line["equal"] = sum(ours == theirs for ours, theirs in pairs)
        lines.append(line)
    return sorted(lines, key=lambda line: (line["drafter"] != "autoregressive", line["drafter"], line["batch_size"]))


def make_drafters(target: Target, options: argparse.Namespace) -> dict[str, tuple[Drafter, TreeShape]]:
    """Return plain decoding and every drafter with a tree of every budget, by name."""
    drafters: dict[str, tuple[Drafter, TreeShape]] = {"autoregressive": (Autoregressive(), TreeShape(budget=0))}
    for entry in ["ngram=", *options.drafter]:
        kind, _, path = entry.partition("=")
        build = registry.load("vsdbench.drafters", kind)
        drafter = build(target, checkpoint=Path(path).expanduser() if path else None, options={})
        for budget in options.budgets:
            shape = TreeShape(budget=budget, depth=min(3, budget), top_k=min(4, budget))
            drafters[f"{kind}-{budget}"] = (drafter, shape)
    return drafters


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_suite(parser, "quickstart")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--drafter", action="append", default=[], metavar="TYPE=CHECKPOINT", help="beside ngram")
    parser.add_argument("--budgets", type=int, nargs="+", default=[7], help="draft tokens of the trees (default: 7)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens an answer, at most (default: 48)")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    suite, target = script.open_both(options, Console(stderr=True))
    prompts, drafters = script.first_turns(suite, target), make_drafters(target, options)
    lines = measure(target, drafters, prompts, sizes=options.sizes, repeats=options.repeats, tokens=options.tokens)
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "dtype": str(target.dtype), "lines": lines}))
        return 0
    print(
        f"{len(prompts)} prompts, {torch.get_num_threads()} threads, {target.dtype}; "
        f"medians of {options.repeats} rounds"
    )
    print("drafter          batch  (mean)  tokens/s  ms/token    tau  draft  speedup    range       equal")
    for line in lines:
        low, high = line["speedup_range"]
        print(
            f"{line['drafter']:<16} {line['batch_size']:5}  {line['mean_sequences']:6.2f}  "
            f"{line['tokens_per_s']:8.1f}  {line['ms_per_token']:8.1f}  {line['tau']:5.2f}  "
            f"{line['draft_share']:5.2f}  {line['speedup']:7.3f}  {low:5.3f}-{high:5.3f}  {line['equal']:5}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
