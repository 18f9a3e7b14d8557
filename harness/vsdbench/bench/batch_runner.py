"""Several answers at a time: every group of prompts by every method at every batch size, interleaved.

A group is decoded with as many places as the batch size; the next prompt takes the place of an answer that has ended.
Groups have at least as many prompts as the largest batch size, so that every batch is full when it starts, and all
batch sizes and methods decode the same groups in an order drawn anew for each: what is compared was measured side by
side. Conversations go on from the answers of plain decoding, one at a time, with which every answer is compared too.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from vsdbench.bench.lossless import compare
from vsdbench.bench.methods import Method, forks
from vsdbench.bench.runner import WARMUP_TOKENS, Block, Runner
from vsdbench.decoding.engine import decode_together
from vsdbench.errors import ConfigError
from vsdbench.store.batches import BatchAnswer, BatchKey, BatchRecord, BatchStore
from vsdbench.store.records import Steps, Tree, hash_tokens

if TYPE_CHECKING:
    from vsdbench.decoding.engine import DecodeSettings
    from vsdbench.decoding.interfaces import Generation
    from vsdbench.store.store import RunStore
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.prompts import Prompt
    from vsdbench.suites.schema import Mode


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that are decoded together, in one mode, turn and repeat."""

    number: int
    prompts: tuple[Prompt, ...]
    mode: Mode
    turn: int
    repeat: int


def check_batches(suite: Suite) -> None:
    """Refuse what cannot be decoded in batches, before anything is trained.

    Raises:
        ConfigError: Too few prompts for the largest batch size, or prompts with images.
    """
    most = max(suite.config.batch_sizes)
    if most == 1:
        return
    if len(suite.prompts) < most:
        raise ConfigError(
            f"batch_sizes has {most}, but the suite has {len(suite.prompts)} prompts: use a smaller batch size, "
            "or more prompts."
        )
    if any(prompt.images for prompt in suite.prompts):
        raise ConfigError("batch_sizes are measured on text alone: leave them out of suites with images.")


def run_batches(runner: Runner, store: RunStore, on_progress: Callable[[int, int, str], None] | None = None) -> None:
    """Decode the suite of a runner that has run in batches, if its suite says so; write what is missing to the run."""
    if max(runner.suite.config.batch_sizes) == 1:
        return
    with closing(BatchStore(store.directory)) as batches:
        if batches.note:
            _log.warning("%s", batches.note)
        BatchRunner(runner, batches, on_progress).run()


