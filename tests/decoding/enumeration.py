"""Exact output distributions of a verification rule over a small vocabulary, with nothing sampled.

Every tree that can be drawn is listed with its probability, both sides of every coin are walked with theirs, the next
token is a whole distribution, and what follows it is the target's own. The sum must be the target's joint
distribution. Nothing here uses the code that is tested, except the rule itself, which is handed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from vsdbench.decoding.interfaces import TokenTree
from vsdbench.decoding.sampling import SamplingParams
from vsdbench.decoding.verify import Coin, Step

Decide = Callable[[Step, Coin], "tuple[list[int], torch.Tensor]"]
Topology = tuple[int, ...]  # parent of every node, -1 the root


def reference_probs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The filtered softmax, written independently: plain loops over one row."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = ranked[: params.top_k]
    if params.top_p is not None:
        total, cumulative = sum(weights[token] for token in kept), 0.0
        for count, token in enumerate(kept, start=1):
            cumulative += weights[token] / total
            if cumulative >= params.top_p:
                kept = kept[:count]
                break
    probs = np.zeros(len(weights))
    probs[kept] = weights[kept]
    return probs / probs.sum()


@dataclass
class World:
    """A random target and a random drafter, both functions of the whole prefix."""

    vocab: int
    params: SamplingParams
    seed: int
    closeness: float = 0.5  # 1: the drafter is the target
    _rows: dict = field(default_factory=dict)

    def rows(self, prefix: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the target and probabilities of the drafter after ``prefix``."""
        if prefix not in self._rows:
            rng = np.random.default_rng([self.seed, len(prefix), *prefix])
            logits, other = rng.normal(0, 1.5, self.vocab), rng.normal(0, 1.5, self.vocab)
            draft = np.exp(self.closeness * logits + (1 - self.closeness) * other)
            self._rows[prefix] = (logits, draft / draft.sum())
        return self._rows[prefix]

    def joint(self, length: int, prefix: tuple[int, ...] = ()) -> np.ndarray:
        """The target's joint distribution of the next ``length`` tokens, ``[V] * length``."""
        if length == 0:
            return np.ones(())
        probs = reference_probs(self.rows(prefix)[0], self.params)
        return np.stack([probs[token] * self.joint(length - 1, (*prefix, token)) for token in range(self.vocab)])


def paths_of(parents: Topology, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The token path of every row, the root's () first."""
    paths: list[tuple[int, ...]] = [()]
    for parent, token in zip(parents, tokens, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


def make_tree(world: World, parents: Topology, tokens: tuple[int, ...], *, drawn: bool) -> TokenTree:
    paths = paths_of(parents, tokens)
    draft = torch.zeros(len(paths), world.vocab, dtype=torch.float64)
    for row in {parent + 1 for parent in parents}:
        draft[row] = torch.from_numpy(world.rows(paths[row])[1])
    return TokenTree(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        parents=parents,
        depths=[len(path) for path in paths[1:]],
        log_probs=torch.zeros(len(tokens)),
        draft_probs=draft if drawn else None,
    )


def make_step(world: World, tree: TokenTree) -> Step:
    paths = paths_of(tuple(tree.parents), tuple(tree.tokens.tolist()))
    return Step(tree, torch.from_numpy(np.stack([world.rows(path)[0] for path in paths])), world.params)


def drawn_trees(world: World, parents: Topology, *, replace: bool = False) -> Iterator[tuple[float, TokenTree]]:
    """Every tree that drawing the children of each row (without replacement) can give, with its probability."""

    def grow(tokens: tuple[int, ...]) -> Iterator[tuple[float, tuple[int, ...]]]:
        node = len(tokens)
        if node == len(parents):
            yield 1.0, tokens
            return
        draft = world.rows(paths_of(parents[:node], tokens)[parents[node] + 1])[1].copy()
        if not replace:
            draft[[tokens[other] for other in range(node) if parents[other] == parents[node]]] = 0.0
        for token in np.flatnonzero(draft):
            for probability, rest in grow((*tokens, int(token))):
                yield probability * draft[token] / draft.sum(), rest

    for probability, tokens in grow(()):
        yield probability, make_tree(world, parents, tokens, drawn=True)


def top_tree(world: World, parents: Topology) -> TokenTree:
    """The tree of the drafter's top-ranked children: chosen, not drawn."""
    tokens: tuple[int, ...] = ()
    for node, parent in enumerate(parents):
        draft = world.rows(paths_of(parents[:node], tokens)[parent + 1])[1]
        rank = sum(other == parent for other in parents[:node])
        tokens = (*tokens, int(np.argsort(-draft)[rank]))
    return make_tree(world, parents, tokens, drawn=False)


class ScriptedCoin:
    """A coin that comes up as it is told, then heads; it keeps the probability of what it showed."""

    def __init__(self, script: tuple[bool, ...]) -> None:
        self.script, self.shown, self.probability, self.asked = script, [], 1.0, []

    def __call__(self, node: int, heads: float) -> bool:
        assert node not in self.asked, "a node was asked about twice: its one uniform number would be reused"
        assert 0 <= heads <= 1
        self.asked.append(node)
        if heads in {0.0, 1.0}:
            return heads == 1.0
        self.shown.append(self.script[len(self.shown)] if len(self.shown) < len(self.script) else True)
        self.probability *= heads if self.shown[-1] else 1 - heads
        return self.shown[-1]


def outcomes(decide: Decide, step: Step) -> Iterator[tuple[float, list[int], np.ndarray]]:
    """Every (probability, path, next-token distribution) of a rule: both sides of each coin that is not certain."""
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        coin = ScriptedCoin(pending.pop())
        path, remaining = decide(step, coin)
        pending += [(*coin.shown[:toss], False) for toss in range(len(coin.script), len(coin.shown))]
        yield coin.probability, path, remaining.numpy()


def output_joint(
    decide: Decide, world: World, trees: list[tuple[float, TokenTree]], length: int
) -> tuple[np.ndarray, float]:
    """The joint distribution of the first ``length`` tokens that come out, and the expected accepted tokens."""
    joint, accepted = np.zeros((world.vocab,) * length), 0.0
    for tree_probability, tree in trees:
        tokens = tree.tokens.tolist()
        for probability, path, remaining in outcomes(decide, make_step(world, tree)):
            accepted += tree_probability * probability * len(path)
            prefix = tuple(tokens[node] for node in path)
            for token, next_probability in enumerate(remaining / remaining.sum()):
                out = (*prefix, token)
                after = world.joint(length - len(out), out)
                joint[out] += tree_probability * probability * next_probability * after
    return joint, accepted


def all_topologies(num_nodes: int, depth: int) -> list[Topology]:
    """Every list of parents with ``num_nodes`` nodes and no path longer than ``depth``."""
    found = []
    for parents in itertools.product(*(range(-1, node) for node in range(num_nodes))):
        if max(map(len, paths_of(parents, (0,) * num_nodes))) <= depth:
            found.append(parents)
    return found
