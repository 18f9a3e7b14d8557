"""Speculative decoding here and in transformers against plain decoding, and where a step's time goes.

Prompts are decoded greedily by all methods of a suite in turns, in an order that alternates: plain decoding,
``generate``, the suite's drafters, and its peers (decode loops of others on the same weights). Ratios to plain decoding
are paired by prompt and repeat. Draft share and overhead (all that is neither drafting nor the target's forward) are of
decode time.

    python benchmarks/speculative.py --json
    python benchmarks/speculative.py --suite mtbench-hour --methods eagle3-kl-hour,ngram --prompts 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from vsdbench.bench.auto_tree import calibration_prompts
from vsdbench.bench.conversation import encode_turn
from vsdbench.bench.methods import REFERENCE, Method, build_methods
from vsdbench.bench.run import RunOptions, load_target, open_suite
from vsdbench.decoding.engine import DecodeSettings
from vsdbench.decoding.interfaces import Generation, TreeShape
from vsdbench.errors import ConfigError, VsdbenchError
from vsdbench.suites.schema import SuiteConfig


def measure(methods: Sequence[Method], prompts: Sequence[Sequence[int]], tokens: int, repeats: int) -> dict[str, Any]:
    """Return by method: speed over plain decoding, tau, shares of decode time, and how many outputs were plain's."""
    done: dict[str, list[Generation]] = {method.name: [] for method in methods}
    for method in methods:
        _decode(method, prompts[0], min(8, tokens))
    for turn in range(repeats * len(prompts)):
        for method in methods if turn % 2 == 0 else reversed(methods):
            done[method.name].append(_decode(method, prompts[turn % len(prompts)], tokens))
    found: dict[str, Any] = {}
    for name, generations in done.items():
        pairs = list(zip(done[REFERENCE], generations, strict=True))
        ratios = [_s_per_token(plain) / _s_per_token(this) for plain, this in pairs]
        found[name] = {
            "speed_over_plain": statistics.median(ratios),
            "speed_over_plain_range": [min(ratios), max(ratios)],
            "equal_outputs": sum(plain.token_ids == this.token_ids for plain, this in pairs),
        }
        steps = [step for generation in generations for step in generation.steps]
        if steps:
            total = sum(step.draft_ms + step.verify_ms + step.other_ms for step in steps)
            found[name] |= {
                "tau": sum(step.num_emitted for step in steps) / len(steps),
                "draft_share": sum(step.draft_ms for step in steps) / total,
                "overhead_share": sum(step.other_ms for step in steps) / total,
            }
    return {"methods": found, "pairs": repeats * len(prompts)}


def _decode(method: Method, prompt: Sequence[int], tokens: int) -> Generation:
    shape = method.shape_in("greedy") or TreeShape(budget=0)
    return method.run(prompt, DecodeSettings(max_new_tokens=tokens, shape=shape, eos_ids=frozenset()))


def _s_per_token(generation: Generation) -> float:
    return generation.decode_s / max(1, len(generation.token_ids) - 1)


def _only(config: SuiteConfig, names: str | None) -> SuiteConfig:
    """Return the suite with plain decoding and the methods of these names alone, so that no others are made ready."""
    if names is None:
        return config
    known = [REFERENCE, *config.baselines, *(entry.name for entry in config.drafters)]
    known += [entry.name for entry in config.peers]
    wanted = {REFERENCE, *names.split(",")}
    if unknown := wanted - {*known}:
        raise ConfigError(f"'{min(unknown)}' is none of the suite's methods: {', '.join(known)}.")
    return config.model_copy(
        update={
            "baselines": [name for name in config.baselines if name in wanted],
            "drafters": [entry for entry in config.drafters if entry.name in wanted],
            "peers": [entry for entry in config.peers if entry.name in wanted],
        }
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the suite")
    parser.add_argument("--suite", default="peers", help="where methods and prompts come from (default: peers)")
    parser.add_argument("--methods", help="names, comma-separated (default: all of the suite)")
    parser.add_argument("--target", help="another target than the suite's")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16, fp32 or fp64 (default: auto)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=4, help="spread over the suite's categories (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="of every prompt (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens an answer, no early end (default: 64)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    console = Console(stderr=True)
    try:
        run_options = RunOptions(
            overrides=options.overrides,
            target=options.target,
            device=options.device,
            dtype=options.dtype,
            limit=options.prompts,
        )
        suite = open_suite(options.suite, run_options, console)
        target = load_target(suite.config.target, run_options, console)
        prompts = [encode_turn(target, prompt, suite.config.generation) for prompt in suite.prompts]
        config = _only(suite.config, options.methods)
        methods = build_methods(config, target, console=console, calibration=calibration_prompts(suite, target))
        result = measure(methods, prompts, options.tokens, options.repeats)
    except VsdbenchError as error:
        console.print(f"[red]error:[/] {error}")
        return error.exit_code
    result |= {"target": target.name, "dtype": str(target.dtype).removeprefix("torch."), "device": str(target.device)}
    result |= {"threads": torch.get_num_threads()}
    if options.json:
        print(json.dumps(result))
        return 0
    for name, found in result["methods"].items():
        low, high = found["speed_over_plain_range"]
        shares = ""
        if "tau" in found:
            shares = (
                f"; tau {found['tau']:.2f}, drafting {100 * found['draft_share']:.1f} %, "
                f"overhead {100 * found['overhead_share']:.1f} %"
            )
        print(
            f"{name:<18} {found['speed_over_plain']:.3f} x plain decoding ({low:.3f} to {high:.3f}), paired; "
            f"{found['equal_outputs']} of {result['pairs']} outputs are plain decoding's{shares}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
