"""What one forward of the target costs in decoding: its products alone, and each kind of layers.

The products back to back ("floor") are what a step of this engine cannot go below on this machine; what is over them is
small operations and their calls. All in turns in one process, so that ratios hold where times do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vsdbench.decoding.tree import any_chain
from vsdbench.models.packed import PackedLinear

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import TokenTree
    from vsdbench.models.compiled import CompiledLayers
    from vsdbench.models.fused import FusedLayers
    from vsdbench.models.native_layers import NativeLayers
    from vsdbench.models.state import SequenceState
    from vsdbench.models.target import Target

WARM_UP = 3
KINDS = ("own", "fused", "native", "compiled")
"""Of layers: the model's own, the fused ones, those in one call of native kernels, and compiled ones."""


@torch.inference_mode()
def measure_steps(target: Target, rows: Sequence[int], *, context: int, repeats: int) -> list[dict[str, Any]]:
    """Return one line a number of rows: median milliseconds of the products and of each kind of layers, and ratios.

    ``products_ms``, and ``own_ms``, ``fused_ms``, ``native_ms``, ``compiled_ms``; those that the target does not have
    are null. ``step_ms`` is of the kind that it runs, the last of these.

    Args:
        target: On a CPU, its linear layers packed.
        rows: Root and draft tokens of a step, 1 for plain decoding.
        context: Tokens before the step.
        repeats: Turns that count.
    """
    state = target.prefill([index % target.vocab_size for index in range(context)], context + max(rows) + 1)
    state.tokens.append(1)
    trees = {count: any_chain(count - 1, target.device) for count in rows}
    before = _layers_of(target)
    variants = {name: _forward(target, state, trees, layers) for name, layers in _kinds(target).items()}
    variants["products"] = _products(target)
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
        _take(target, before)
    return [_line(count, {name: statistics.median(times[name, count]) for name in variants}) for count in rows]


class _Layers(NamedTuple):
    """What runs in the place of a target's own layers."""

    fused: FusedLayers | None
    native: NativeLayers | None = None
    compiled: CompiledLayers | None = None


def _layers_of(target: Target) -> _Layers:
    fused = target.fused_layers
    return _Layers(fused, None if fused is None else fused.native, target.compiled_layers)


def _take(target: Target, layers: _Layers) -> None:
    target.fused_layers, target.compiled_layers = layers.fused, layers.compiled
    if layers.fused is not None:
        layers.fused.native = layers.native


def _kinds(target: Target) -> dict[str, _Layers]:
    """Return the kinds of layers that a target has."""
    fused, native, compiled = _layers_of(target)
    kinds = {
        "own": (True, _Layers(None)),
        "fused": (fused is not None, _Layers(fused)),
        "native": (native is not None, _Layers(fused, native)),
        "compiled": (compiled is not None, _Layers(fused, native, compiled)),
    }
    return {name: layers for name, (there, layers) in kinds.items() if there}


def _forward(
    target: Target, state: SequenceState, trees: Mapping[int, TokenTree], layers: _Layers
) -> Callable[[int], None]:
    """Return what runs a forward of n rows through these layers."""

    def run(count: int) -> None:
        _take(target, layers)
        target.forward_tree(state, trees[count])

    return run


def _line(rows: int, medians: dict[str, float]) -> dict[str, Any]:
    floor = medians["products"]
    line: dict[str, Any] = {"rows": rows, "products_ms": floor}
    for kind in KINDS:
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
