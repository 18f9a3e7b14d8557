"""The decode loop. There is one: plain decoding is the loop with trees that have no nodes, one prompt a batch of one.

A step: the drafter proposes a tree, the target scores it in one forward, a verification rule decides what is kept,
target and drafter commit it. Drafters never verify, commit or time anything; this file does, and nothing else does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from vsdbench.decoding.ending import Ending
from vsdbench.decoding.interfaces import (
    Drafted,
    Drafter,
    DraftsTogether,
    Generation,
    Request,
    StepRecord,
    TargetState,
    TokenTree,
    TreeShape,
    VerifyRule,
)
from vsdbench.decoding.sampling import KeyedNoise, SamplingParams
from vsdbench.decoding.tree import empty_tree
from vsdbench.decoding.verify import Case
from vsdbench.models.device import Mark, fetch, mark, seconds_between, synchronize
from vsdbench.models.together import Together

if TYPE_CHECKING:
    from torch import Tensor

    from vsdbench.models.state import SequenceState
    from vsdbench.models.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """How one answer is decoded.

    Attributes:
        max_new_tokens: Length limit of the answer.
        shape: Tree shape offered to the drafter.
        rule: Verification rule.
        sampling: Temperature and truncation.
        seed: Keys the coupled draws and seeds the generator of everything else that is random.
        eos_ids: Tokens that end the answer; None means the target's own, an empty set never ends early.
        room: Rows that caches are given at least, so that none grows when a longer answer comes.
    """

    max_new_tokens: int
    shape: TreeShape = field(default_factory=TreeShape)
    rule: VerifyRule = "greedy"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    eos_ids: frozenset[int] | None = None
    room: int = 0


class Autoregressive:
    """The drafter that drafts nothing: the same-engine baseline."""

    name = "autoregressive"

    def fork(self) -> Autoregressive:
        """Return this one: it has no state."""
        return self

    def begin(self, state: TargetState, max_length: int) -> None:
        """Nothing to prepare."""

    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Return the empty tree."""
        del shape, temperature, generator
        return empty_tree(state.next_logits.device)

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Nothing to learn."""


class _Lap(NamedTuple):
    """The moments of a step: its beginning, and the ends of drafting, scoring, deciding, and telling the drafters."""

    began: Mark
    drafted: Mark
    scored: Mark
    committed: Mark
    ended: Mark

    def seconds(self) -> tuple[float, float, float]:
        """Return seconds of drafting, verification and the rest."""
        drafting = seconds_between(self.began, self.drafted) + seconds_between(self.committed, self.ended)
        return drafting, seconds_between(self.drafted, self.scored), seconds_between(self.scored, self.committed)


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer on its way."""

    index: int
    state: SequenceState
    drafter: Drafter
    settings: DecodeSettings
    ending: Ending
    generator: torch.Generator
    noise: KeyedNoise
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stop: str | None = None
    steps: list[StepRecord] = field(default_factory=list)
    laps: list[_Lap] = field(default_factory=list)
    kept: list[Drafted] = field(default_factory=list)

    def case(self, tree: TokenTree, logits: Tensor) -> Case:
        """Return what is to be decided about a tree."""
        settings, position = self.settings, len(self.state.tokens)
        return Case(settings.rule, tree, logits, params=settings.sampling, noise=self.noise, position=position)

    def judge(self, case: Case, shown: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """Return the accepted path and the tokens to commit, cut at the end of the answer."""
        verdict = case.decide(shown, self.generator)
        drafts = shown[0].tolist()
        tokens = [*(drafts[node] for node in verdict.path), verdict.next_token]
        tokens = self.ending.cut(tokens, len(self.state.tokens))
        return verdict.path[: len(tokens)], tokens

    def note(self, tree: TokenTree, path: list[int], num_emitted: int, lap: _Lap, num_sequences: int) -> None:
        """Add a step, whose times are read when the answer is done: on a device they are not over yet."""
        depth = max(tree.depths, default=0)
        self.steps.append(StepRecord(len(tree), depth, len(path), num_emitted, 0.0, 0.0, 0.0, num_sequences))
        self.laps.append(lap)
        # References only, and not to draft_probs, which may be large; the counting waits until the answer is done.
        self.kept.append(Drafted(tree.parents, tree.log_probs, path, tree.has_probs, tree.draft_probs is not None))

    def generation(self) -> Generation:
        """Return the finished answer."""
        for step, lap in zip(self.steps, self.laps, strict=True):
            draft_s, verify_s, other_s = lap.seconds()
            self.decode_s += draft_s + verify_s + other_s
            step.draft_ms, step.verify_ms, step.other_ms = 1e3 * draft_s, 1e3 * verify_s, 1e3 * other_s
        return Generation(
            token_ids=self.state.tokens[len(self.state.prompt) :],
            stop_reason=str(self.stop),
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            steps=self.steps,
            drafted=self.kept,
        )


def decode(target: Target, drafter: Drafter, prompt: Sequence[int], settings: DecodeSettings) -> Generation:
    """Return the answer to a prompt with its per-step measurements.

    Args:
        target: The model whose distribution the answer has, whatever the drafter proposes.
        drafter: Proposes trees.
        prompt: Prompt token ids.
        settings: Length, tree shape, rule, sampling.

    Raises:
        ConfigError: The prompt is empty or longer than the target's context, or the target's logits are not numbers.
    """
    return decode_together(target, [drafter], [prompt], [settings])[0]


@torch.inference_mode()
def decode_together(
    target: Target,
    drafters: Sequence[Drafter],
    prompts: Sequence[Sequence[int]],
    settings: Sequence[DecodeSettings],
) -> list[Generation]:
    """Return the answers to some prompts, decoded as many at a time as there are drafters.

    A step is one target forward for all of them. An answer that ends gives its place to the next prompt that waits, and
    where none waits the batch gets smaller. An answer is the same whatever is decoded beside it, but where two tokens
    are as good as tied. A step's times are those of the whole step, in every answer that was part of it; what begins or
    finishes another answer is in none.

    Args:
        target: The model whose distribution the answers have.
        drafters: One for each place, with states of their own (``Drafter.fork``).
        prompts: Token ids of each prompt.
        settings: Of each prompt.

    Raises:
        ConfigError: A prompt is empty or longer than the target's context, the target decodes one at a time, or its
            logits are not numbers.
    """
    endings = [Ending.of(target, prompt, own) for prompt, own in zip(prompts, settings, strict=True)]
    capacity = max(
        max(ending.length + own.shape.budget + 1, own.room) for ending, own in zip(endings, settings, strict=True)
    )
    together = Together(target, len(drafters), capacity)
    waiting = list(zip(range(len(prompts)), prompts, settings, endings, strict=True))[::-1]
    free = list(drafters)[::-1]
    live: list[_Sequence] = []
    done: dict[int, Generation] = {}
    device = target.device
    now = mark(device)
    while waiting or live:
        # 0. Prefill what there is room for: the prompt through target and drafter, and the first token.
        while waiting and free:
            live.append(_begin(together, free.pop(), *waiting.pop()))
            live = _retire(live, together, free, done)
            now = mark(device)
        if not live:
            break
        # 1. Draft a tree under the last committed token of each.
        trees = _propose(live)
        drafted = mark(device)
        # 2. One target forward over all trees.
        outputs = together.forward_trees([sequence.state for sequence in live], trees)
        scored = mark(device)
        # 3. Decide what is kept, and cut it at the end of the answer. Here, and only here, a device is waited for.
        verdicts = _judge(
            live, [s.case(tree, output.logits) for s, tree, output in zip(live, trees, outputs, strict=True)]
        )
        # 4. Commit. A path that ran past the end was cut with its tokens, so the counts are of tokens that exist.
        kept = []
        for sequence, (path, tokens) in zip(live, verdicts, strict=True):
            kept.append(sequence.state.commit(path[: len(tokens) - 1], tokens))
            sequence.stop = sequence.ending.reason(len(sequence.state.tokens), tokens[-1])
        committed = mark(device)
        for sequence, (path, _), rows, output in zip(live, verdicts, kept, outputs, strict=True):
            if sequence.stop is None:
                sequence.drafter.commit(sequence.state, len(path), output.features.index_select(0, rows))
        lap = _Lap(now, drafted, scored, committed, mark(device))
        now = lap.ended
        for sequence, tree, (path, tokens) in zip(live, trees, verdicts, strict=True):
            sequence.note(tree, path, len(tokens), lap, len(live))
        others = _retire(live, together, free, done)
        if len(others) < len(live):
            now = mark(device)  # what it takes to finish an answer is in no step of the others
        live = others
    return [done[index] for index in range(len(prompts))]


def _retire(
    sequences: list[_Sequence], together: Together, free: list[Drafter], done: dict[int, Generation]
) -> list[_Sequence]:
    """Return those that go on; the others become answers, and their drafters and places are free."""
    for sequence in sequences:
        if sequence.stop is not None:
            done[sequence.index] = sequence.generation()
            together.leave(sequence.state)
            free.append(sequence.drafter)
    return [sequence for sequence in sequences if sequence.stop is None]


def _begin(  # noqa: PLR0917 - what waits, and where it goes
    together: Together,
    drafter: Drafter,
    index: int,
    prompt: Sequence[int],
    settings: DecodeSettings,
    ending: Ending,
) -> _Sequence:
    """Return a sequence with its first token."""
    device = together.target.device
    synchronize(device)
    started = time.perf_counter()
    state = together.prefill(prompt)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = KeyedNoise(settings.seed)
    state.noise = noise if settings.rule == "coupled" else None
    sequence = _Sequence(index, state, drafter, settings, ending, generator, noise)
    [(_, first)] = _judge([sequence], [sequence.case(empty_tree(device), state.next_logits[None])])
    state.tokens += first
    drafter.begin(state, together.capacity)
    synchronize(device)
    sequence.prefill_s = time.perf_counter() - started
    sequence.stop = ending.reason(len(state.tokens), first[-1])
    return sequence


def _judge(sequences: Sequence[_Sequence], cases: Sequence[Case]) -> list[tuple[list[int], list[int]]]:
    """Return accepted path and tokens to commit of each, with one transfer for all of them."""
    shown = iter(fetch([tensor for case in cases for tensor in case.asked]))
    return [
        sequence.judge(case, [next(shown) for _ in case.asked]) for sequence, case in zip(sequences, cases, strict=True)
    ]


def _propose(sequences: Sequence[_Sequence]) -> list[TokenTree]:
    """Return a tree each, from all drafters at once where they can."""
    drafters = [sequence.drafter for sequence in sequences]
    if len(drafters) > 1 and isinstance(drafters[0], DraftsTogether):
        requests = [Request(s.state, s.settings.shape, s.settings.sampling.temperature, s.generator) for s in sequences]
        return drafters[0].propose_together(drafters, requests)
    return [
        sequence.drafter.propose(
            sequence.state,
            sequence.settings.shape,
            temperature=sequence.settings.sampling.temperature,
            generator=sequence.generator,
        )
        for sequence in sequences
    ]
