"""One forward of the target in decoding: its matrix products alone, its own layers, and the fused ones, by rows.

All in turns in one process; the medians and their ratios to the products ("floor") are what counts. The own layers run
on packed weights too, so the difference is the operations between the products.

    python benchmarks/decode_step.py --dtype bf16 --context 256
    python benchmarks/decode_step.py --rows 1 8 16 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from vsdbench.bench.run import RunOptions, load_target
from vsdbench.decoding.interfaces import TokenTree
from vsdbench.decoding.tree import empty_tree
from vsdbench.errors import VsdbenchError
from vsdbench.models.packed import PackedLinear
from vsdbench.models.target import Target

WARM_UP = 3


def chain(num_nodes: int) -> TokenTree:
    """Return a chain of any tokens."""
    if not num_nodes:
        return empty_tree(torch.device("cpu"))
    tokens = torch.arange(num_nodes) + 1
    return TokenTree(tokens, range(-1, num_nodes - 1), range(1, num_nodes + 1), tokens.float())


def products(target: Target) -> Callable[[int], None]:
    """Return the function that runs all linear layers of a step of n rows, one after the other, and nothing else."""
    layers = [module for module in target.model.modules() if isinstance(module, PackedLinear)]
    widths = {layer.in_features for layer in layers}

    def run(rows: int) -> None:
        inputs = {width: torch.zeros(rows, width, dtype=target.dtype) for width in widths}
        for layer in layers:
            layer(inputs[layer.in_features])

    return run


@torch.inference_mode()
def measure(target: Target, rows: list[int], context: int, repeats: int) -> list[dict[str, Any]]:
    """Return one line a number of rows: median milliseconds of each variant, and ratios to the products."""
    state = target.prefill([index % target.vocab_size for index in range(context)], context + max(rows) + 1)
    state.tokens.append(1)
    floor, fused = products(target), target.fused_layers
    trees = {count: chain(count - 1) for count in rows}

    def forward(count: int, layers: Any) -> None:  # noqa: ANN401 - fused layers, or None for the model's own
        target.fused_layers = layers
        target.forward_tree(state, trees[count])

    variants: dict[str, Callable[[int], None]] = {
        "products": floor,
        "own": lambda count: forward(count, None),
        "fused": lambda count: forward(count, fused),
    }
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in variants for count in rows}
    for repeat in range(repeats + WARM_UP):
        for count in rows:
            for name, run in variants.items():
                started = time.perf_counter()
                run(count)
                if repeat >= WARM_UP:
                    times[name, count].append(1e3 * (time.perf_counter() - started))
    target.fused_layers = fused
    lines = []
    for count in rows:
        line: dict[str, Any] = {"rows": count}
        line |= {f"{name}_ms": statistics.median(times[name, count]) for name in variants}
        line |= {f"{name}_over_products": line[f"{name}_ms"] / line["products_ms"] for name in ("own", "fused")}
        lines.append(line | {"own_over_fused": line["own_ms"] / line["fused_ms"]})
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m-q4")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5, 8, 12, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        target = load_target(arguments.target, RunOptions(dtype=arguments.dtype, device="cpu"), Console(stderr=True))
    except VsdbenchError as error:
        sys.exit(f"error: {error}")
    if target.fused_layers is None:
        sys.exit(
            f"error: '{target.name}' runs its own layers in {target.dtype} on this CPU: there is nothing to compare."
        )
    lines = measure(target, arguments.rows, arguments.context, arguments.repeats)
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "dtype": str(target.dtype), "lines": lines}))
        return
    print(f"{torch.get_num_threads()} threads, {target.dtype}, context {arguments.context}; median milliseconds")
    print("rows  products       own  (ratio)     fused  (ratio)  own/fused")
    for line in lines:
        print(
            f"{line['rows']:4}  {line['products_ms']:8.1f}  {line['own_ms']:8.1f}  {line['own_over_products']:6.2f}x  "
            f"{line['fused_ms']:8.1f}  {line['fused_over_products']:6.2f}x  {line['own_over_fused']:8.2f}x"
        )


if __name__ == "__main__":
    main()
