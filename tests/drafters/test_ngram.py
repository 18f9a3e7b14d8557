"""Prompt lookup: which continuations are found, how they become a tree, and that decoding with them is lossless."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.decoding.tiny import SHAPES, make_prompt, make_target, plain, settings

from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.ngram import NgramDrafter, build


def proposed(tokens, shape, *, committed=0, **options):
    """The tree after ``tokens``, of which the last ``committed`` ones came in one by one."""
    state = SimpleNamespace(tokens=tokens[: len(tokens) - committed], next_logits=torch.zeros(3))
    drafter = NgramDrafter(**options)
    drafter.begin(state, 100)
    for token in tokens[len(tokens) - committed :]:
        state.tokens.append(token)
        drafter.commit(state, 0, torch.zeros(1, 3))
    return drafter.propose(state, shape, temperature=0.0, generator=torch.Generator())


def paths(tree):
    """All root-to-leaf paths, as tokens, in the order of their leaves."""
    found = []
    for node in range(len(tree)):
        if node not in tree.parents:
            path, at = [], node
            while at >= 0:
                path.insert(0, int(tree.tokens[at]))
                at = tree.parents[at]
            found.append(path)
    return found


def shape(budget, depth, top_k=4, kind="dynamic"):
    return TreeShape(kind=kind, budget=budget, depth=depth, top_k=top_k)


def test_continuations_are_merged():
    tree = proposed([1, 5, 6, 7, 1, 5, 6, 8, 1, 5, 9, 9, 1, 5], shape(20, 3))
    assert paths(tree) == [[9, 9, 1], [6, 8, 1], [6, 7, 1]]
    assert sorted(tree.tokens[[i for i, p in enumerate(tree.parents) if p == -1]].tolist()) == [6, 9]
    assert len(tree) == 8, "the shared 6 is one node"
    assert list(tree.depths) == [1, 2, 3, 1, 2, 3, 2, 3]


def test_the_longest_match_comes_first_and_then_the_latest():
    tokens = [1, 2, 3, 40, 9, 2, 3, 41, 9, 3, 42, 9, 3, 43, 1, 2, 3]
    assert paths(proposed(tokens, shape(20, 1, 10))) == [[40], [41], [43], [42]]
    assert paths(proposed(tokens, shape(20, 1, 10), max_ngram=2)) == [[41], [40], [43], [42]]
    assert paths(proposed(tokens, shape(20, 1, 10), min_ngram=2)) == [[40], [41]]


@pytest.mark.parametrize(("budget", "depth", "top_k"), [(1, 1, 1), (3, 2, 4), (5, 4, 2), (7, 9, 3), (40, 3, 3)])
def test_budget_depth_and_the_number_of_continuations_are_kept(budget, depth, top_k):
    tokens = make_prompt(300, 1, vocab=6)
    tree = proposed(tokens, shape(budget, depth, top_k))
    assert 1 <= len(tree) <= budget
    assert max(tree.depths) <= depth
    assert len(paths(tree)) <= top_k
    assert len({(parent, int(token)) for parent, token in zip(tree.parents, tree.tokens, strict=True)}) == len(tree)


def test_the_whole_budget_is_used_where_the_text_allows_it():
    assert len(proposed(make_prompt(400, 1, vocab=6), shape(9, 4, 9))) == 9


def test_a_chain_is_one_path():
    tree = proposed([1, 5, 6, 7, 1, 5, 8, 9, 1, 5], shape(4, 4, 1, kind="chain"))
    assert paths(tree) == [[8, 9, 1, 5]]


def test_nothing_is_proposed_without_a_match():
    assert len(proposed([1, 2, 3, 4], shape(7, 4))) == 0
    assert len(proposed([1], shape(7, 4))) == 0


def test_committed_tokens_are_looked_up_like_the_prompts():
    tokens = make_prompt(80, 4, vocab=7)
    at_once = proposed(tokens, shape(12, 4))
    one_by_one = proposed(tokens, shape(12, 4), committed=60)
    assert at_once.tokens.tolist() == one_by_one.tokens.tolist()
    assert at_once.parents == one_by_one.parents
    assert len(at_once) > 4


@pytest.fixture(scope="module")
def target():
    """A target that repeats itself, so that looking back pays."""
    return make_target(spread=0.1, num_hidden_layers=2)


@pytest.mark.parametrize("tree", SHAPES, ids=lambda tree: tree.kind)
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_decoding_is_lossless_and_remembers_nothing(target, tree, temperature):
    drafter, accepted = NgramDrafter(), 0
    for seed in (*range(4), 0):
        prompt = make_prompt(30, seed, vocab=5)
        chosen = settings(40, temperature=temperature, seed=seed, shape=tree)
        generation = decode(target, drafter, prompt, chosen)
        assert generation.token_ids == plain(target, prompt, chosen)
        fresh = decode(target, NgramDrafter(), prompt, chosen)
        assert [step.num_nodes for step in fresh.steps] == [step.num_nodes for step in generation.steps]
        accepted += sum(step.num_accepted for step in generation.steps)
    assert temperature > 0 or accepted > 0


@pytest.mark.parametrize("rule", ["rejection", "traversal"])
def test_its_trees_suit_the_other_rules(target, rule):
    chosen = settings(30, temperature=0.3, rule=rule)
    generation = decode(target, NgramDrafter(), make_prompt(30, 0, vocab=5), chosen)
    assert len(generation.token_ids) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ngrams": 3}, "no option 'max_ngrams'"),
        ({"max_ngram": 2, "min_ngram": 3}, "got 3 and 2"),
        ({"min_ngram": 0}, "got 0 and 4"),
        ({"max_ngram": "four"}, "'four'"),
        ({"max_ngram": 2.5}, r"2\.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(None, checkpoint=None, options=options)


def test_it_has_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="nothing to load"):
        build(None, checkpoint=tmp_path, options={})


def test_options_are_taken():
    drafter = build(None, checkpoint=None, options={"max_ngram": 3, "min_ngram": 2})
    assert (drafter.max_ngram, drafter.min_ngram) == (3, 2)
