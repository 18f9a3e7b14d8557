"""Prompt lookup: the text so far proposes what followed the last time its ending occurred. Nothing is trained.

Source: prompt lookup decoding (A. Saxena, 2023), extended to trees: several earlier occurrences give several
continuations, merged into one tree. Deterministic, so every verification rule applies.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsdbench.decoding.interfaces import TargetState, TokenTree, TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.device import send_numbers

_LOOKED_AT = 256
"""Occurrences of one ending that are looked at, so that a step in a long text costs no more than in a short one."""


class NgramDrafter:
    """Proposes the continuations of earlier occurrences of the current ending, longest match and latest first.

    Args:
        max_ngram: Longest ending that is looked up, in tokens.
        min_ngram: Shortest.
    """

    name = "ngram"

    def __init__(self, max_ngram: int = 4, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(f"ngram needs 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}.")
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram

    def fork(self) -> NgramDrafter:
        """Return another one with an index of its own."""
        return NgramDrafter(self.max_ngram, self.min_ngram)

    def begin(self, state: TargetState, max_length: int) -> None:
        """Index the prompt."""
        del max_length
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._indexed = 0
        self._index(state.tokens)

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Index the tokens that were just committed."""
        del num_accepted, features
        self._index(state.tokens)

    def _index(self, tokens: list[int]) -> None:
        """Remember, for every ending of every position but the last, where its continuation starts."""
        for end in range(self._indexed + 1, len(tokens)):
            for size in range(self.min_ngram, min(self.max_ngram, end) + 1):
                self._ends[tuple(tokens[end - size : end])].append(end)
        self._indexed = max(self._indexed, len(tokens) - 1)

    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Merge continuations into a tree until the budget is spent (one continuation for a chain)."""
        del temperature, generator
        tokens = state.tokens
        limit = 1 if shape.kind == "chain" else shape.top_k
        children: dict[tuple[int, int], int] = {}
        found: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        taken = 0
        for start in self._matches(tokens):
            if taken == limit or len(found) == shape.budget:
                break
            before = len(found)
            parent = -1
            for depth, token in enumerate(tokens[start : start + shape.depth], start=1):
                node = children.get((parent, token))
                if node is None:
                    if len(found) == shape.budget:
                        break
                    node = len(found)
                    children[parent, token] = node
                    found.append(token)
                    parents.append(parent)
                    depths.append(depth)
                parent = node
            taken += len(found) > before
        device = state.next_logits.device
        nodes = send_numbers(found, device)
        return TokenTree(nodes, parents, depths, torch.zeros(len(found), device=device), has_probs=False)

    def _matches(self, tokens: list[int]) -> Iterator[int]:
        """Yield where continuations start: longer endings first, later occurrences first, not more than some of each.

        A short ending may have occurred a thousand times in a long text, and most often with the same continuation.
        """
        for size in range(min(self.max_ngram, len(tokens)), self.min_ngram - 1, -1):
            yield from itertools.islice(reversed(self._ends.get(tuple(tokens[-size:]), [])), _LOOKED_AT)


def build(target: object, *, checkpoint: Path | None, options: dict[str, Any]) -> NgramDrafter:
    """Return the drafter for a suite entry; ``options`` are ``max_ngram`` and ``min_ngram``.

    Raises:
        ConfigError: A checkpoint, an unknown option, or a value that is not a fitting whole number.
    """
    del target
    if checkpoint is not None:
        raise ConfigError(f"ngram has nothing to load: remove checkpoint '{checkpoint}'.")
    unknown = set(options) - {"max_ngram", "min_ngram"}
    if unknown:
        raise ConfigError(f"ngram has no option '{min(unknown)}': it takes max_ngram and min_ngram.")
    for name, value in options.items():
        if type(value) is not int:
            raise ConfigError(f"ngram's option {name} is {value!r}: it must be a whole number of tokens.")
    return NgramDrafter(**options)
