"""Growing draft trees: one piece of code for every drafter that scores tokens level by level.

A drafter supplies a ``LevelScorer``: log-probabilities of the root's children, then of the children of a whole level
at a time. This module decides which nodes exist. Two ways: a *fixed topology* (``chain``, ``static``, ``sampled``),
made once a shape, and EAGLE-2's *dynamic* growth (arXiv 2406.16858), which keeps the nodes with the largest product of
draft probabilities along their path; ``coupled`` trees grow so too, by probabilities that know the numbers of the draw.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vsdbench.decoding.coupling import Foresight
from vsdbench.decoding.dynamic import grow_dynamic
from vsdbench.decoding.growing import Growing, Level, LevelScorer, grow_together
from vsdbench.decoding.interfaces import TargetState, TokenTree, TreeShape
from vsdbench.models.device import send, send_numbers


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


def grow(
    scorer: LevelScorer, shape: TreeShape, *, state: TargetState, temperature: float, generator: torch.Generator
) -> TokenTree:
    """Return a tree of at most ``shape.budget`` nodes proposed by ``scorer``.

    A node has no more children than the drafter's vocabulary has tokens, whatever ``shape.top_k`` says.

    Args:
        scorer: The drafter's scoring of one level at a time.
        shape: What may be proposed.
        state: The sequence; a ``coupled`` shape reads the numbers of its draws, the others never touch it.
        temperature: Temperature of decoding; sampled children are drawn at it (at 1 when decoding is greedy).
        generator: Source of the draws of a ``sampled`` shape; the others never touch it.
    """
    return grow_together(
        [growth(scorer, shape, state=state, temperature=temperature, generator=generator)],
        lambda levels: [scorer.level(*level) for level in levels.values()],
    )[0]


def growth(
    scorer: LevelScorer, shape: TreeShape, *, state: TargetState, temperature: float, generator: torch.Generator
) -> Growing:
    """Return the growth of a tree; arguments as those of ``grow``, of ``scorer`` all but ``level`` is used."""
    root = scorer.root()
    if shape.budget < 1 or shape.depth < 1:
        return _nothing(root)
    if root.shape[-1] < shape.top_k:
        shape = replace(shape, top_k=root.shape[-1])
    if shape.kind == "coupled" and state.noise is not None:
        ids = scorer.to_target(torch.arange(root.shape[-1], device=root.device))
        position, vocab_size = len(state.tokens), state.next_logits.shape[-1]
        foresight = Foresight(state.noise, position, ids, vocab_size, temperature)
        return foresight.growth(grow_dynamic(scorer, foresight.informed(root, 0), shape))
    if shape.kind in {"dynamic", "coupled"}:
        return grow_dynamic(scorer, root, shape)
    walk = _TopologyWalk(root, shape)
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


def widest_level(shape: TreeShape) -> int:
    """Return how many nodes of one level a drafter scores at most.

    >>> widest_level(TreeShape(kind="dynamic", budget=60, depth=7, top_k=10))
    10
    >>> widest_level(TreeShape(kind="static", budget=12, depth=2, top_k=4))
    4
    """
    if shape.kind in {"dynamic", "coupled"}:
        return shape.top_k
    topology = fixed_topology(shape)
    return max(sum(topology.num_children[node + 1] > 0 for node in level) for level in topology.levels)


def _grow_ranked(scorer: LevelScorer, walk: _TopologyWalk) -> Growing:
    """Fill a topology with the top-ranked children."""
    for level in walk.levels():
        log_probs = walk.root if level is None else (yield level)
        top = log_probs.topk(walk.at.width, dim=-1)
        walk.place(scorer.to_target(top.indices), top.values)
    return walk.tree()


def _grow_sampled(scorer: LevelScorer, walk: _TopologyWalk, temperature: float, generator: torch.Generator) -> Growing:
    """Fill a topology with children drawn without replacement, in the order drawn (Gumbel top-k, arXiv 1903.06059)."""
    draft_probs: Tensor | None = None
    for level in walk.levels():
        log_probs = walk.root if level is None else (yield level)
        tempered = torch.log_softmax(log_probs / temperature, dim=-1)
        uniform = torch.rand(tempered.shape, generator=generator, device=generator.device)
        uniform = send(uniform, tempered.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 2**-24)))
        drawn = (tempered + gumbel).topk(walk.at.width, dim=-1).indices
        walk.place(scorer.to_target(drawn), tempered.gather(-1, drawn))
        if draft_probs is None:
            draft_probs = tempered.new_zeros(len(walk.topology.parents) + 1, scorer.vocab_size)
        ids = scorer.to_target(torch.arange(tempered.shape[-1], device=tempered.device))
        draft_probs[walk.at.rows[:, None], ids] = tempered.exp()
    return walk.tree(draft_probs)


class _Places(NamedTuple):
    """What a walk over a fixed topology needs of one level, on the drafter's device.

    Attributes:
        rows: ``[R]`` rows whose children stand in the level; the root alone in the first.
        width: Children that the rows are asked for.
        picks: ``[M]`` where the level's nodes are among the ``R * width`` children by rank.
        inner: ``[R]`` of the nodes of the level before, those rows.
        parent_slots: ``[R]`` slots of their parents.
    """

    rows: Tensor
    width: int
    picks: Tensor
    inner: Tensor
    parent_slots: Tensor


@functools.lru_cache(maxsize=64)
def _places(shape: TreeShape, device: torch.device) -> list[_Places]:
    """Return the places of every level of a shape's fixed topology, which stay on the device."""
    topology = fixed_topology(shape)
    slots = {-1: -1}
    found = []
    for depth, level in enumerate(topology.levels):
        above = topology.levels[depth - 1] if depth else ()
        inner = [i for i, node in enumerate(above) if topology.num_children[node + 1]]
        parent_slots = [slots[topology.parents[above[i]]] for i in inner]
        for i in inner:
            slots[above[i]] = len(slots) - 1
        rows = [above[i] + 1 for i in inner] if depth else [0]
        width = max(topology.num_children[row] for row in rows)
        line = {row: i for i, row in enumerate(rows)}
        picks = [line[topology.parents[node] + 1] * width + topology.ranks[node] for node in level]
        there = [send_numbers(numbers, device) for numbers in (rows, picks, inner, parent_slots)]
        found.append(_Places(there[0], width, *there[1:]))
    return found


