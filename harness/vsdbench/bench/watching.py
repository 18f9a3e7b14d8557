"""What smaller trees would have drafted, sent and kept, read off wide ones that were proposed and not sent."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vsdbench.decoding.interfaces import TokenTree, TreeShape
from vsdbench.decoding.tree import empty_tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vsdbench.decoding.interfaces import Drafter, TargetState


class Taken(NamedTuple):
    """What one step would have been with a smaller tree: levels drafted, nodes sent, tokens kept."""

    levels: int
    num_nodes: int
    num_kept: int


class _Level(NamedTuple):
    """A level as a smaller tree grows it: its nodes, and those that are expanded, the most probable first."""

    nodes: list[int]
    frontier: list[int]


class Proposal:
    """A wide tree of N nodes, from which the smaller dynamic trees of the same drafter can be read.

    Args:
        tree: As proposed.
    """

    def __init__(self, tree: TokenTree) -> None:
        self._scores = list[float]()  # log-probability of the path
        self._ranks = list[int]()  # among siblings
        self._children: dict[int, dict[int, int]] = defaultdict(dict)  # by parent and token
        self._parents = list(tree.parents)
        self._levels: list[list[int]] = [[] for _ in range(max(tree.depths, default=0))]
        for node, (token, log) in enumerate(zip(tree.tokens.tolist(), tree.log_probs.tolist(), strict=True)):
            parent = self._parents[node]
            self._scores.append(log + (self._scores[parent] if parent >= 0 else 0.0))
            self._ranks.append(len(self._children[parent]))
            self._children[parent][token] = node
            self._levels[tree.depths[node] - 1].append(node)
        self._grown: dict[int, list[_Level]] = {}
        self._ordered: dict[tuple[int, int], list[int]] = {}

    def levels(self, top_k: int) -> list[_Level]:
        """Return all levels that a tree with so many children a node grows: it expands as many of every level."""
        if top_k not in self._grown:
            frontier, grown = [-1], list[_Level]()
            for level in self._levels:
                expanded = set(frontier)
                nodes = [n for n in level if self._parents[n] in expanded and self._ranks[n] < top_k]
                frontier = sorted(nodes, key=lambda n: -self._scores[n])[:top_k]
                grown.append(_Level(nodes, frontier))
            self._grown[top_k] = grown
        return self._grown[top_k]

    def _best(self, levels: int, top_k: int) -> list[int]:
        """Return the nodes of the first levels, the most probable first."""
        if (levels, top_k) not in self._ordered:
            nodes = [node for level in self.levels(top_k)[:levels] for node in level.nodes]
            self._ordered[levels, top_k] = sorted(nodes, key=lambda n: -self._scores[n])
        return self._ordered[levels, top_k]

    def take(self, shape: TreeShape, following: Sequence[int]) -> Taken:
        """Return what a step with this shape is, before the ``following`` tokens; see ``dynamic.grow_dynamic``."""
        least = math.log(shape.min_node_prob) if shape.min_node_prob else -math.inf
        levels = 1
        for level in self.levels(shape.top_k)[: shape.depth - 1]:
            best = self._best(levels, shape.top_k)
            least_kept = self._scores[best[shape.budget - 1]] if len(best) >= shape.budget else -math.inf
            if not level.frontier or self._scores[level.frontier[0]] < max(least, least_kept):
                break
            if sum(math.exp(self._scores[node]) for node in level.frontier) < shape.min_level_prob:
                break
            levels += 1
        best = self._best(levels, shape.top_k)[: shape.budget]
        sent = {node for node in best if self._scores[node] >= least}
        at, length = -1, 0
        for token in following[:levels]:
            at = self._children[at].get(token, -2)
            if at not in sent:
                break
            length += 1
        return Taken(levels, len(sent), length)


class Watching:
    """Lets a drafter propose a tree at every position, and sends nothing: decoding stays plain.

    Args:
        drafter: The drafter.
        shape: Of its trees.
        keep: Whether to keep them.
    """

    def __init__(self, drafter: Drafter, shape: TreeShape, *, keep: bool = True) -> None:
        self.name = drafter.name
        self.proposals: list[Proposal] = []
        self._drafter, self._shape, self._keep = drafter, shape, keep

    def begin(self, state: TargetState, max_length: int) -> None:
        """Begin an answer."""
        self.proposals = []
        self._drafter.begin(state, max_length)

    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Return the empty tree, and keep what the drafter would have sent."""
        del shape
        tree = self._drafter.propose(state, self._shape, temperature=temperature, generator=generator)
        if self._keep:
            self.proposals.append(Proposal(tree))
        return empty_tree(state.next_logits.device)

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Tell the drafter of the one token that was decoded."""
        self._drafter.commit(state, num_accepted, features)


@dataclass(frozen=True, slots=True)
class Answer:
    """A plainly decoded answer: its tokens, and the wide tree proposed after each but the last."""

    tokens: list[int]
    proposals: list[Proposal]

    def walk(self, shape: TreeShape) -> list[Taken]:
        """Return the steps, had it been decoded with this shape."""
        steps = list[Taken]()
        at = 0
        while at < len(self.proposals):
            steps.append(self.proposals[at].take(shape, self.tokens[at + 1 :]))
            at += 1 + steps[-1].num_kept
        return steps
