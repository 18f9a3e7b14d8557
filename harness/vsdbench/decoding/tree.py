"""Growing draft trees: one piece of code for every drafter that scores tokens level by level.

A drafter supplies a ``LevelScorer``: log-probabilities of the root's children, then of the children of a whole level
at a time. This module decides which nodes exist. Two ways: a *fixed topology* (``chain``, ``static``, ``sampled``),
made once a shape, and EAGLE-2's *dynamic* growth (arXiv 2406.16858), which keeps the nodes with the largest product of
draft probabilities along their path.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from vsdbench.decoding.interfaces import TokenTree, TreeShape


class LevelScorer(Protocol):
    """What a drafter must be able to compute while a tree grows.

    Every token passed to ``level`` takes the next *slot* (0, 1, 2, … in the order of arrival over the whole growth);
    a parent slot of -1 is the root. Vd is the drafter's own vocabulary.
    """

    vocab_size: int
    """V, the target's vocabulary."""

    def root(self) -> Tensor:
        """Return ``[Vd]`` float32 log-probabilities of the root's children."""

    def level(self, tokens: Tensor, parent_slots: Sequence[int], depth: int) -> Tensor:
        """Return ``[M, Vd]`` float32 log-probabilities of the children of M nodes.

        Args:
            tokens: ``[M]`` int64 target ids of the nodes.
            parent_slots: Length M; the slots of their parents.
            depth: Depth of these nodes (1 for the root's children).
        """

    def to_target(self, ids: Tensor) -> Tensor:
        """Map draft-vocabulary ids to target ids, any shape."""


def empty_tree(device: torch.device) -> TokenTree:
    """Return the tree without draft tokens: plain autoregressive decoding."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return TokenTree(tokens=none, parents=(), depths=(), log_probs=none.float())


def any_chain(num_nodes: int, device: torch.device) -> TokenTree:
    """Return a chain of any tokens: what a forward over so many costs does not depend on what they are.

    >>> any_chain(2, torch.device("cpu")).parents
    range(-1, 1)
    """
    if num_nodes == 0:
        return empty_tree(device)
    tokens = torch.ones(num_nodes, dtype=torch.int64, device=device)
    return TokenTree(tokens, range(-1, num_nodes - 1), range(1, num_nodes + 1), tokens.float())


def grow(scorer: LevelScorer, shape: TreeShape, *, temperature: float, generator: torch.Generator) -> TokenTree:
    """Return a tree of at most ``shape.budget`` nodes proposed by ``scorer``.

    A node has no more children than the drafter's vocabulary has tokens, whatever ``shape.top_k`` says.

    Args:
        scorer: The drafter's scoring of one level at a time.
        shape: What may be proposed.
        temperature: Temperature of decoding; sampled children are drawn at it (at 1 when decoding is greedy).
        generator: Source of the draws of a ``sampled`` shape; the others never touch it.
    """
    return grow_together(
        [growth(scorer, shape, temperature=temperature, generator=generator)],
        lambda levels: [scorer.level(*level) for level in levels.values()],
    )[0]


class Level(NamedTuple):
    """What ``LevelScorer.level`` is asked for, as one value."""

    tokens: Tensor
    parent_slots: Sequence[int]
    depth: int


Growing: TypeAlias = Generator[Level, Tensor, TokenTree]
"""A tree that grows: yields the level to be scored next, is sent ``[M, Vd]`` log-probabilities, returns the tree."""


def grow_together(growths: Sequence[Growing], score: Callable[[dict[int, Level]], Sequence[Tensor]]) -> list[TokenTree]:
    """Return the trees of several growths, which go on level by level in step.

    Args:
        growths: One a tree.
        score: Scores the levels of those that still grow, by their index, in order.
    """
    trees: dict[int, TokenTree] = {}
    levels: dict[int, Level] = {}

    def advance(index: int, scored: Tensor | None) -> None:
        try:
            levels[index] = growths[index].send(scored)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as grown:
            trees[index] = grown.value

    for index in range(len(growths)):
        advance(index, None)
    while levels:
        asked, scored = list(levels), score(levels)
        levels = {}
        for index, log_probs in zip(asked, scored, strict=True):
            advance(index, log_probs)
    return [trees[index] for index in range(len(growths))]


def growth(scorer: LevelScorer, shape: TreeShape, *, temperature: float, generator: torch.Generator) -> Growing:
    """Return the growth of a tree; arguments as those of ``grow``, of ``scorer`` all but ``level`` is used."""
    root = scorer.root()
    if shape.budget < 1 or shape.depth < 1:
        return _nothing(root)
    if root.shape[-1] < shape.top_k:
        shape = replace(shape, top_k=root.shape[-1])
    if shape.kind == "dynamic":
        return _grow_dynamic(scorer, root, shape)
    walk = _TopologyWalk(root, fixed_topology(shape))
    if shape.kind == "sampled":
        return _grow_sampled(scorer, walk, temperature if temperature > 0 else 1.0, generator)
    return _grow_ranked(scorer, walk)


def _nothing(root: Tensor) -> Growing:
    """Grow no node."""
    yield from ()
    return empty_tree(root.device)


@dataclass(frozen=True, slots=True)
class Topology:
    """A tree whose structure is known before any token is: node i is its parent's child of rank ``ranks[i]``.

    Nodes stand level by level, and the children of one parent stand by rank, so the slot order of ``LevelScorer`` is
    the node order restricted to inner nodes.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    """Node indices of each level, depth 1 first."""
    num_children: tuple[int, ...]
    """Of each row: index 0 is the root."""


