"""What a drafter's reading of a picture costs, by visual tokens: ViSpec, which keeps a few, against MSD and EAGLE-3.

For every number of visual tokens, in turns within one process: the drafter's own prefill (``begin``), one draft step
and a whole drafted tree behind the prompt (``propose``), the bytes of its cache, and for scale the target's prefill and
its forward over such a tree. Ratios are medians over pairs of the same turn, with their quartiles. On one thread of a
busy machine ``--processor-time`` leaves out the time in which others ran.

The target is that of the suite ``pictures`` in all but its weights: SmolLM2-135M with the same tower, untrained here,
which reads one drawn picture of 9 x 9, 16 x 16, 24 x 24 patches (the tower's own code stretches its positions). The
drafters have random weights in the recipes' shape. So costs are real, and drafts are not worth anything.

    python benchmarks/visual_tokens.py
    OMP_NUM_THREADS=1 python benchmarks/visual_tokens.py --tokens 81 576 --num-q 4 --processor-time --json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image

from vsdbench.bench import script
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.tree import any_chain
from vsdbench.errors import ConfigError
from vsdbench.models.device import choose_device, choose_dtype, synchronize
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench.models.kv_cache import PreallocatedCache
from vsdbench.models.source import fetch_model
from vsdbench.models.target import Target
from vsdbench.pictures.llava import assemble, make_processor
from vsdbench.pictures.patches import PATCH
from vsdbench.pictures.scenes import Scene
from vsdbench.pictures.settings import BUILT_MODELS, TowerShape
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.msd import MsdModel
from vsdbench_drafters.architectures.one_layer_drafter import OneLayerDrafter
from vsdbench_drafters.architectures.vispec import ViSpecModel

T = TypeVar("T")
Times: TypeAlias = dict[tuple[str, str], float]
"""Milliseconds by whose they are (``target`` or a drafter) and what was done."""
Clock: TypeAlias = Callable[[], float]
"""Seconds since any time."""

WARM_UP = 2
STEP = TreeShape(kind="chain", budget=1, depth=1, top_k=1)
"""One draft token: a forward over the row of the token that was committed last."""
PARTS = ("prefill", "step", "tree")


def untrained_target(
    language_model: Path, *, tower: TowerShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Target:
    """Return a target that reads pictures and has not learned to: a language model behind a random tower.

    Args:
        language_model: Folder of the language model and its tokenizer.
        tower: Sizes of the tower.
        dtype: Of all weights.
        device: Where it runs.
        seed: Of the tower's and the projector's weights.

    Raises:
        ConfigError: The language model has no spare token to stand for pictures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = assemble(language_model, tower)
    with tempfile.TemporaryDirectory() as scratch:
        processor = make_processor(language_model, Path(scratch))
    model = model.to(device, dtype)
    return Target(model, processor.tokenizer, name="untrained tower", fingerprint="none", processor=processor)


def make_prompt(target: Target, num_visual_tokens: int) -> ImagePrompt:
    """Return a question about a drawn picture that takes so many tokens.

    Args:
        target: One of ``untrained_target``.
        num_visual_tokens: The square of a picture's patches in a row.

    Raises:
        ConfigError: It is no square.
    """
    patches = math.isqrt(max(num_visual_tokens, 0))
    if not patches or patches**2 != num_visual_tokens:
        raise ConfigError(
            f"--tokens has {num_visual_tokens}, but a picture is square and has as many patches across as down: "
            "take 81, 256, 576 or another square."
        )
    scene, side = Scene(0, "suite"), patches * PATCH
    images = target.encoder.processor.image_processor  # type: ignore[attr-defined] # it reads images
    images.size = type(images.size)(height=side, width=side)
    picture = scene.image().resize((side, side), Image.Resampling.NEAREST)
    prompt = target.encode_chat([{"role": "user", "content": scene.questions()[0][1], "images": [picture]}])
    assert isinstance(prompt, ImagePrompt)
    stretched = {"interpolate_pos_encoding": torch.ones(1, dtype=torch.bool)}  # the tower's own switch
    return replace(prompt, model_inputs={**prompt.model_inputs, **stretched})


