"""One step of a drafter of one layer: operation by operation, by our kernels, and compiled, by rows.

All in turns in one process: the layer and its head over the rows of a level, and a whole tree with all that is between
its levels. A drafter of EAGLE-3's shape with untrained weights, behind a context of any tokens, in cost like a trained
one. On CUDA the compiled steps are CUDA graphs.

    python benchmarks/draft_step.py
    python benchmarks/draft_step.py --rows 1 8 --context 2048 --json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console

from vsdbench.bench import script
from vsdbench.bench.run import RunOptions, load_target
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models import native
from vsdbench.models.compiled import Graphs, why_not
from vsdbench.models.device import synchronize
from vsdbench.models.target import Target
from vsdbench_drafters.architectures.compiled_step import compile_step
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.layer_rows import LayerRows
from vsdbench_drafters.architectures.one_layer_drafter import OneLayerDrafter

WARM_UP = 3
OPERATIONS = "operations"


def make_drafters(drafter: OneLayerDrafter, sizes: list[int], *, compiled: bool) -> dict[str, OneLayerDrafter]:
    """Return forks of a drafter by what runs their steps, ``operations`` first.

    Raises:
        ConfigError: Its steps cannot be compiled here.
    """
    found = {OPERATIONS: drafter.fork()}
    found[OPERATIONS].layer = drafter.layer.plain_fork()
    if drafter.layer.device.type == "cpu" and native.most_rows(drafter.layer.dtype) > 0:
        found["native"] = drafter.fork()
    if compiled:
        found["compiled"] = drafter.fork()
        device = drafter.layer.device
        graphs = Graphs(static=device.type == "cuda")
        if reason := why_not(device) or compile_step(found["compiled"].layer, sizes, graphs):
            raise ConfigError(f"a draft step is not compiled here: {reason}")
    return found


@torch.inference_mode()
def measure(
    target: Target,
    drafters: Mapping[str, OneLayerDrafter],
    *,
    rows: list[int],
    context: int,
    shape: TreeShape,
    repeats: int,
) -> dict[str, Any]:
    """Return median milliseconds, ``lines`` by rows and of a ``tree``, by what runs the steps.

    Args:
        target: Whose features are drafted from.
        drafters: Forks of one drafter.
        rows: Of a step.
        context: Tokens before it.
        shape: The tree.
        repeats: Turns that count.
    """
    state = target.prefill([index % target.vocab_size for index in range(context)], context + 1)
    state.tokens.append(1)
    room = context + repeats + WARM_UP + 2 * max(rows)  # a tree is drafted behind one more token each time
    parts: dict[tuple[str, int], Callable[[], object]] = {}
    for name, drafter in drafters.items():
        drafter.begin(state, room)
        for count in rows:
            parts[name, count] = functools.partial(drafter.layer.step, _level(drafter, count, context))
        parts[name, 0] = functools.partial(_tree, drafter, state, shape)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in parts}
    for repeat in range(repeats + WARM_UP):
        for key, run in parts.items() if repeat % 2 else reversed(parts.items()):
            synchronize(target.device)
            started = time.perf_counter()
            run()
            synchronize(target.device)
            if repeat >= WARM_UP:
                times[key].append(1e3 * (time.perf_counter() - started))
    medians = {key: statistics.median(found) for key, found in times.items()}
    lines = [{"rows": count, "ms": {name: medians[name, count] for name in drafters}} for count in rows]
    return {"lines": lines, "tree": {name: medians[name, 0] for name in drafters}}


def _level(drafter: OneLayerDrafter, count: int, context: int) -> LayerRows:
    """Return rows of one level, brothers that see the context and themselves."""
    layer = drafter.layer
    hidden = torch.ones(count, layer.config.hidden_size, dtype=layer.dtype, device=layer.device)
    tokens = torch.ones(count, dtype=torch.int64, device=layer.device)
    hide = None if count == 1 else ~torch.eye(count, dtype=torch.bool, device=layer.device)
    return LayerRows(hidden, tokens, slice(context, context + 1), context, hide)


def _tree(drafter: OneLayerDrafter, state: Any, shape: TreeShape) -> None:  # noqa: ANN401 - of the target
    drafter.commit(state, 0, state.features[-1:])
    drafter.propose(state, shape, temperature=0.0, generator=torch.Generator())


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_target(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=11, help="draft tokens of the tree, four deep (default: 11)")
    parser.add_argument("--no-compile", action="store_true", help="without compiled steps")
    parser.add_argument("--repeats", type=int, default=25)
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    target = load_target(options.target, RunOptions(dtype=options.dtype, device=options.device), Console(stderr=True))
    ids = torch.arange(min(options.draft_vocab_size, target.vocab_size))
    drafter = Eagle3Model.from_target(target, ids, seed=0).drafter(target.dtype)
    shape = TreeShape(budget=options.budget, depth=min(4, options.budget), top_k=min(4, options.budget))
    sizes = sorted({*options.rows, 1, shape.top_k})
    drafters = make_drafters(drafter, sizes, compiled=not options.no_compile)
    found = measure(target, drafters, rows=options.rows, context=options.context, shape=shape, repeats=options.repeats)
    result = found | {"context": options.context, "draft_vocab_size": len(ids), "budget": shape.budget}
    result |= {"weights": "untrained", "repeats": options.repeats} | script.setting(target)
    print(json.dumps(result) if options.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Return the lines as text."""
    head = (
        f"{result['target']}, {result['dtype']} on {result['device']}, {result['threads']} threads, context "
        f"{result['context']}, draft vocabulary {result['draft_vocab_size']}; median milliseconds of "
        f"{result['repeats']} turns (times as fast as operation by operation)"
    )
    parts = [(f"{line['rows']} rows", line["ms"]) for line in result["lines"]]
    parts.append((f"tree of {result['budget']}", result["tree"]))
    lines = [head]
    for what, times in parts:
        cells = (f"  {name} {ms:7.2f} ({times[OPERATIONS] / ms:.2f}x)" for name, ms in times.items())
        lines.append(f"{what:<12}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
