"""The matrix products of one decode step, back to back, by number of rows: plain weights, oneDNN's layout, our kernels.

python benchmarks/products.py            # shapes of the embedded target
python benchmarks/products.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from vsdbench.bench import script
from vsdbench.errors import EnvironmentProblemError
from vsdbench.models import native, onednn
from vsdbench.models.device import dtype_name

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""Outputs and inputs of the linear layers in one of the 30 layers of SmolLM2-135M."""
HEAD = (49152, 576)

Multiply: TypeAlias = Callable[[Tensor], Tensor]


def kinds(dtype: torch.dtype) -> dict[str, list[Multiply]]:
    """Return, for each kind of products that there is here, what multiplies rows with each of the weights."""
    weights = [torch.randn(outputs, inputs).to(dtype) for outputs, inputs in (*LAYER * 30, HEAD)]
    found: dict[str, list[Multiply]] = {"plain": [partial(linear, weight=weight) for weight in weights]}
    if onednn.can_pack(dtype):
        packed = [onednn.lay_out(weight) for weight in weights]
        found["onednn"] = [partial(onednn.multiply, packed=weight, bias=None) for weight in packed]
    if (library := native.library()) is not None:
        found["native"] = [native.Panels(library, weight, None).multiply for weight in weights]
    return found


@torch.inference_mode()
def measure(dtype: torch.dtype, sizes: list[int], repeats: int) -> list[dict[str, float | str | None]]:
    """Return medians in milliseconds by number of rows, all kinds in turn, and the plain ones' ratio to each."""
    there = kinds(dtype)
    widths = [inputs for _, inputs in (*LAYER * 30, HEAD)]
    lines = []
    for size in sizes:
        inputs = {width: torch.randn(size, width).to(dtype) for width in set(widths)}
        times: dict[str, list[float]] = {kind: [] for kind in there}
        for repeat in range(repeats + 2):
            for kind, products in there.items():
                if kind == "native" and size > native.MOST_ROWS:
                    continue
                started = time.perf_counter()
                for multiply, width in zip(products, widths, strict=True):
                    multiply(inputs[width])
                if repeat >= 2:
                    times[kind].append(1e3 * (time.perf_counter() - started))
        line: dict[str, float | str | None] = {"dtype": dtype_name(dtype), "rows": size}
        medians = {kind: statistics.median(values) for kind, values in times.items() if values}
        for kind in ("plain", "onednn", "native"):
            line[f"{kind}_ms"] = medians.get(kind)
            line[f"{kind}_ratio"] = medians["plain"] / medians[kind] if kind in medians else None
        lines.append(line)
    return lines


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 12, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Print the table."""
    arguments = parse()
    if native.library() is None and not onednn.can_pack(torch.float32):
        raise EnvironmentProblemError(f"there are none but plain products here: {native.why_not()}.")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        lines = measure(dtype, arguments.rows, arguments.repeats)
        results += lines
        if not arguments.json:
            for line in lines:
                cells = [
                    f"{kind} {line[f'{kind}_ms']:6.1f} ms ({line[f'{kind}_ratio']:.2f}x)"
                    for kind in ("plain", "onednn", "native")
                    if line[f"{kind}_ms"]
                ]
                print(f"{line['dtype']:9} {line['rows']:4} rows  " + "  ".join(cells))
    if arguments.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
