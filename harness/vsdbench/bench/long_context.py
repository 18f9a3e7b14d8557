"""What a step costs behind a short and behind a long context: plain decoding, a tree, and drafters.

A cached step reads the keys and values of its context once, so its cost may grow by that and by nothing else: linearly,
and slowly where the weights are most of what a step reads. All contexts take turns, so ratios hold where times do not.

The longest context is read once; the shorter ones are its beginnings, whose keys and values are the same.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vsdbench.bench.estimate import cache_bytes
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.tree import any_chain
from vsdbench.errors import ConfigError
from vsdbench.models.device import seconds_of
from vsdbench.models.state import SequenceState

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Drafter
    from vsdbench.models.target import Target

WARM_UP = 2
PASSES = 2
"""Drafters draft at every context in blocks, since only one sequence can be begun at a time; so often over."""


@torch.inference_mode()
def measure_contexts(
    target: Target,
    tokens: Sequence[int],
    contexts: Sequence[int],
    *,
    rows: int = 8,
    drafters: Mapping[str, Drafter] | None = None,
    shape: TreeShape | None = None,
    repeats: int = 9,
) -> dict[str, Any]:
    """Return ``lines``, one a context, and ``cache``: its ``rows``, their ``bytes``, and what these were computed as.

    A line has ``context``, median ``plain_ms``, ``tree_ms`` and ``draft_ms`` by drafter, and the three's ratios to the
    first context, the shortest: ``plain_ratio``, ``tree_ratio``, ``draft_ratio``.

    Args:
        target: The target.
        tokens: A text of at least as many tokens as the longest context.
        contexts: Numbers of tokens before the step, in increasing order.
        rows: Root and draft tokens of the tree step, a chain.
        drafters: By name; a step of theirs is a proposal and the commitment of one token.
        shape: What they propose.
        repeats: Turns that count.

    Raises:
        ConfigError: The contexts are not increasing, or the text or the target's positions end before the last.
    """
    shape = shape or TreeShape(budget=rows - 1)
    spare = rows_behind(shape.budget, rows=rows, repeats=repeats)
    _check(target, len(tokens), contexts, spare)
    longest = target.prefill(list(tokens[: contexts[-1]]), contexts[-1] + spare)
    states = [_beginning(longest, tokens[:count]) for count in contexts]
    steps = {"plain": any_chain(0, target.device), "tree": any_chain(rows - 1, target.device)}
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in steps for count in contexts}
    for repeat in range(repeats + WARM_UP):
        for state, count in zip(states, contexts, strict=True):
            for name, tree in steps.items():
                state.cache.length = count
                elapsed = seconds_of(functools.partial(target.forward_tree, state, tree), target.device)
                if repeat >= WARM_UP:
                    times[name, count].append(1e3 * elapsed)
    drafted = {
        name: _draft_ms(target, drafter, states, contexts, shape, repeats) for name, drafter in (drafters or {}).items()
    }
    cache = longest.cache
    return {
        "rows": rows,
        "lines": [_line(times, drafted, contexts[0], count) for count in contexts],
        "cache": {
            "rows": cache.capacity,
            "bytes": cache.num_bytes,
            "computed_bytes": cache_bytes(target, cache.capacity),
        },
    }


def rows_behind(budget: int, *, rows: int, repeats: int) -> int:
    """Return the positions that must stay free behind a context for its steps; arguments as for ``measure_contexts``.

    >>> rows_behind(7, rows=8, repeats=9)
    19
    """
    return max(rows, budget + 1) + repeats + WARM_UP


def _check(target: Target, num_tokens: int, contexts: Sequence[int], spare: int) -> None:
    if not contexts or list(contexts) != sorted(set(contexts)) or contexts[0] < 2:
        raise ConfigError(f"contexts are {list(contexts)}: they must be at least 2 tokens long, the shortest first.")
    if num_tokens < contexts[-1]:
        raise ConfigError(f"The text has {num_tokens} tokens: a context of {contexts[-1]} needs a longer one.")
    if contexts[-1] + spare > target.max_positions:
        raise ConfigError(
            f"'{target.name}' has {target.max_positions} positions: a context of {contexts[-1]} tokens leaves no room "
            f"for the {spare} of the steps behind it."
        )


def _beginning(longest: SequenceState, tokens: Sequence[int]) -> SequenceState:
    """Return the state after the first tokens of a longer sequence, in the same cache."""
    state = SequenceState(list(tokens), longest.cache)
    state.features, state.next_logits = longest.features[: len(tokens)], longest.next_logits
    state.tokens.append(1)
    return state


def _draft_ms(  # noqa: PLR0917 - what measure_contexts has
    target: Target,
    drafter: Drafter,
    states: Sequence[SequenceState],
    contexts: Sequence[int],
    shape: TreeShape,
    repeats: int,
) -> dict[int, float]:
    """Return median milliseconds of a drafter's part of a step, by context; the cache is left as it was."""
    times: dict[int, list[float]] = {count: [] for count in contexts}
    generator = torch.Generator().manual_seed(0)
    for number in range(PASSES):
        order = list(zip(states, contexts, strict=True))
        for state, count in order if number % 2 == 0 else reversed(order):
            state.cache.length = count
            del state.tokens[count + 1 :]
            drafter.begin(state, count + shape.budget + 2 + repeats + WARM_UP)
            for repeat in range(repeats + WARM_UP):
                propose = functools.partial(drafter.propose, state, shape, temperature=0.0, generator=generator)
                elapsed = seconds_of(propose, target.device)
                features = target.forward_tree(state, any_chain(0, target.device)).features
                state.commit([], [state.prompt[repeat % count]])
                elapsed += seconds_of(functools.partial(drafter.commit, state, 0, features), target.device)
                if repeat >= WARM_UP:
                    times[count].append(1e3 * elapsed)
    return {count: statistics.median(found) for count, found in times.items()}


def _line(
    times: Mapping[tuple[str, int], Sequence[float]],
    drafted: Mapping[str, Mapping[int, float]],
    first: int,
    count: int,
) -> dict[str, Any]:
    medians = {key: statistics.median(found) for key, found in times.items()}
    return {
        "context": count,
        "plain_ms": medians["plain", count],
        "tree_ms": medians["tree", count],
        "draft_ms": {name: found[count] for name, found in drafted.items()},
        "plain_ratio": medians["plain", count] / medians["plain", first],
        "tree_ratio": medians["tree", count] / medians["tree", first],
        "draft_ratio": {name: found[count] / found[first] for name, found in drafted.items()},
    }