def divide(prompts: Sequence[Prompt], most: int) -> list[tuple[Prompt, ...]]:
    """Return as many groups as there can be of at least ``most`` prompts; neighbours go to different groups."""
    count = max(1, len(prompts) // most)
    return [tuple(prompts[first::count]) for first in range(count)]


class BatchRunner:
    """Decodes a suite in batches, once its answers have been decoded one at a time; again, only what is missing.

    Args:
        runner: The suite's runner, which has run.
        store: Where batches go.
        on_progress: Called after every batch, with what is done, in all, and a text.
    """

    def __init__(
        self, runner: Runner, store: BatchStore, on_progress: Callable[[int, int, str], None] | None = None
    ) -> None:
        self._runner = runner
        self._store = store
        self._on_progress = on_progress
        self._sizes = runner.suite.config.batch_sizes
        self._drafters = {
            method.name: forks(method.drafter, max(self._sizes))
            for method in runner.methods
            if method.drafter is not None
        }
        self._methods = [method for method in runner.methods if method.name in self._drafters]

    @property
    def total(self) -> int:
        """Batches of the whole run."""
        return sum(len(self._sizes) * len(self._methods) for _ in self.groups())

    def run(self) -> None:
        """Do what is missing."""
        warm: set[tuple[str, int, str]] = set()
        for group in self.groups():
            for place, (method, size) in enumerate(self._shuffled(group)):
                if self._key(group, method, size) in self._store.done:
                    continue
                prompts, settings = self._inputs(group, method)
                drafters = self._drafters[method.name][:size]
                if (method.name, size, group.mode.name) not in warm:
                    warm.add((method.name, size, group.mode.name))
                    short = [replace(own, max_new_tokens=WARMUP_TOKENS) for own in settings]
                    decode_together(self._runner.target, drafters, prompts[:size], short[:size])
                generations = decode_together(self._runner.target, drafters, prompts, settings)
                self._write(group, method, size, place, list(zip(prompts, settings, generations, strict=True)))

    def groups(self) -> Iterator[Group]:
        """Yield all groups: prompts by prompts, then mode, turn, repeat."""
        suite = self._runner.suite
        for number, prompts in enumerate(divide(suite.prompts, max(self._sizes))):
            for mode in suite.config.modes:
                for turn in range(max(len(prompt.turns) for prompt in prompts)):
                    here = tuple(prompt for prompt in prompts if len(prompt.turns) > turn)
                    for repeat in range(suite.config.repeats):
                        yield Group(number, here, mode, turn, repeat)

    def _inputs(self, group: Group, method: Method) -> tuple[list[Sequence[int]], list[DecodeSettings]]:
        blocks = [Block(prompt, group.mode, group.turn, 0) for prompt in group.prompts]
        return [self._runner.encode(block) for block in blocks], [
            self._runner.settings(block, method) for block in blocks
        ]

    def _shuffled(self, group: Group) -> list[tuple[Method, int]]:
        seed = self._runner.suite.config.seed
        pairs = [(method, size) for size in self._sizes for method in self._methods]
        random.Random(f"{seed}/{group.number}/{group.mode.name}/{group.turn}/{group.repeat}").shuffle(pairs)
        return pairs

    def _key(self, group: Group, method: Method, size: int) -> BatchKey:
        names = (self._runner.suite.config.name, group.number, group.turn, method.name, group.mode.name)
        return (*names, group.mode.temperature, group.repeat, size)

    def _write(
        self,
        group: Group,
        method: Method,
        size: int,
        place: int,
        decoded: Sequence[tuple[Sequence[int], DecodeSettings, Generation]],
    ) -> None:
        runner, shape = self._runner, method.shape_in(group.mode.name)
        record = BatchRecord(
            run_id=runner.run_id,
            suite=runner.suite.config.name,
            group=group.number,
            turn=group.turn,
            repeat=group.repeat,
            order_in_block=place,
            batch_size=size,
            method=method.name,
            kind=method.kind,
            mode=group.mode.name,
            temperature=group.mode.temperature,
            rule=group.mode.rule,
            tree=Tree(**asdict(shape)) if shape else None,
            max_new_tokens=runner.suite.config.generation.max_new_tokens,
            answers=tuple(
                self._answer(prompt, group, *one) for prompt, one in zip(group.prompts, decoded, strict=True)
            ),
        )
        self._store.append(record)
        if self._on_progress is not None:
            text = f"{method.name} · {group.mode.name} · batches of {size}"
            self._on_progress(len(self._store.done), self.total, text)

    def _answer(
        self,
        prompt: Prompt,
        group: Group,
        tokens: Sequence[int],
        settings: DecodeSettings,
        generation: Generation,
    ) -> BatchAnswer:
        reference = self._runner.reference(Block(prompt, group.mode, group.turn, 0))
        verdict, divergence = compare(self._runner.target, tokens, reference, generation.token_ids, settings)
        return BatchAnswer(
            prompt_id=prompt.id,
            seed=settings.seed,
            stop_reason=generation.stop_reason,
            num_prompt_tokens=len(tokens),
            num_output_tokens=len(generation.token_ids),
            output_sha256=hash_tokens(generation.token_ids),
            prefill_s=generation.prefill_s,
            decode_s=generation.decode_s,
            steps=Steps.from_steps(generation.steps),
            num_sequences=tuple(step.num_sequences for step in generation.steps),
            divergence=divergence,
            lossless=verdict,
        )
