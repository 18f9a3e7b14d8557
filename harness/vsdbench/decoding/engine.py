"""The decode loop. There is one: autoregressive decoding is the same loop with trees that have no nodes.

A step: the drafter proposes a tree, the target scores it in one forward, a verification rule decides what is kept,
target and drafter commit it. Drafters never verify, commit or time anything; this file does, and nothing else does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vsdbench.decoding.interfaces import (
    Drafted,
    Drafter,
    Generation,
    StepRecord,
    TargetState,
    TokenTree,
    TreeShape,
    Verdict,
    VerifyRule,
)
from vsdbench.decoding.sampling import SamplingParams
from vsdbench.decoding.tree import empty_tree
from vsdbench.decoding.verify import verify
from vsdbench.errors import ConfigError
from vsdbench.models.device import synchronize

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
    """

    max_new_tokens: int
    shape: TreeShape = field(default_factory=TreeShape)
    rule: VerifyRule = "greedy"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    eos_ids: frozenset[int] | None = None


class Autoregressive:
    """The drafter that drafts nothing: the same-engine baseline."""

    name = "autoregressive"

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


def end_of_answer(target: Target, prompt: Sequence[int], settings: DecodeSettings) -> int:
    """Return the length of prompt and answer together at which decoding stops, whatever the tokens are.

    Raises:
        ConfigError: Not one token of an answer fits.
    """
    if len(prompt) >= target.max_positions:
        raise ConfigError(
            f"The prompt has {len(prompt)} tokens and the target holds {target.max_positions}: shorten the prompt."
        )
    if settings.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {settings.max_new_tokens}: it must be at least 1.")
    return min(len(prompt) + settings.max_new_tokens, target.max_positions)


@torch.inference_mode()
def decode(target: Target, drafter: Drafter, prompt: Sequence[int], settings: DecodeSettings) -> Generation:
    """Return the answer to a prompt with its per-step measurements.

    Args:
        target: The model whose distribution the answer has, whatever the drafter proposes.
        drafter: Proposes trees.
        prompt: Prompt token ids.
        settings: Length, tree shape, rule, sampling.

    Raises:
        ConfigError: The prompt is empty or longer than the target's context.
    """
    device, params = target.device, settings.sampling
    eos_ids = target.eos_ids if settings.eos_ids is None else settings.eos_ids
    end = end_of_answer(target, prompt, settings)
    max_length = end + settings.shape.budget + 1
    generator = torch.Generator().manual_seed(settings.seed)

    # Prefill: the prompt through target and drafter, and the first token.
    synchronize(device)
    started = time.perf_counter()
    state = target.prefill(prompt, max_length)
    first = _verify(empty_tree(device), state.next_logits[None], state, settings, generator).next_token
    state.tokens.append(first)
    drafter.begin(state, max_length)
    synchronize(device)
    prefilled = now = time.perf_counter()

    steps: list[StepRecord] = []
    kept: list[Drafted] = []
    stop = _stop_reason(state.tokens, end, [first], eos_ids)
    while stop is None:
        # 1. Draft a tree under the last committed token.
        tree = drafter.propose(state, settings.shape, temperature=params.temperature, generator=generator)
        synchronize(device)
        drafted = time.perf_counter()
        # 2. One target forward over the whole tree.
        output = target.forward_tree(state, tree)
        synchronize(device)
        scored = time.perf_counter()
        # 3. Decide what is kept, and cut it at the end of the answer.
        verdict = _verify(tree, output.logits, state, settings, generator)
        drafts = tree.tokens.tolist()
        tokens = [*(drafts[node] for node in verdict.path), verdict.next_token]
        tokens = _cut(tokens, end - len(state.tokens), eos_ids)
        # 4. Commit. A path that ran past the end is cut with its tokens, so the counts are of tokens that exist.
        path = verdict.path[: len(tokens)]
        state.commit(path[: len(tokens) - 1], tokens)
        stop = _stop_reason(state.tokens, end, tokens, eos_ids)
        committed = time.perf_counter()
        if stop is None:
            drafter.commit(state, len(path), output.features[[0, *(node + 1 for node in path)]])
        synchronize(device)
        ended = time.perf_counter()
        steps.append(
            StepRecord(
                num_nodes=len(tree),
                depth=max(tree.depths, default=0),
                num_accepted=len(path),
                num_emitted=len(tokens),
                draft_ms=1e3 * (drafted - now + ended - committed),
                verify_ms=1e3 * (scored - drafted),
                other_ms=1e3 * (committed - scored),
            )
        )
        # References only, and not to draft_probs, which may be large; the counting waits until the answer is done.
        kept.append(Drafted(tree.parents, tree.log_probs, path, tree.has_probs, tree.draft_probs is not None))
        now = ended
    return Generation(
        token_ids=state.tokens[len(prompt) :],
        stop_reason="context" if stop == "length" and end < len(prompt) + settings.max_new_tokens else stop,
        prefill_s=prefilled - started,
        decode_s=now - prefilled,
        steps=steps,
        drafted=kept,
    )


def _verify(
    tree: TokenTree, logits: Tensor, state: SequenceState, settings: DecodeSettings, generator: torch.Generator
) -> Verdict:
    return verify(
        settings.rule,
        tree,
        logits,
        params=settings.sampling,
        seed=settings.seed,
        position=len(state.tokens),
        generator=generator,
    )


def _cut(tokens: list[int], room: int, eos_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to the first end-of-answer token (included) and the length limit.

    >>> _cut([5, 6, 2, 7], room=9, eos_ids=frozenset({2}))
    [5, 6, 2]
    >>> _cut([5, 6, 2, 7], room=2, eos_ids=frozenset({2}))
    [5, 6]
    """
    tokens = tokens[:room]
    for index, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: index + 1]
    return tokens


def _stop_reason(tokens: list[int], end: int, new: list[int], eos_ids: frozenset[int]) -> str | None:
    if new[-1] in eos_ids:
        return "eos"
    return "length" if len(tokens) >= end else None