class _TopologyWalk:
    """Walks over the levels of a fixed topology: says which are to be scored, takes the tokens.

    Attributes:
        root: ``[1, Vd]`` log-probabilities of the root's children.
        topology: The topology.
        at: The level that comes next, whose tokens ``place`` takes.
    """

    def __init__(self, root: Tensor, shape: TreeShape) -> None:
        self.root = root[None]
        self.topology = fixed_topology(shape)
        self._places = _places(shape, root.device)
        self.at = self._places[0]
        self._tokens: list[Tensor] = []
        self._log_probs: list[Tensor] = []

    def levels(self) -> Iterator[Level | None]:
        """Yield None for the root, then the rows that have children, level by level; ``place`` comes in between."""
        yield None
        for depth, place in enumerate(self._places[1:], start=1):
            self.at = place
            yield Level(self._tokens[-1].index_select(0, self.at.inner), self.at.parent_slots, depth)

    def place(self, tokens: Tensor, log_probs: Tensor) -> None:
        """Take ``[R, width]`` target ids and log-probabilities, by rank, for the rows just yielded."""
        self._tokens.append(tokens.flatten().index_select(0, self.at.picks))
        self._log_probs.append(log_probs.flatten().index_select(0, self.at.picks))

    def tree(self, draft_probs: Tensor | None = None) -> TokenTree:
        topology = self.topology
        return TokenTree(
            torch.cat(self._tokens), topology.parents, topology.depths, torch.cat(self._log_probs), draft_probs
        )
