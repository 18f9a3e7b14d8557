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
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vsdbench.bench import script
from vsdbench.bench.calibration import calibration_prompts
from vsdbench.bench.methods import REFERENCE, Method, build_methods
from vsdbench.decoding.engine import DecodeSettings
from vsdbench.decoding.interfaces import Generation, TreeShape
from vsdbench.errors import ConfigError
from vsdbench.suites.schema import SuiteConfig


def measure(methods: Sequence[Method], prompts: Sequence[Sequence[int]], tokens: int, repeats: int) -> dict[str, Any]:
    """Return by method: speed over plain decoding, tau, shares of decode time, and how many outputs were plain's."""
    done: dict[str, list[Generation]] = {method.name: [] for method in methods}
    for method in methods:
        _decode(method, prompts[0], min(8, tokens))
    for method, prompt in script.in_turns(methods, prompts, repeats):
        done[method.name].append(_decode(method, prompt, tokens))
    found: dict[str, Any] = {}
    for name, generations in done.items():
        pairs = list(zip(done[REFERENCE], generations, strict=True))
        speed, speed_range = script.spread([plain.s_per_token / this.s_per_token for plain, this in pairs])
        found[name] = {
            "speed_over_plain": speed,
            "speed_over_plain_range": speed_range,
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


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_suite(parser, "peers", prompts=4, overrides=True)
    parser.add_argument("--methods", help="names, comma-separated (default: all of the suite)")
    parser.add_argument("--repeats", type=int, default=2, help="of every prompt (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens an answer, no early end (default: 64)")
    return parser.parse_intermixed_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    console = Console(stderr=True)
    suite, target = script.open_both(options, console)
    config = _only(suite.config, options.methods)
    methods = build_methods(config, target, console=console, calibration=calibration_prompts(suite, target))
    result = measure(methods, script.first_turns(suite, target), options.tokens, options.repeats)
    result |= script.setting(target)
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
