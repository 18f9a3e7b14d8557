"""What a run would cost, before it is started: time from a few forwards timed on this machine, memory from shapes.

Nothing is decoded. The two figures that only the run itself can give, how long answers get and how many tokens a step
emits, are assumed as below and printed with the estimate.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.table import Table

from vsdbench import registry
from vsdbench.bench.conversation import encode_turn
from vsdbench.bench.run import RunOptions, load_target, open_suite
from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.tree import any_chain
from vsdbench.models.branching import key_shape
from vsdbench.models.device import dtype_name, product_flops, seconds_of
from vsdbench.models.image_prompt import num_image_tokens
from vsdbench.pictures.settings import check_is_built

if TYPE_CHECKING:
    from rich.console import Console

    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.schema import DrafterEntry, SuiteConfig

ANSWER_FILL = 0.95
"""Share of the length limit that answers are assumed to use."""
TAU_TRAINED = 1.6
TAU_UNTRAINED = 1.1
"""Tokens a step assumed for drafters with and without trained weights; low guesses, so time is over-estimated."""
DRAFT_SHARE = 0.08
"""Drafting time a level of the tree, relative to a target forward."""
REPORTING_BYTES = 250_000_000
"""Statistics and figures, and what ``generate`` of transformers keeps."""
TRAINING_BYTES = 1_000_000_000
"""Weights, gradients, optimiser and activations of a one-layer drafter; its features come on top."""
TRAINED_FOR = 135e6
"""Parameters of the target that the trainers' rates are of; all costs of training grow about as a target's do."""
SECONDS_OUTSIDE = 8.0
"""Imports, loading, warm-up and summary."""


def estimate(name: str | Suite, options: RunOptions, console: Console) -> dict[str, Any]:
    """Return what running a suite would take, as plain JSON data.

    Keys: ``num_prompts``, ``num_decodes``, ``methods`` (name, seconds), ``training`` (recipe, seconds, cached, bytes of
    the features it keeps, data_bytes of memory while its answers are made), ``seconds`` in all, ``memory_bytes``,
    ``memory_available_bytes``, ``assumed``.

    Raises:
        EnvironmentProblemError: The target would have to be built first.
    """
    suite = open_suite(name, options, console)
    config = suite.config
    for entry in config.drafters:
        registry.load("vsdbench.drafters", entry.type)  # an unknown one is an error here as it would be in the run
    check_is_built(config.target)
    target = load_target(config.target, options, console)
    turns = sum(len(prompt.turns) for prompt in suite.prompts)
    decodes = turns * len(config.modes) * config.repeats
    tokens = decodes * config.generation.max_new_tokens * ANSWER_FILL
    longest = max(sum(len(turn) for turn in prompt.turns) for prompt in suite.prompts) // 3
    scratch = 1 + max((entry.tree.budget for entry in config.drafters), default=0)
    context = longest + config.generation.max_new_tokens + scratch
    sample: Sequence[int] = [i % min(100, target.vocab_size) for i in range(min(context, target.max_positions // 2))]
    if seeing := next((prompt for prompt in suite.prompts if prompt.images), None):
        sample = encode_turn(target, seeing, config.generation)
        context += num_image_tokens(sample)
    prefill_s, step_s = _autoregressive(target, sample)
    methods: list[dict[str, Any]] = [
        {
            "name": baseline,
            "seconds": (decodes * prefill_s + tokens * step_s) * config.repeats_of(baseline) / config.repeats,
        }
        for baseline in config.baselines
    ]
    for entry in config.drafters:
        budget, depth = (7, 3) if entry.tree.kind == "auto" else (entry.tree.budget, entry.tree.depth)
        tree_s = _tree_forward_s(target, budget)
        draft_s = DRAFT_SHARE * step_s * depth if _is_model(entry) else 0.0
        tau = TAU_TRAINED if _is_model(entry) else TAU_UNTRAINED
        seconds = decodes * prefill_s + tokens / tau * (tree_s + draft_s)
        methods.append({"name": entry.name, "seconds": seconds})
    if max(config.batch_sizes) > 1:
        methods.append({"name": "in batches", "seconds": _batches_s(target, config, decodes * prefill_s, tokens)})
    methods += [{"name": peer.name, "seconds": decodes * prefill_s + tokens * step_s} for peer in config.peers]
    names = [*config.baselines, *(drafter.name for drafter in config.drafters), *(peer.name for peer in config.peers)]
    training = _training(config, target)
    total = sum(m["seconds"] for m in methods) + sum(t["seconds"] for t in training if not t["cached"])
    return {
        "schema": 1,
        "suite": config.name,
        "target": target.name,
        "device": target.device.type,
        "dtype": dtype_name(target.dtype),
        "num_prompts": len(suite.prompts),
        "num_decodes": turns * len(config.modes) * sum(map(config.repeats_of, names)),
        "methods": methods,
        "training": training,
        "seconds": total + SECONDS_OUTSIDE,
        "memory_bytes": loaded_bytes(target.device)
        + _memory_bytes(target, context, training, len(config.drafters), max(config.batch_sizes)),
        "memory_available_bytes": _available_bytes(target.device),
        "assumed": {"answer_fill": ANSWER_FILL, "tau_trained": TAU_TRAINED, "tau_untrained": TAU_UNTRAINED},
    }


def print_estimate(result: dict[str, Any], console: Console) -> None:
    """Print the estimate as a table."""
    table = Table("step", "time", box=None, pad_edge=False)
    for entry in result["training"]:
        table.add_row(f"train {entry['recipe']}", "in the cache" if entry["cached"] else minutes(entry["seconds"]))
    for entry in result["methods"]:
        table.add_row(f"decode {entry['name']}", minutes(entry["seconds"]))
    table.add_row("in all", minutes(result["seconds"]))
    console.print(
        f"{result['suite']}: {result['num_prompts']} prompts, {result['num_decodes']} decodes of {result['target']} "
        f"on {result['device']} in {result['dtype']}"
    )
    console.print(table)
    console.print(
        f"memory: {result['memory_bytes'] / 1e9:.1f} GB of {result['memory_available_bytes'] / 1e9:.1f} GB available"
    )


def minutes(seconds: float) -> str:
    """Return a duration as people say it.

    >>> minutes(42.0), minutes(600.0)
    ('42 s', '10.0 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _autoregressive(target: Target, prompt: Sequence[int]) -> tuple[float, float]:
    """Return measured seconds of a prompt's prefill and of one decode step after it."""
    settings = DecodeSettings(max_new_tokens=12, eos_ids=frozenset())
    decode(target, Autoregressive(), prompt, settings)
    generation = decode(target, Autoregressive(), prompt, settings)
    return generation.prefill_s, generation.decode_s / len(generation.steps)


def _tree_forward_s(target: Target, budget: int) -> float:
    """Return measured seconds of one target forward over a chain of ``budget`` draft tokens."""
    state = target.prefill([0, 1, 0, 1], budget + 64)
    tree = any_chain(budget, target.device)
    return seconds_of(lambda: target.forward_tree(state, tree), target.device, repeats=5)


def _batches_s(target: Target, config: SuiteConfig, prefill_s: float, tokens: float) -> float:
    """Return seconds of every batch size: a step costs what a forward of as many tokens does.

    Args:
        target: The target.
        config: The suite.
        prefill_s: Of all prompts by one method.
        tokens: Of all answers by one method.
    """
    budgets = {"": 0, **{entry.name: entry.tree.budget for entry in config.drafters}}
    taus = {"": 1.0, **{e.name: TAU_TRAINED if _is_model(e) else TAU_UNTRAINED for e in config.drafters}}
    steps = [
        tokens / size / taus[name] * _tree_forward_s(target, size * (budget + 1) - 1)
        for size in config.batch_sizes
        for name, budget in budgets.items()
    ]
    return sum(steps) + len(steps) * prefill_s


def _is_model(entry: DrafterEntry) -> bool:
    return entry.recipe is not None or entry.checkpoint is not None or "model" in entry.options


def _training(config: SuiteConfig, target: Target) -> list[dict[str, Any]]:
    """Return what the drafters that the suite trains would cost; data and warm starts that are shared count once."""
    larger = sum(parameter.numel() for parameter in target.model.parameters()) / TRAINED_FOR
    found: list[dict[str, Any]] = []
    data_seen: set[str] = set()
    seen: set[str] = set()

    def add(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        recipe = registry.load("vsdbench.trainers", "load")(name, ())
        flops = product_flops(target.device, target.dtype) / larger
        cost = registry.load("vsdbench.trainers", "estimate")(recipe, flops=flops)
        if warm := cost.get("warm_start"):
            add(warm)
        seconds = cost["training_s"] + (0.0 if cost["data_key"] in data_seen else cost["data_s"])
        data_seen.add(cost["data_key"])
        making = cache_bytes(target, cost["slot_columns"])
        if cost["keeps_states"]:
            making += cost["slot_columns"] * 4 * target.hidden_size * target.dtype.itemsize
        told = {"cached": cost["cached"], "bytes": cost["bytes"], "data_bytes": making}
        found.append({"recipe": name, "seconds": seconds} | told)

    for entry in config.drafters:
        if entry.recipe is not None and entry.checkpoint is None:
            add(entry.recipe)
    return found


def loaded_bytes(device: torch.device) -> int:
    """Return the most memory this process has needed so far, the target's loading included."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def _memory_bytes(
    target: Target, context: int, training: Sequence[dict[str, Any]], num_drafters: int, batch_size: int = 1
) -> int:
    """Return what comes on top of the loaded target: caches, drafters, statistics and figures, and training."""
    caches = (1 + batch_size) * cache_bytes(target, context)
    drafter = num_drafters * 24 * target.hidden_size * target.hidden_size * target.dtype.itemsize
    logits = 3 * 64 * target.vocab_size * 4
    most = (max(entry["bytes"] + TRAINING_BYTES, entry["data_bytes"]) for entry in training if not entry["cached"])
    trained = max(most, default=0)
    return int(caches + drafter + logits + REPORTING_BYTES + trained)


def cache_bytes(target: Target, rows: int) -> int:
    """Return the bytes of the target's cache for so many rows, from its config."""
    return math.prod(key_shape(target)) * rows * target.dtype.itemsize


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
