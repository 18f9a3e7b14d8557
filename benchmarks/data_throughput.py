"""Slot-wise decoding against plain batched ``generate``, taking turns: tokens a second of each, and their ratio.

Both answer the same training prompts at the same batch size, temperature mixture aside (plain ``generate`` is greedy).
Plain ``generate`` is halted every few seconds, between two of its steps, for as many seconds of slot-wise decoding in
its steady state, so that whatever else the machine does slows both alike. Processor seconds are shown beside
wall-clock time, because they say more on a machine that is doing other work.

    python benchmarks/data_throughput.py --slots 128 --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from vsdbench.bench import script
from vsdbench.models import attention
from vsdbench.models.device import choose_dtype, dtype_name
from vsdbench.models.fused import FusedLayers, can_fuse
from vsdbench.models.packed import Switch, can_pack, pack, unpack
from vsdbench.models.source import fetch_model
from vsdbench_drafters.training.answers import Request, shared_prefix
from vsdbench_drafters.training.generate import SlotGenerator
from vsdbench_drafters.training.prompts import PromptSource, load_articles, read_articles


class _FolderTarget:
    """A model folder with the two things that prompts need."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        end = self.model.generation_config.eos_token_id
        self.eos_ids = frozenset(end if isinstance(end, list) else [end])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])


@dataclass
class Clock:
    """Adds up wall-clock and processor seconds of the stretches between ``start`` and ``stop``, and tokens."""

    tokens: int = 0
    wall_s: float = 0.0
    processor_s: float = 0.0

    def start(self) -> None:
        """Begin a stretch."""
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """End a stretch."""
        self.wall_s += time.perf_counter() - self._since[0]
        self.processor_s += time.process_time() - self._since[1]

    def running_s(self) -> float:
        """Return wall-clock seconds since ``start``."""
        return time.perf_counter() - self._since[0]

    def rates(self) -> dict[str, float]:
        """Return tokens a second by both clocks."""
        return {
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.wall_s,
            "tokens_per_processor_s": self.tokens / self.processor_s,
        }


def plain(target: _FolderTarget, prompts: list[list[int]], limit: int, pause: Callable[[], None]) -> int:
    """Return how many response tokens padded batched ``generate`` made of one batch of prompts.

    Args:
        target: The model.
        prompts: Token ids.
        limit: Longest answer.
        pause: Called after every step.
    """
    longest, pad = max(map(len, prompts)), min(target.eos_ids)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def after_step(ids: Tensor, _scores: object, **_: object) -> Tensor:
        pause()
        return torch.zeros(len(ids), dtype=torch.bool)

    output = target.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=[*target.eos_ids],
        stopping_criteria=StoppingCriteriaList([after_step]),
    )
    made = output[:, longest:].tolist()
    ends = [next((at + 1 for at, token in enumerate(row) if token in target.eos_ids), len(row)) for row in made]
    return sum(ends)


def alternate(
    target: _FolderTarget, batch: list[list[int]], limit: int, run_slots: Callable[[float], int], turn_s: float
) -> dict[str, Clock]:
    """Return the clocks of both, which took turns until plain ``generate`` was done with its batch.

    Args:
        target: The model, its linear layers plain.
        batch: Prompts of plain ``generate``.
        limit: Longest answer.
        run_slots: Decodes slot-wise for some seconds and returns the tokens made.
        turn_s: Seconds of one turn.
    """
    clocks = {"plain": Clock(), "slot_wise": Clock()}
    packs = can_pack(target.model.device, target.model.dtype)  # as a target is loaded for every use but the baseline
    switch = pack(target.model) if packs else Switch()

    def slots_turn() -> None:
        switch.on = True
        clocks["slot_wise"].start()
        clocks["slot_wise"].tokens += run_slots(turn_s)
        clocks["slot_wise"].stop()
        switch.on = False

    def pause() -> None:
        if clocks["plain"].running_s() >= turn_s:
            clocks["plain"].stop()
            slots_turn()
            clocks["plain"].start()

    switch.on = False
    clocks["plain"].start()
    with torch.inference_mode():
        clocks["plain"].tokens = plain(target, batch, limit, pause)
    clocks["plain"].stop()
    slots_turn()
    unpack(target.model)
    return clocks


def slot_wise(target: _FolderTarget, source: PromptSource, options: argparse.Namespace) -> Callable[[float], int]:
    """Return a function that answers prompts for so many seconds; slots are in their steady state when it is called."""
    prefix = shared_prefix(target)
    packs = can_pack(target.model.device, target.model.dtype)
    fused = None
    if packs:
        pack(target.model)
        decoder, config = target.model.get_decoder(), target.model.config
        fused = FusedLayers(decoder, decoder.layers, config) if can_fuse(decoder, config, attention.NAME) else None
    generator = SlotGenerator(
        target.model,
        eos_ids=target.eos_ids,
        slots=options.slots,
        max_prompt_tokens=320,
        max_new_tokens=options.max_new_tokens,
        shared_prefix=prefix,
        loop_repeats=3,
        fused=fused,
    )
    prompts = ((index, target.encode_chat(source[index].messages)) for index in itertools.count(options.slots))
    fitting = (
        Request(index, ids, float(index % 2))
        for index, ids in prompts
        if len(ids) <= 320 and ids[: len(prefix)] == prefix
    )
    answers = generator.stream(fitting)
    for _ in range(2 * options.slots):
        next(answers)
    unpack(target.model)

    def run(seconds: float) -> int:
        begun, before = time.perf_counter(), generator.num_made
        while time.perf_counter() - begun < seconds:
            next(answers)
        return generator.num_made - before

    return run


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = script.make_parser(__doc__)
    script.add_target(parser, device=False)
    parser.add_argument("--articles", type=Path, help="the JSON file of articles, instead of fetching it")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--turn", type=float, default=5.0, help="seconds after which the two take turns")
    return parser.parse_args()


@script.guarded
def main() -> int:
    """Measure both and print them."""
    options = parse()
    dtype = choose_dtype(options.dtype, torch.device("cpu"))
    target = _FolderTarget(fetch_model(options.target, progress=not options.json).path, dtype)
    articles = read_articles(options.articles) if options.articles else load_articles(progress=True)
    source = PromptSource(articles, seed=0)
    batch = [target.encode_chat(source[index].messages) for index in range(options.slots)]
    results: dict[str, Any] = {"slots": options.slots, "threads": torch.get_num_threads()}
    results["dtype"] = dtype_name(dtype)
    run_slots = slot_wise(target, source, options)
    clocks = alternate(target, batch, options.max_new_tokens, run_slots, options.turn)
    results |= {name: clock.rates() for name, clock in clocks.items()}
    for unit in ("tokens_per_s", "tokens_per_processor_s"):
        results[f"ratio_{unit}"] = results["slot_wise"][unit] / results["plain"][unit]
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    for name in ("plain", "slot_wise"):
        line = results[name]
        print(f"{name:9} {line['tokens_per_s']:8.1f} tokens/s {line['tokens_per_processor_s']:8.1f} tokens/processor s")
    wall, processor = results["ratio_tokens_per_s"], results["ratio_tokens_per_processor_s"]
    print(f"ratio     {wall:8.2f}x wall     {processor:8.2f}x processor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
