"""The matrix products of one decode step, back to back: plain weights against packed ones, by number of rows.

python benchmarks/products.py            # shapes of the embedded target
python benchmarks/products.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vsdbench.bench import script
from vsdbench.errors import EnvironmentProblemError
from vsdbench.models.device import dtype_name
from vsdbench.models.packed import can_pack, pack

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""Outputs and inputs of the linear layers in one of the 30 layers of SmolLM2-135M."""
HEAD = (49152, 576)


def seconds(layers: Sequence[nn.Linear], inputs: dict[int, Tensor]) -> float:
    """Return the time of one pass through the layers, each on the input of its width."""
    started = time.perf_counter()
    for layer in layers:
        layer(inputs[layer.in_features])
    return time.perf_counter() - started


@torch.inference_mode()
def measure(dtype: torch.dtype, rows: int, repeats: int) -> dict[str, float]:
    """Return medians in milliseconds, the two variants in turn."""
    layers = [nn.Linear(i, o, bias=False, dtype=dtype) for o, i in (*LAYER * 30, HEAD)]
    switch = pack(nn.ModuleList(layers))
    inputs = {width: torch.randn(rows, width, dtype=dtype) for width in (576, 1536)}
    times: dict[str, list[float]] = {"plain_ms": [], "packed_ms": []}
    for repeat in range(repeats + 2):
        for name, on in (("plain_ms", False), ("packed_ms", True)):
            switch.on = on
            elapsed = seconds(layers, inputs)
            if repeat >= 2:
                times[name].append(1e3 * elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"ratio": medians["plain_ms"] / medians["packed_ms"]}


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Print the table."""
    arguments = parse()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        if not can_pack(torch.device("cpu"), dtype):
            raise EnvironmentProblemError("this build of torch has no packed products.")
        for rows in arguments.rows:
            row = {"dtype": dtype_name(dtype), "rows": rows} | measure(dtype, rows, arguments.repeats)
            results.append(row)
            if not arguments.json:
                print(
                    "{dtype:9} {rows:4} rows  plain {plain_ms:7.1f} ms  packed {packed_ms:7.1f} ms {ratio:.2f}x".format(
                        **row
                    )
                )
    if arguments.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
