"""Slot-wise decoding against plain batched ``generate``, in one run: tokens a second of each, and their ratio.

Both answer the same training prompts at the same batch size, temperature mixture aside (plain ``generate`` is greedy).
Processor seconds are shown beside wall-clock time, because they say more on a machine that is doing other work.

    python benchmarks/data_throughput.py smollm2-folder --slots 128 --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vsdbench.models.packed import can_pack, pack
from vsdbench_drafters.training.data import shared_prefix
from vsdbench_drafters.training.generate import Request, SlotGenerator
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


def _timed(work: Callable[[], int]) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    tokens = work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"tokens": tokens, "tokens_per_s": tokens / wall, "tokens_per_processor_s": tokens / processor}


def plain(target: _FolderTarget, prompts: list[list[int]], limit: int) -> int:
    """Return how many response tokens padded batched ``generate`` made of one batch of prompts."""
    longest, pad = max(map(len, prompts)), min(target.eos_ids)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = target.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=[*target.eos_ids],
    )
    made = output[:, longest:].tolist()
    ends = [next((at + 1 for at, token in enumerate(row) if token in target.eos_ids), len(row)) for row in made]
    return sum(ends)


def slot_wise(target: _FolderTarget, source: PromptSource, options: argparse.Namespace) -> Callable[[], int]:
    """Return a function that answers prompts for a while, once slots are in their steady state."""
    prefix = shared_prefix(target)
    generator = SlotGenerator(
        target.model,
        eos_ids=target.eos_ids,
        slots=options.slots,
        max_prompt_tokens=320,
        max_new_tokens=options.max_new_tokens,
        shared_prefix=prefix,
        loop_repeats=3,
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

    def run() -> int:
        begun, tokens = time.perf_counter(), 0
        while time.perf_counter() - begun < options.seconds:
            tokens += len(next(answers).response_ids)
        return tokens

    return run


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description="Slot-wise decoding against plain batched generate.")
    parser.add_argument("model", type=Path, help="a model folder with its tokenizer")
    parser.add_argument("--articles", type=Path, help="the JSON file of articles, instead of fetching it")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0, help="of slot-wise decoding, after warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = _FolderTarget(options.model, getattr(torch, options.dtype))
    articles = read_articles(options.articles) if options.articles else load_articles(progress=True)
    source = PromptSource(articles, seed=0)
    batch = [target.encode_chat(source[index].messages) for index in range(options.slots)]
    results: dict[str, Any] = {"slots": options.slots, "threads": options.threads, "dtype": options.dtype}
    with torch.inference_mode():
        results["plain"] = _timed(lambda: plain(target, batch, options.max_new_tokens))
    if can_pack(target.model.device, target.model.dtype):  # as a target is loaded for every use but the baseline
        pack(target.model)
    results["slot_wise"] = _timed(slot_wise(target, source, options))
    for unit in ("tokens_per_s", "tokens_per_processor_s"):
        results[f"ratio_{unit}"] = results["slot_wise"][unit] / results["plain"][unit]
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name in ("plain", "slot_wise"):
        line = results[name]
        print(f"{name:9} {line['tokens_per_s']:8.1f} tokens/s {line['tokens_per_processor_s']:8.1f} tokens/processor s")
    wall, processor = results["ratio_tokens_per_s"], results["ratio_tokens_per_processor_s"]
    print(f"ratio     {wall:8.2f}x wall     {processor:8.2f}x processor")


if __name__ == "__main__":
    main()