# The chance that the target takes the drafter's child of rank r, as measured on one-layer drafters: about half for the
# first, and a geometric rest. It only decides which fixed shape is built for a budget; nothing is reported from it.
_RANK_ACCEPTANCE = (0.55, 0.15, 0.07, 0.04, 0.03, 0.02, 0.015, 0.012, 0.01, 0.008)


@functools.lru_cache(maxsize=64)
def fixed_topology(shape: TreeShape) -> Topology:
    """Return the best fixed topology for a shape: greedily, the node that is most likely to be reached comes next.

    >>> fixed_topology(TreeShape(kind="chain", budget=3, depth=3, top_k=1)).parents
    (-1, 0, 1)
    >>> fixed_topology(TreeShape(kind="static", budget=3, depth=1, top_k=2)).parents
    (-1, -1)
    """
    width = 1 if shape.kind == "chain" else min(shape.top_k, len(_RANK_ACCEPTANCE))
    # Heap of candidates: (-reach probability, insertion order, parent's key, rank, depth)
    chosen: list[tuple[int, int, int]] = []
    heap: list[tuple[float, int, int, int, int]] = [(-_RANK_ACCEPTANCE[0], 0, -1, 0, 1)]
    order = 1
    reach = {-1: 1.0}
    while heap and len(chosen) < shape.budget:
        negative, _, parent, rank, depth = heapq.heappop(heap)
        key = len(chosen)
        chosen.append((parent, rank, depth))
        reach[key] = -negative
        if rank + 1 < width:
            heapq.heappush(heap, (-reach[parent] * _RANK_ACCEPTANCE[rank + 1], order, parent, rank + 1, depth))
        if depth < shape.depth:
            heapq.heappush(heap, (negative * _RANK_ACCEPTANCE[0], order + 1, key, 0, depth + 1))
        order += 2
    # Renumber level by level, children of one parent together and by rank.
    new_index: dict[int, int] = {-1: -1}
    parents: list[int] = []
    ranks: list[int] = []
    depths: list[int] = []
    levels: list[tuple[int, ...]] = []
    for depth in range(1, shape.depth + 1):
        level = [k for k, node in enumerate(chosen) if node[2] == depth]
        level.sort(key=lambda k: (new_index[chosen[k][0]], chosen[k][1]))
        for k in level:
            new_index[k] = len(parents)
            parents.append(new_index[chosen[k][0]])
            ranks.append(chosen[k][1])
            depths.append(depth)
        if level:
            levels.append(tuple(new_index[k] for k in level))
    children = [0] * (len(parents) + 1)
    for parent in parents:
        children[parent + 1] += 1
    return Topology(tuple(parents), tuple(ranks), tuple(depths), tuple(levels), tuple(children))


def _grow_ranked(scorer: LevelScorer, walk: _TopologyWalk) -> Growing:
    """Fill a topology with the top-ranked children."""
    for level in walk.levels():
        log_probs = walk.root if level is None else (yield level)
        width = max(walk.topology.num_children[row] for row in walk.rows)
        top = log_probs.topk(width, dim=-1)
        walk.place(scorer.to_target(top.indices), top.values)
    return walk.tree()


def _grow_sampled(scorer: LevelScorer, walk: _TopologyWalk, temperature: float, generator: torch.Generator) -> Growing:
    """Fill a topology with children drawn without replacement, in the order drawn (Gumbel top-k, arXiv 1903.06059)."""
    topology = walk.topology
    draft_probs: Tensor | None = None
    for level in walk.levels():
        log_probs = walk.root if level is None else (yield level)
        tempered = torch.log_softmax(log_probs / temperature, dim=-1)
        width = max(topology.num_children[row] for row in walk.rows)
        uniform = torch.rand(tempered.shape, generator=generator, device=generator.device).to(tempered.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 2**-24)))
        drawn = (tempered + gumbel).topk(width, dim=-1).indices
        walk.place(scorer.to_target(drawn), tempered.gather(-1, drawn))
        if draft_probs is None:
            draft_probs = tempered.new_zeros(len(topology.parents) + 1, scorer.vocab_size)
        ids = scorer.to_target(torch.arange(tempered.shape[-1], device=tempered.device))
        draft_probs[torch.tensor(walk.rows, device=tempered.device)[:, None], ids] = tempered.exp()
    return walk.tree(draft_probs)


