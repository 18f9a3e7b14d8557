"""Plain decoding in our engine against ``generate`` of transformers, on the real target in one run.

The engine's autoregressive decoding is what every speedup is measured against, so it must not be a slow straw man. Both
decode the same prompts in turn, in an order that alternates; ratios are paired by prompt and repeat. With ``--static``
a third one takes part, ``generate`` with a static cache and a compiled forward: prompts are then cut to one length, for
which it is compiled once, beforehand.

    python benchmarks/autoregressive.py --dtype bf16 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from rich.console import Console
from transformers import CompileConfig

from vsdbench.bench import script
from vsdbench.decoding.baseline import hf_generate
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import Generation, TreeShape
from vsdbench.models.target import Target

OURS = "autoregressive"
STATIC = "hf-static-compiled"
Runs: TypeAlias = dict[str, Callable[[Sequence[int], DecodeSettings], Generation]]


def measure(
    target: Target, prompts: Sequence[Sequence[int]], tokens: int, repeats: int, *, static: bool = False
) -> dict[str, Any]:
    """Return medians of all in milliseconds, median paired ratios to ours, and how many outputs agreed with ours."""
    settings = DecodeSettings(max_new_tokens=tokens, shape=TreeShape(budget=0), eos_ids=frozenset())
    runs: Runs = {
        OURS: lambda prompt, how: decode(target, Autoregressive(), prompt, how),
        "hf-generate": lambda prompt, how: hf_generate(target, prompt, how),
    }
    if static:
        shortest = min(map(len, prompts))
        prompts = [prompt[len(prompt) - shortest :] for prompt in prompts]
        runs[STATIC] = static_generate(target)
    result: dict[str, Any] = {}
    for name, run in runs.items():
        started = time.perf_counter()
        run(prompts[0], settings)
        result[name] = {"first_s": time.perf_counter() - started}
    done: dict[str, list[Generation]] = {name: [] for name in runs}
    for name, prompt in script.in_turns(list(runs), prompts, repeats):
        done[name].append(runs[name](prompt, settings))
    for name, generations in done.items():
        pairs = list(zip(done[OURS], generations, strict=True))
        speed, speed_range = script.spread([theirs.s_per_token / ours.s_per_token for ours, theirs in pairs])
        result[name] |= {
            "ms_per_token": statistics.median(1e3 * generation.s_per_token for generation in generations),
            "prefill_ms": statistics.median(1e3 * generation.prefill_s for generation in generations),
            "our_speed_over_it": speed,
            "our_speed_over_it_range": speed_range,
            "our_prefill_speed_over_it": statistics.median(t.prefill_s / o.prefill_s for o, t in pairs),
            "equal_outputs": sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs),
        }
    return {"methods": result, "pairs": repeats * len(prompts)}


def static_generate(target: Target) -> Callable[[Sequence[int], DecodeSettings], Generation]:
    """Return ``generate`` with a static cache and the library's own way of compiling the forward, on any device."""
    compiling = CompileConfig()
    compiling._compile_all_devices = True  # noqa: SLF001 - the library's own switch for CPUs

    def run(prompt: Sequence[int], settings: DecodeSettings) -> Generation:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, about what it does not fuse
            return hf_generate(target, prompt, settings, cache_implementation="static", compile_config=compiling)

    return run


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_suite(parser, "mtbench", prompts=4)
    parser.add_argument("--repeats", type=int, default=4, help="of every prompt (default: 4)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens an answer, no early end (default: 64)")
    parser.add_argument("--static", action="store_true", help="generate with a static cache and compiled, too")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    suite, target = script.open_both(options, Console(stderr=True))
    prompts = script.first_turns(suite, target)
    result = measure(target, prompts, options.tokens, options.repeats, static=options.static)
    result |= script.setting(target) | {"attention": target.attention, "torch": torch.__version__}
    if options.json:
        print(json.dumps(result))
        return 0
    for name, found in result["methods"].items():
        low, high = found["our_speed_over_it_range"]
        print(
            f"{name:<15} {found['ms_per_token']:8.2f} ms a token {found['prefill_ms']:9.1f} ms prefill (medians); "
            f"ours is {found['our_speed_over_it']:.3f} x as fast ({low:.3f} to {high:.3f}), paired; "
            f"{found['equal_outputs']} of {result['pairs']} outputs are ours; first call {found['first_s']:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
