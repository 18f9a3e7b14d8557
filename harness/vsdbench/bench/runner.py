"""The runner: decodes every prompt with every method, interleaved, and writes one record a decode.

Order is what makes times comparable: methods take turns within a prompt, in an order drawn anew for every block, so a
machine that slows down slows all of them. A block is one prompt x mode x turn x repeat. Records of a block's first
repeat wait until its reference output exists, because each carries its comparison with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from vsdbench.bench.conversation import check_length, encode_turn, longest_conversation
from vsdbench.bench.diagnostics import diagnose
from vsdbench.bench.exchange import Misled, exchanged_prompts
from vsdbench.bench.lossless import compare
from vsdbench.bench.methods import REFERENCE, Method, settings_of
from vsdbench.decoding.interfaces import Generation
from vsdbench.models.compiled import num_graphs
from vsdbench.models.device import dtype_name
from vsdbench.models.image_prompt import num_image_tokens
from vsdbench.store.records import Record, RecordKey, Steps, Tree, hash_tokens
from vsdbench.store.store import RunStore, load_outputs, load_records

if TYPE_CHECKING:
    from vsdbench.decoding.engine import DecodeSettings
    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.prompts import Prompt
    from vsdbench.suites.schema import Mode

WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Block:
    """Decodes that belong together: the same tokens to produce, by every method."""

    prompt: Prompt
    mode: Mode
    turn: int
    repeat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Told after every decode, for a display.

    Attributes:
        done: Decodes on disk, those of earlier, resumed runs included.
        total: Decodes of the whole run.
        record: The newest record.
    """

    done: int
    total: int
    record: Record


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A decode whose record is not written yet."""

    place: int
    method: Method
    settings: DecodeSettings
    generation: Generation


def _max_depth(method: Method) -> int | None:
    """Return the deepest tree that a method's drafter can propose; None: as deep as it is asked for."""
    depth: int | None = getattr(method.drafter, "max_depth", None)
    return depth