class _TopologyWalk:
    """Walks over the levels of a fixed topology: says which are to be scored, takes the tokens.

    Attributes:
        root: ``[1, Vd]`` log-probabilities of the root's children.
        topology: The topology.
        rows: The R rows whose children come next.
    """

    def __init__(self, root: Tensor, topology: Topology) -> None:
        self.root = root[None]
        self.topology = topology
        self.rows = [0]
        self._slots: dict[int, int] = {-1: -1}
        self._tokens: list[Tensor] = []
        self._log_probs: list[Tensor] = []

    def levels(self) -> Iterator[Level | None]:
        """Yield None for the root, then the rows that have children, level by level; ``place`` comes in between."""
        topology = self.topology
        for done in range(len(topology.levels)):
            if done == 0:
                yield None
                continue
            level = topology.levels[done - 1]
            inner = [i for i, node in enumerate(level) if topology.num_children[node + 1]]
            parents = [self._slots[topology.parents[level[i]]] for i in inner]
            for i in inner:
                self._slots[level[i]] = len(self._slots) - 1
            self.rows = [level[i] + 1 for i in inner]
            yield Level(self._tokens[-1][inner], parents, done)

    def place(self, tokens: Tensor, log_probs: Tensor) -> None:
        """Take ``[R, K]`` target ids and log-probabilities, by rank, for the rows just yielded."""
        topology = self.topology
        level = topology.levels[len(self._tokens)]
        line = {row: i for i, row in enumerate(self.rows)}
        rows = [line[topology.parents[node] + 1] for node in level]
        ranks = [topology.ranks[node] for node in level]
        self._tokens.append(tokens[rows, ranks])
        self._log_probs.append(log_probs[rows, ranks])

    def tree(self, draft_probs: Tensor | None = None) -> TokenTree:
        topology = self.topology
        return TokenTree(
            torch.cat(self._tokens), topology.parents, topology.depths, torch.cat(self._log_probs), draft_probs
        )


def _grow_dynamic(scorer: LevelScorer, root: Tensor, shape: TreeShape) -> Growing:
    """Grow by cumulative log-probability, then keep the ``budget`` best nodes of all that were scored.

    A node's cumulative log-probability is at most its parent's, so the kept set is always a tree. Growing stops before
    ``depth`` when no descendant of the frontier can enter the kept set any more: the result is the same, cheaper.
    """
    width = shape.top_k
    top = root.topk(width)
    tokens, cumulative, own = [scorer.to_target(top.indices)], [top.values], [top.values]
    parents: list[int] = [-1] * width
    depths: list[int] = [1] * width
    frontier = list(range(width))
    frontier_tokens = tokens[0]
    frontier_scores = top.values
    slots: dict[int, int] = {-1: -1}
    for depth in range(1, shape.depth):
        scored = yield Level(frontier_tokens, [slots[parents[node]] for node in frontier], depth)
        for node in frontier:
            slots[node] = len(slots) - 1
        top = scored.topk(width, dim=-1)
        ids = scorer.to_target(top.indices).flatten()
        sums = (frontier_scores[:, None] + top.values).flatten()
        first = len(parents)
        parents += [node for node in frontier for _ in range(width)]
        depths += [depth + 1] * len(ids)
        tokens.append(ids)
        cumulative.append(sums)
        own.append(top.values.flatten())
        best = sums.topk(width)
        frontier = [first + i for i in best.indices.tolist()]
        frontier_tokens, frontier_scores = ids[best.indices], best.values
        if depth + 1 < shape.depth and len(parents) >= shape.budget:
            threshold = torch.cat(cumulative).topk(shape.budget).values[-1]
            if bool(frontier_scores[0] < threshold):
                break
    # Stable descending sort: at equal scores a parent, which has the smaller index, stays before its child.
    scores = torch.cat(cumulative)
    kept = sorted(scores.sort(descending=True, stable=True).indices[: shape.budget].tolist())
    new_index = {-1: -1} | {node: i for i, node in enumerate(kept)}
    return TokenTree(
        torch.cat(tokens)[kept],
        [new_index[parents[node]] for node in kept],
        [depths[node] for node in kept],
        torch.cat(own)[kept],
    )


def ancestor_mask(parents: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return ``[N + 1, N + 1]`` bool: row r may attend to row c if c is r itself, its ancestor, or the root.

    >>> ancestor_mask([-1, 0, -1]).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """
    lines = [[0] * (len(parents) + 1) for _ in range(len(parents) + 1)]
    lines[0][0] = 1
    for node, parent in enumerate(parents):
        lines[node + 1] = list(lines[parent + 1])
        lines[node + 1][node + 1] = 1
    return torch.tensor(lines, dtype=torch.bool, device=device)
