"""What one forward of the target costs in decoding: its products alone, its own layers, the fused and compiled ones.

The products back to back ("floor") are what a step of this engine cannot go below on this machine; what is over them is
small operations and their calls. All in turns in one process, so that ratios hold where times do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vsdbench.decoding.tree import any_chain
from vsdbench.models.packed import PackedLinear

if TYPE_CHECKING:
    from vsdbench.models.compiled import CompiledLayers
    from vsdbench.models.fused import FusedLayers
    from vsdbench.models.target import Target

WARM_UP = 3


@torch.inference_mode()
def measure_steps(target: Target, rows: Sequence[int], *, context: int, repeats: int) -> list[dict[str, Any]]:
    """Return one line a number of rows: median milliseconds of the products and of each kind of layers, and ratios.

    ``products_ms``, ``own_ms``, ``fused_ms``, ``compiled_ms``; those that the target does not have are null.
    ``step_ms`` is of the kind that it runs.

    Args:
        target: On a CPU, its linear layers packed.
        rows: Root and draft tokens of a step, 1 for plain decoding.
        context: Tokens before the step.
        repeats: Turns that count.
    """
    state = target.prefill([index % target.vocab_size for index in range(context)], context + max(rows) + 1)
    state.tokens.append(1)
    fused, compiled = target.fused_layers, target.compiled_layers
    trees = {count: any_chain(count - 1, target.device) for count in rows}

    def forward(count: int, layers: FusedLayers | None, graph: CompiledLayers | None = None) -> None:
        target.fused_layers, target.compiled_layers = layers, graph
        target.forward_tree(state, trees[count])

    variants: dict[str, Callable[[int], None]] = {
        "products": _products(target),
        "own": lambda count: forward(count, None),
    }
    if fused is not None:
        variants["fused"] = lambda count: forward(count, fused)
    if compiled is not None:
        variants["compiled"] = lambda count: forward(count, fused, compiled)
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in variants for count in rows}
    try:
        for repeat in range(repeats + WARM_UP):
            for count in rows:
                for name, run in variants.items():
                    started = time.perf_counter()
                    run(count)
                    if repeat >= WARM_UP:
                        times[name, count].append(1e3 * (time.perf_counter() - started))
    finally:
        target.fused_layers, target.compiled_layers = fused, compiled
    return [_line(count, {name: statistics.median(times[name, count]) for name in variants}) for count in rows]


def _line(rows: int, medians: dict[str, float]) -> dict[str, Any]:
    floor = medians["products"]
    line: dict[str, Any] = {"rows": rows, "products_ms": floor}
    for kind in ("own", "fused", "compiled"):
        line[f"{kind}_ms"] = line[f"{kind}_over_products"] = None
        if kind in medians:
            line["step_ms"] = line[f"{kind}_ms"] = medians[kind]
            line["step_over_products"] = line[f"{kind}_over_products"] = medians[kind] / floor
    return line


def _products(target: Target) -> Callable[[int], None]:
    """Return the function that runs all linear layers of a step of n rows, one after the other, and nothing else."""
    decoder = [module for module in target.model.get_decoder().modules() if isinstance(module, PackedLinear)]
    layers = [*decoder, target.model.get_output_embeddings()]
    widths = {layer.in_features for layer in layers}

    def run(rows: int) -> None:
        inputs = {width: torch.zeros(rows, width, dtype=target.dtype) for width in widths}
        for layer in layers:
            layer(inputs[layer.in_features])

    return run