def make_drafters(target: Target, *, draft_vocab_size: int = 4096, num_q: int = 2) -> dict[str, OneLayerDrafter]:
    """Return untrained drafters of a target: ViSpec, then those that keep all visual tokens.

    Args:
        target: The target.
        draft_vocab_size: Tokens that they can draft (4,096 as in the recipes).
        num_q: Vectors that ViSpec sums a picture up in.
    """
    ids = torch.arange(min(draft_vocab_size, target.vocab_size))
    return {
        "vispec": ViSpecModel.from_target(target, ids, seed=0, num_q=num_q).drafter(target.dtype),
        "msd": MsdModel.from_target(target, ids, seed=0).drafter(target.dtype),
        "eagle3": Eagle3Model.from_target(target, ids, seed=0).drafter(target.dtype),
    }


@torch.inference_mode()
def measure(
    target: Target,
    drafters: Mapping[str, OneLayerDrafter],
    prompts: Sequence[ImagePrompt],
    *,
    shape: TreeShape,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> list[dict[str, Any]]:
    """Return one line a prompt (see ``describe``); all prompts and drafters take turns.

    Args:
        target: The target.
        drafters: By name; the ratios are the first one's to each of the others.
        prompts: With different numbers of visual tokens.
        shape: The tree.
        repeats: Turns that count.
        clock: What is read before and after.
    """
    turns: list[list[Times]] = [[] for _ in prompts]
    # What a cache holds is read off afterwards, so every prompt has its own.
    caches = [PreallocatedCache(target.num_layers, len(prompt) + 2 + shape.budget) for prompt in prompts]
    forks = [{name: drafter.fork() for name, drafter in drafters.items()} for _ in prompts]
    for repeat in range(repeats + WARM_UP):
        order = list(drafters) if repeat % 2 == 0 else list(drafters)[::-1]
        for index, prompt in enumerate(prompts):
            mine = {name: forks[index][name] for name in order}
            found = one_turn(target, mine, prompt, caches[index], shape=shape, clock=clock)
            if repeat >= WARM_UP:
                turns[index].append(found)
    return [
        describe(prompt, turns[index], cache_bytes(forks[index], caches[index], len(prompt)))
        for index, prompt in enumerate(prompts)
    ]


def one_turn(
    target: Target,
    drafters: Mapping[str, OneLayerDrafter],
    prompt: ImagePrompt,
    cache: PreallocatedCache,
    *,
    shape: TreeShape,
    clock: Clock,
) -> Times:
    """Return the times of one answer's beginning: prefill and a forward over a tree, then the drafters' parts."""

    def timed(function: Callable[[], T]) -> tuple[T, float]:
        synchronize(target.device)
        started = clock()
        result = function()
        synchronize(target.device)
        return result, 1e3 * (clock() - started)

    times: Times = {}
    state, times["target", "prefill"] = timed(functools.partial(target.prefill, prompt, cache.capacity, cache))
    state.tokens.append(int(state.next_logits.argmax()))
    chain = any_chain(shape.budget, target.device)
    _, times["target", "verify"] = timed(functools.partial(target.forward_tree, state, chain))
    for name, drafter in drafters.items():
        propose = functools.partial(drafter.propose, state, temperature=0.0, generator=torch.Generator())
        _, times[name, "prefill"] = timed(functools.partial(drafter.begin, state, cache.capacity))
        _, times[name, "step"] = timed(functools.partial(propose, STEP))
        drafter.commit(state, 0, state.features[-1:])
        _, times[name, "tree"] = timed(functools.partial(propose, shape))
    return times


def cache_bytes(
    drafters: Mapping[str, OneLayerDrafter], cache: PreallocatedCache, num_tokens: int
) -> dict[str, dict[str, int]]:
    """Return how many rows each cache holds of a prompt, ``rows``, their ``bytes``, and the ``reserved_bytes``.

    Args:
        drafters: As ``one_turn`` left them: one committed token behind the prompt.
        cache: The target's.
        num_tokens: Of the prompt.
    """
    found = {"target": {"rows": num_tokens, "reserved_bytes": cache.num_bytes}}
    found["target"]["bytes"] = cache.num_bytes // cache.capacity * num_tokens
    for name, drafter in drafters.items():
        rows, layer = drafter.num_committed - 1, drafter.layer
        reserved = layer.keys.nbytes + layer.values.nbytes
        found[name] = {"rows": rows, "bytes": reserved // layer.capacity * rows, "reserved_bytes": reserved}
    return found


def describe(prompt: ImagePrompt, turns: Sequence[Times], caches: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return the line of a prompt.

    Keys: ``visual_tokens``, ``prompt_tokens``; ``target`` and each of ``drafters`` with the median ``prefill_ms``,
    ``step_ms``, ``tree_ms`` (the target: ``verify_ms``) and ``cache``; ``ratios`` of the first drafter by drafter and
    part, ``[median, lower quartile, upper quartile]``.
    """
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    names = [name for name in caches if name != "target"]
    first = names[0]
    measured = {
        name: {f"{part}_ms": value for (whose, part), value in medians.items() if whose == name} | {"cache": cache}
        for name, cache in caches.items()
    }
    return {
        "visual_tokens": prompt.num_image_tokens,
        "prompt_tokens": len(prompt),
        "target": measured["target"],
        "drafters": {name: measured[name] for name in names},
        "ratios": {
            name: {
                part: ratio([turn[first, part] for turn in turns], [turn[name, part] for turn in turns])
                for part in PARTS
            }
            for name in names[1:]
        },
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the median and the quartiles of the ratios of paired times.

    >>> ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0])
    [1.0, 0.75, 2.0]
    """
    ratios = np.asarray(ours) / np.asarray(theirs)
    return [float(value) for value in np.quantile(ratios, [0.5, 0.25, 0.75])]


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_numbers(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[81, 256, 576], help="visual tokens of a picture")
    parser.add_argument("--num-q", type=int, default=2, help="vectors ViSpec sums a picture up in (default: 2)")
    parser.add_argument("--budget", type=int, default=7, help="draft tokens of the tree, three deep (default: 7)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--processor-time", action="store_true", help="of this process, in place of the clock's time")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure and print."""
    options = parse()
    device = choose_device(options.device)
    settings = BUILT_MODELS["smolvision"]
    target = untrained_target(
        fetch_model(settings.language_model, progress=True).path,
        tower=settings.tower,
        dtype=choose_dtype(options.dtype, device),
        device=device,
    )
    lines = measure(
        target,
        make_drafters(target, num_q=options.num_q),
        [make_prompt(target, count) for count in options.tokens],
        shape=TreeShape(budget=options.budget, depth=min(3, options.budget), top_k=min(4, options.budget)),
        repeats=options.repeats,
        clock=time.process_time if options.processor_time else time.perf_counter,
    )
    result = {"lines": lines, "num_q": options.num_q, "budget": options.budget, "weights": "untrained"}
    result |= {"time": "processor" if options.processor_time else "clock", "repeats": options.repeats}
    result |= script.setting(target) | {"target": f"{settings.language_model} with a tower as smolvision's"}
    print(json.dumps(result) if options.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Return the lines as text."""
    tree = f"tree of {result['budget']}"
    rows = [
        f"{result['target']}, {result['dtype']}, {result['threads']} threads; all weights but the language model's are "
        f"untrained; medians of {result['repeats']} turns ({result['time']} time), ratios of ViSpec "
        f"(num_q {result['num_q']}) with quartiles",
        f"visual  prompt{'':<16}{'prefill':>13}{'draft step':>13}{tree:>13}{'cache rows':>12}{'kB':>9}{'reserved':>10}",
    ]
    for line in result["lines"]:
        where = f"{line['visual_tokens']:6}  {line['prompt_tokens']:6}"
        for name, found in {"target": line["target"], **line["drafters"]}.items():
            parts = [found["prefill_ms"], found.get("step_ms"), found.get("tree_ms", found.get("verify_ms"))]
            cells = "".join(f"{'':>13}" if part is None else f"{part:10.2f} ms" for part in parts)
            cache = found["cache"]
            memory = f"{cache['rows']:12}{cache['bytes'] / 1e3:9.0f}{cache['reserved_bytes'] / 1e3:10.0f}"
            rows.append(f"{where}  {name:<14}{cells}{memory}")
        for name, ratios in line["ratios"].items():
            cells = ", ".join(
                f"{part} {mid:.2f} ({low:.2f} to {high:.2f})" for part, (mid, low, high) in ratios.items()
            )
            rows.append(f"{where}  vispec / {name}: {cells}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