class Runner:
    """Runs a suite with its methods into a store; running again does only what is missing.

    Args:
        suite: Prompts and settings.
        target: The target model.
        methods: What is compared; the reference is among them.
        store: Open run.
        on_progress: Called after every record.
    """

    def __init__(
        self,
        suite: Suite,
        target: Target,
        methods: Sequence[Method],
        store: RunStore,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.suite = suite
        self.target = target
        self.methods = list(methods)
        self.store = store
        self._on_progress = on_progress
        self.run_id = str(store.manifest["run_id"])
        self._references = self._stored_references()
        is_control = any(isinstance(method.drafter, Misled) for method in methods)
        self._exchanged = exchanged_prompts(suite) if is_control else {}
        self.num_late_graphs = 0
        """Graphs that were compiled while times were taken; it should stay 0."""

    @property
    def total(self) -> int:
        """Decodes of the whole run."""
        return sum(len(self._methods_of(block)) for block in self.blocks())

    def run(self) -> None:
        """Do what is missing."""
        missing = [
            block
            for block in self.blocks()
            if any(self._key(block, method) not in self.store.done for method in self._methods_of(block))
        ]
        if missing:
            self._warm_up(missing[0].prompt)
        before = self._num_graphs()
        for block in missing:
            self._run_block(block)
            self.num_late_graphs = self._num_graphs() - before

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks: prompt by prompt, then mode, turn, repeat."""
        config = self.suite.config
        for prompt in self.suite.prompts:
            for mode in config.modes:
                for turn in range(len(prompt.turns)):
                    for repeat in range(config.repeats):
                        yield Block(prompt, mode, turn, repeat)

    # ---- one block ----

    def _run_block(self, block: Block) -> None:
        order = list(enumerate(self._shuffled(block)))
        todo = [(place, method) for place, method in order if self._key(block, method) not in self.store.done]
        prompt = self.encode(block)
        check_length(self.target, block.prompt, prompt, block.turn)
        waiting: list[_Decoded] = []
        for place, method in todo:
            settings = self.settings(block, method)
            if isinstance(method.drafter, Misled) and block.prompt.id in self._exchanged:
                method.drafter.show(self.encode(replace(block, prompt=self._exchanged[block.prompt.id])))
            generation = method.run(prompt, settings)
            if method.name == REFERENCE:
                self._references.setdefault(self._reference_key(block), generation.token_ids)
            waiting.append(_Decoded(place, method, settings, generation))
            if self._reference_key(block) in self._references:
                for done in waiting:
                    self._write(block, prompt, done)
                waiting.clear()

    def _write(self, block: Block, prompt: Sequence[int], done: _Decoded) -> None:
        method, settings, generation = done.method, done.settings, done.generation
        reference = self.reference(block)
        verdict, divergence = compare(self.target, prompt, reference, generation.token_ids, settings)
        if method.name == REFERENCE and verdict == "equal":
            verdict = "reference"
        config, sampling = self.suite.config, settings.sampling
        shape = method.shape_in(block.mode.name)
        record = Record(
            run_id=self.run_id,
            suite=config.name,
            suite_version=str(config.version),
            prompt_id=block.prompt.id,
            prompt_hash=block.prompt.hash,
            category=block.prompt.category,
            turn=block.turn,
            repeat=block.repeat,
            order_in_block=done.place,
            seed=settings.seed,
            method=method.name,
            kind=method.kind,
            objective=method.objective,
            target=self.target.name,
            target_fingerprint=self.target.fingerprint,
            drafter_fingerprint=method.drafter_fingerprint,
            dtype=dtype_name(self.target.dtype),
            attention=self.target.attention,
            template_hash=self.target.template_hash,
            mode=block.mode.name,
            temperature=sampling.temperature,
            sampling_top_k=sampling.top_k,
            top_p=sampling.top_p,
            rule=settings.rule,
            tree=Tree(**asdict(shape)) if shape else None,
            max_new_tokens=settings.max_new_tokens,
            stop_reason=generation.stop_reason,
            num_prompt_tokens=len(prompt),
            num_image_tokens=num_image_tokens(prompt),
            num_output_tokens=len(generation.token_ids),
            output_sha256=hash_tokens(generation.token_ids),
            prefill_s=generation.prefill_s,
            decode_s=generation.decode_s,
            steps=Steps.from_steps(generation.steps),
            diagnostics=diagnose(generation, shape, max_depth=_max_depth(method)) if shape else None,
            divergence=divergence,
            lossless=verdict,
        )
        self.store.append(record, generation.token_ids)
        if self._on_progress is not None:
            self._on_progress(Progress(done=len(self.store.done), total=self.total, record=record))

    # ---- what a block needs ----

    def settings(self, block: Block, method: Method) -> DecodeSettings:
        """Return how a method decodes a block."""
        shape = method.shape_in(block.mode.name)
        return settings_of(self.suite.config, block.mode, seed=self._seed(block), shape=shape)

    def _seed(self, block: Block) -> int:
        """Return the seed of a prompt's turn: the same for every method and repeat, different between prompts."""
        return random.Random(f"{self.suite.config.seed}/{block.prompt.hash}/{block.turn}").getrandbits(48)

    def _methods_of(self, block: Block) -> list[Method]:
        config = self.suite.config
        return [method for method in self.methods if block.repeat < config.repeats_of(method.name)]

    def _shuffled(self, block: Block) -> list[Method]:
        key = f"{self.suite.config.seed}/{block.prompt.id}/{block.mode.name}/{block.turn}/{block.repeat}"
        methods = self._methods_of(block)
        random.Random(key).shuffle(methods)
        return methods

    def encode(self, block: Block) -> Sequence[int]:
        """Return the prompt's tokens: the conversation so far, with the reference's answers to the earlier turns."""
        answers = []
        for turn in range(block.turn):
            tokens = self._references[self._reference_key(Block(block.prompt, block.mode, turn, 0))]
            answers.append(self.target.tokenizer.decode(tokens, skip_special_tokens=True))
        return encode_turn(self.target, block.prompt, self.suite.config.generation, answers)

    def reference(self, block: Block) -> list[int]:
        """Return the answer of plain decoding."""
        return self._references[self._reference_key(block)]

    def _key(self, block: Block, method: Method) -> RecordKey:
        mode = block.mode
        return (
            self.suite.config.name,
            block.prompt.id,
            block.turn,
            method.name,
            mode.name,
            mode.temperature,
            block.repeat,
        )

    def _reference_key(self, block: Block) -> tuple[str, int, str]:
        return (block.prompt.id, block.turn, block.mode.name)

    def _stored_references(self) -> dict[tuple[str, int, str], list[int]]:
        """Return the reference outputs of a resumed run."""
        outputs = load_outputs(self.store.directory)
        return {
            (record.prompt_id, record.turn, record.mode): outputs[record.output_sha256]
            for record in load_records(self.store.directory)
            if record.method == REFERENCE and record.repeat == 0
        }

    def _num_graphs(self) -> int:
        return num_graphs(self.target) + sum(method.graphs.count for method in self.methods if method.graphs)

    def _warm_up(self, prompt: Prompt) -> None:
        """Decode a few tokens with every method and mode, so that no first-call cost is inside a measurement."""
        # On CUDA a graph is of the whole cache, so the caches have their final sizes from the start.
        room = longest_conversation(self.target, self.suite) if self.suite.config.compile else 0
        for mode in self.suite.config.modes:
            block = Block(prompt, mode, 0, 0)
            tokens = self.encode(block)
            for method in self.methods:
                settings = self.settings(block, method)
                rows = room + settings.shape.budget + 1 if room else 0
                method.run(tokens, replace(settings, max_new_tokens=WARMUP_TOKENS, room=rows))
