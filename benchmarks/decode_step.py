"""One forward of the target in decoding: its products alone, and each kind of layers, by rows.

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

from vsdbench.bench import script
from vsdbench.bench.decode_step import KINDS, measure_steps
from vsdbench.bench.run import RunOptions, load_target
from vsdbench.doctor import memory_bandwidth
from vsdbench.errors import ConfigError
from vsdbench.models.device import dtype_name
from vsdbench.models.packed import PackedLinear


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_target(parser, device=False)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5, 8, 12, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--compile", action="store_true", help="compiled layers, too")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Print the table."""
    arguments = parse()
    options = RunOptions(dtype=arguments.dtype, device="cpu", compiled=arguments.rows if arguments.compile else ())
    target = load_target(arguments.target, options, Console(stderr=True))
    if target.fused_layers is None:
        raise ConfigError(
            f"'{target.name}' runs its own layers in {target.dtype} on this CPU: there is nothing to compare."
        )
    lines = measure_steps(target, arguments.rows, context=arguments.context, repeats=arguments.repeats)
    read = sum(layer.weight.nbytes for layer in target.model.modules() if isinstance(layer, PackedLinear))
    reading_ms = 1e3 * read / memory_bandwidth(target.device)
    if arguments.json:
        found = {"threads": torch.get_num_threads(), "dtype": dtype_name(target.dtype)}
        print(json.dumps(found | {"context": arguments.context, "reading_ms": reading_ms, "lines": lines}))
        return 0
    print(f"{torch.get_num_threads()} threads, {target.dtype}, context {arguments.context}; median milliseconds")
    print(f"reading the weights takes {reading_ms:.1f} ms at this machine's memory bandwidth")
    kinds = [kind for kind in KINDS if lines[0][f"{kind}_ms"]]
    print("rows  products" + "".join(f"{kind:>10}  (ratio)" for kind in kinds))
    for line in lines:
        times = "".join(f"  {line[f'{kind}_ms']:8.1f}  {line[f'{kind}_over_products']:6.2f}x" for kind in kinds)
        print(f"{line['rows']:4}  {line['products_ms']:8.1f}{times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
