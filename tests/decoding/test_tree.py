"""Trees: dynamic growth against brute force, fixed topologies, sampled children, and what a scorer is promised."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.structure import ancestor_mask
from vsdbench.decoding.tree import empty_tree, fixed_topology, grow

DRAFT_VOCAB = 6
FIXED = ["chain", "static", "sampled"]


class TableScorer:
    """A scorer whose distribution depends on the whole path, and which records how it was called.

    Draft id i is target id 2 i + 1, so that a forgotten mapping is seen.
    """

    def __init__(self, seed=0, vocab=DRAFT_VOCAB, sharpness=1.0):
        self.vocab_size = 2 * vocab + 1
        self._vocab, self._seed, self._sharpness = vocab, seed, sharpness
        self.paths: list[tuple[int, ...]] = []
        self.calls: list[tuple[int, int]] = []

    def of_path(self, path):
        """``[Vd]`` log-probabilities of the children of a path of draft ids."""
        key = self._seed
        for token in path:
            key = key * 31 + token + 1
        generator = torch.Generator().manual_seed(key)
        return torch.log_softmax(self._sharpness * torch.randn(self._vocab, generator=generator), dim=-1)

    def root(self):
        return self.of_path(())

    def level(self, tokens, parent_slots, depth):
        assert len(tokens) == len(parent_slots) > 0
        new = []
        for token, slot in zip(tokens.tolist(), parent_slots.tolist(), strict=True):
            assert -1 <= slot < len(self.paths)  # a parent took its slot in an earlier level
            parent = self.paths[slot] if slot >= 0 else ()
            assert len(parent) == depth - 1
            assert token % 2 == 1
            new.append((*parent, token // 2))
        self.paths += new
        self.calls.append((len(new), depth))
        return torch.stack([self.of_path(path) for path in new])

    def to_target(self, ids):
        return 2 * ids + 1


def paths(tree):
    found = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token // 2))
    return found


def grown(scorer, shape, seed=0, temperature=1.0):
    return grow(scorer, shape, state=None, temperature=temperature, generator=torch.Generator().manual_seed(seed))


def check_structure(tree, shape):
    assert len(tree) == len(tree.tokens) == len(tree.log_probs) == len(tree.depths) <= shape.budget
    for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        assert -1 <= parent < node
        assert depth == (1 if parent < 0 else tree.depths[parent] + 1) <= shape.depth
    found = paths(tree)
    assert len(set(found)) == len(found)  # no token twice under one parent
    for row in range(-1, len(tree)):
        assert list(tree.parents).count(row) <= shape.top_k


def score(scorer, path):
    return sum(float(scorer.of_path(path[:i])[path[i]]) for i in range(len(path)))


def beam_reference(scorer, shape):
    """EAGLE-2 in its plainest form: whole levels, all the way down, then the best nodes of everything."""
    width = min(shape.top_k, DRAFT_VOCAB)
    level, everything = [()], []
    for _ in range(shape.depth):
        children = []
        for path in level:
            best = scorer.of_path(path).topk(width).indices.tolist()
            children += [(*path, token) for token in best]
        everything += children
        level = sorted(children, key=lambda path: -score(scorer, path))[:width]
    return set(sorted(everything, key=lambda path: -score(scorer, path))[: shape.budget])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("budget", "top_k"), [(1, 1), (3, 3), (4, 6), (6, 6)])
def test_dynamic_growth_keeps_the_best_of_all_paths(seed, budget, top_k):
    """With a width of at least the budget nothing of the best can be lost on the way: all paths are enumerated."""
    scorer, shape = TableScorer(seed), TreeShape(kind="dynamic", budget=budget, depth=4, top_k=top_k)
    tree = grown(scorer, shape)
    every = [path for depth in range(1, 5) for path in itertools.product(range(DRAFT_VOCAB), repeat=depth)]
    expected = sorted(every, key=lambda path: -score(scorer, path))[:budget]
    assert set(paths(tree)) == set(expected)
    check_structure(tree, shape)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("budget", "depth", "top_k"), [(7, 4, 3), (12, 5, 4), (9, 6, 2), (30, 3, 3), (2, 6, 3), (5, 1, 3)]
)
def test_dynamic_growth_and_its_early_stop_equal_the_full_search(seed, sharpness, budget, depth, top_k):
    scorer = TableScorer(seed, sharpness=sharpness)
    shape = TreeShape(kind="dynamic", budget=budget, depth=depth, top_k=top_k)
    tree = grown(scorer, shape)
    assert set(paths(tree)) == beam_reference(scorer, shape)
    check_structure(tree, shape)
    for path, log_prob in zip(paths(tree), tree.log_probs.tolist(), strict=True):
        assert log_prob == pytest.approx(float(scorer.of_path(path[:-1])[path[-1]]))


def test_growth_stops_early_when_nothing_deeper_can_enter():
    flat = TableScorer(0, sharpness=0.1)
    grown(flat, TreeShape(kind="dynamic", budget=4, depth=9, top_k=4))
    assert len(flat.calls) < 8
    peaked = TableScorer(0, sharpness=50.0)
    tree = grown(peaked, TreeShape(kind="dynamic", budget=9, depth=9, top_k=4))
    assert len(peaked.calls) == max(tree.depths) - 1 == 8


def adaptive_reference(scorer, shape):
    """Levels are grown while the best of the last have enough probability together; kept is what has enough alone."""
    level, everything = [()], []
    for depth in range(shape.depth):
        if depth and sum(math.exp(score(scorer, path)) for path in level) < shape.min_level_prob:
            break
        children = [
            (*path, token) for path in level for token in scorer.of_path(path).topk(shape.top_k).indices.tolist()
        ]
        everything += children
        level = sorted(children, key=lambda path: -score(scorer, path))[: shape.top_k]
    best = sorted(everything, key=lambda path: -score(scorer, path))[: shape.budget]
    return {path for path in best if math.exp(score(scorer, path)) >= shape.min_node_prob}


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("node", "level"), [(0.0, 0.4), (0.08, 0.0), (0.05, 0.3), (0.2, 0.9), (0.99, 0.0)])
def test_a_tree_is_as_large_as_the_drafter_is_sure(sharpness, node, level):
    shape = TreeShape(budget=9, depth=5, top_k=3, min_node_prob=node, min_level_prob=level)
    sizes = set()
    for seed in range(12):
        scorer = TableScorer(seed, sharpness=sharpness)
        tree = grown(scorer, shape)
        assert set(paths(tree)) == adaptive_reference(scorer, shape)
        check_structure(tree, shape)
        sizes.add(len(tree))
    assert len(sizes) > 1 or (sharpness, node) not in {(1.0, 0.05), (1.0, 0.2)}


@pytest.mark.parametrize("kind", [*FIXED, "dynamic"])
@pytest.mark.parametrize(
    ("budget", "depth", "top_k"), [(1, 1, 1), (4, 4, 1), (7, 4, 4), (20, 6, 3), (15, 2, 9), (40, 5, 10)]
)
def test_every_shape_keeps_to_its_limits(kind, budget, depth, top_k):
    shape = TreeShape(kind=kind, budget=budget, depth=depth, top_k=1 if kind == "chain" else top_k)
    scorer = TableScorer(3, vocab=24)
    tree = grown(scorer, shape)
    check_structure(tree, shape)
    assert len(tree) == (min(budget, depth) if kind == "chain" else len(tree))
    assert len(tree) >= min(budget, depth)
    assert len(scorer.paths) == sum(count for count, _ in scorer.calls)
    assert [at for _, at in scorer.calls] == list(range(1, len(scorer.calls) + 1))


@pytest.mark.parametrize("kind", ["static", "sampled"])
def test_fixed_trees_spend_their_budget_unless_the_shape_is_too_small(kind):
    assert len(grown(TableScorer(), TreeShape(kind=kind, budget=9, depth=4, top_k=3))) == 9
    assert len(grown(TableScorer(), TreeShape(kind=kind, budget=99, depth=2, top_k=3))) == 12


@pytest.mark.parametrize(("budget", "depth", "top_k"), [(7, 4, 4), (30, 5, 4), (60, 8, 10)])
def test_topology_puts_levels_in_order_and_children_by_rank(budget, depth, top_k):
    topology = fixed_topology(TreeShape(kind="sampled", budget=budget, depth=depth, top_k=top_k))
    assert list(topology.depths) == sorted(topology.depths)
    assert [node for level in topology.levels for node in level] == list(range(len(topology.parents)))
    below = [1] * len(topology.parents)  # height of each node's subtree
    for node in reversed(range(len(topology.parents))):
        if topology.parents[node] >= 0:
            below[topology.parents[node]] = max(below[topology.parents[node]], below[node] + 1)
    for row in range(-1, len(topology.parents)):
        children = [node for node, parent in enumerate(topology.parents) if parent == row]
        assert [topology.ranks[node] for node in children] == list(range(len(children)))
        assert topology.num_children[row + 1] == len(children)
        heights = [below[node] for node in children]
        assert heights == sorted(heights, reverse=True)  # what is tried first has the deepest subtree


def test_static_children_are_the_top_ranked_ones():
    scorer, shape = TableScorer(2), TreeShape(kind="static", budget=12, depth=3, top_k=3)
    tree = grown(scorer, shape)
    topology = fixed_topology(shape)
    for node, path in enumerate(paths(tree)):
        ranked = scorer.of_path(path[:-1]).argsort(descending=True).tolist()
        assert path[-1] == ranked[topology.ranks[node]]
    assert tree.draft_probs is None


def test_only_sampled_shapes_draw_from_the_generator():
    for kind in ("chain", "static", "dynamic", "sampled"):
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        shape = TreeShape(kind=kind, budget=6, depth=3, top_k=2)
        grow(TableScorer(), shape, state=None, temperature=1.0, generator=generator)
        assert torch.equal(before, generator.get_state()) == (kind != "sampled")


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_sampled_draft_probs_are_the_rows_children_were_drawn_from(temperature):
    scorer = TableScorer(1)
    tree = grown(scorer, TreeShape(kind="sampled", budget=8, depth=3, top_k=3), temperature=temperature)
    assert tree.draft_probs.shape == (len(tree) + 1, scorer.vocab_size)
    for row, path in enumerate([(), *paths(tree)]):
        expected = torch.zeros(scorer.vocab_size)
        if row - 1 in tree.parents:
            expected[1::2] = torch.softmax(scorer.of_path(path) / (temperature or 1.0), dim=-1)
        torch.testing.assert_close(tree.draft_probs[row], expected)
    for node, parent in enumerate(tree.parents):
        drawn_with = tree.draft_probs[parent + 1][tree.tokens[node]]
        assert float(tree.log_probs[node].exp()) == pytest.approx(float(drawn_with), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_children_are_drawn_without_replacement_in_order(temperature):
    scorer, shape = TableScorer(4, vocab=4, sharpness=0.4), TreeShape(kind="sampled", budget=2, depth=1, top_k=2)
    probs = torch.softmax(scorer.root().double() / temperature, dim=-1).tolist()
    generator, counts, total = torch.Generator().manual_seed(7), {}, 4000
    for _ in range(total):
        tree = grow(scorer, shape, state=None, temperature=temperature, generator=generator)
        pair = tuple(tree.tokens.tolist())
        counts[pair] = counts.get(pair, 0) + 1
    pairs = list(itertools.permutations(range(4), 2))
    expected = [total * probs[i] * probs[j] / (1 - probs[i]) for i, j in pairs]
    observed = [counts.pop((2 * i + 1, 2 * j + 1), 0) for i, j in pairs]
    assert not counts
    assert min(expected) > 5
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["static", "dynamic", "sampled"])
def test_a_vocabulary_smaller_than_top_k_is_no_error(kind):
    tree = grown(TableScorer(vocab=3), TreeShape(kind=kind, budget=20, depth=3, top_k=8))
    check_structure(tree, TreeShape(kind=kind, budget=20, depth=3, top_k=3))
    assert len(tree) == 20


@pytest.mark.parametrize("kind", [*FIXED, "dynamic"])
@pytest.mark.parametrize("none", [{"budget": 0}, {"depth": 0}])
def test_a_shape_without_room_gives_the_empty_tree(kind, none):
    tree = grown(TableScorer(), replace(TreeShape(kind=kind), **none))
    assert len(tree) == len(tree.tokens) == 0


def test_empty_tree_and_its_mask():
    assert len(empty_tree(torch.device("cpu"))) == 0
    assert ancestor_mask([]).tolist() == [[True]]


@pytest.mark.parametrize("seed", range(3))
def test_ancestor_mask_is_reachability(seed):
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(-1, node, (), generator=generator)) for node in range(12)]
    mask = ancestor_mask(parents)
    for row in range(13):
        seen, at = {row}, row
        while at:
            at = parents[at - 1] + 1
            seen.add(at)
        assert {column for column in range(13) if mask[row, column]} == seen
