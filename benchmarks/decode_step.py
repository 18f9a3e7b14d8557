"""One forward of the target in decoding: its products alone, its own layers, the fused and the compiled ones, by rows.

All in turns in one process; the medians and their ratios to the products ("floor") are what counts. The own layers run
on packed weights too, so the difference is the operations between the products.

    python benchmarks/decode_step.py --dtype bf16 --context 256
    python benchmarks/decode_step.py --rows 1 8 16 --json
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from rich.console import Console

from vsdbench.bench.decode_step import measure_steps
from vsdbench.bench.run import RunOptions, load_target
from vsdbench.doctor import memory_bandwidth
from vsdbench.errors import VsdbenchError
from vsdbench.models.packed import PackedLinear


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m-q4")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5, 8, 12, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--compile", action="store_true", help="compiled layers, too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        options = RunOptions(dtype=arguments.dtype, device="cpu", compiled=arguments.rows if arguments.compile else ())
        target = load_target(arguments.target, options, Console(stderr=True))
    except VsdbenchError as error:
        sys.exit(f"error: {error}")
    if target.fused_layers is None:
        sys.exit(
            f"error: '{target.name}' runs its own layers in {target.dtype} on this CPU: there is nothing to compare."
        )
    lines = measure_steps(target, arguments.rows, context=arguments.context, repeats=arguments.repeats)
    read = sum(layer.weight.nbytes for layer in target.model.modules() if isinstance(layer, PackedLinear))
    reading_ms = 1e3 * read / memory_bandwidth(target.device)
    if arguments.json:
        found = {"threads": torch.get_num_threads(), "dtype": str(target.dtype).removeprefix("torch.")}
        print(json.dumps(found | {"context": arguments.context, "reading_ms": reading_ms, "lines": lines}))
        return
    print(f"{torch.get_num_threads()} threads, {target.dtype}, context {arguments.context}; median milliseconds")
    print(f"reading the weights takes {reading_ms:.1f} ms at this machine's memory bandwidth")
    kinds = [kind for kind in ("own", "fused", "compiled") if lines[0][f"{kind}_ms"]]
    print("rows  products" + "".join(f"{kind:>10}  (ratio)" for kind in kinds))
    for line in lines:
        times = "".join(f"  {line[f'{kind}_ms']:8.1f}  {line[f'{kind}_over_products']:6.2f}x" for kind in kinds)
        print(f"{line['rows']:4}  {line['products_ms']:8.1f}{times}")


if __name__ == "__main__":
    main()
