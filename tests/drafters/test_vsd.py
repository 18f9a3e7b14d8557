"""VSD against what it claims, in a world that can be enumerated: posterior, bound, weights, gradients, switches."""

from __future__ import annotations

import itertools

import pytest
import torch

from vsdbench_drafters.objectives.paths import Paths, Scores, merge
from vsdbench_drafters.objectives.vsd.confidence import penalty
from vsdbench_drafters.objectives.vsd.estep import EStepSettings, judge, path_metrics
from vsdbench_drafters.objectives.vsd.mstep import MStepSettings, path_rows, reached, rejections, soft_targets
from vsdbench_drafters.objectives.vsd.utility import acceptance, elbo, expected_length, log_validity
from vsdbench_drafters.objectives.vsd.weighting import (
    effective_sample_size,
    importance_weights,
    metropolis_hastings_weights,
)

WIDTH, DEPTH = 3, 2


# ---- a world small enough to be enumerated: every path of two tokens over three words ----


def tables(seed):
    """Random conditional tables q and p: ``[1 + 3, 3]``, the root's row and one row a first token."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.softmax(1.5 * torch.randn(1 + WIDTH, WIDTH, generator=generator, dtype=torch.float64), -1)
        for _ in range(2)
    )


def every_path():
    return torch.tensor(list(itertools.product(range(WIDTH), repeat=DEPTH)))


def conditionals(table, paths):
    """``[n, 2]`` probabilities of the tokens of paths."""
    return torch.stack([table[0, paths[:, 0]], table[1 + paths[:, 0], paths[:, 1]]], dim=-1)


def drawn(table, count, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(table[0], count, replacement=True, generator=generator)
    second = torch.multinomial(table[1 + first], 1, generator=generator)[:, 0]
    return torch.stack([first, second], dim=-1)


def exact_posterior(q, p, model, beta):
    """π over all paths, and log Σ p κ (utility apart)."""
    paths = every_path()
    q_t, p_t = conditionals(q, paths), conditionals(p, paths)
    accept = acceptance(model, q_t, p_t, torch.zeros_like(q_t, dtype=torch.bool))
    log_joint = p_t.log().sum(-1) + accept.log().sum(-1)
    logits = log_joint + (expected_length(accept) / beta if beta else 0)
    return torch.softmax(logits, 0), torch.logsumexp(log_joint, 0)


def estimated(q, p, *, count, seed, **changes):
    """Weights of drawn paths by the objective's own E-step, summed up by path."""
    paths = drawn(q, count, seed)
    trie_paths = Paths(paths[None], torch.full((1, count), DEPTH), count)
    trie = merge(trie_paths, WIDTH)
    order = trie.tokens.clone()
    rows = torch.where(order < 0, 0, order + 1)  # the table's row of each context
    scores = Scores(q[rows], p[rows], torch.full((len(trie),), -1))
    chosen = EStepSettings(min_ess=0, clip=0, **changes)
    judged = judge(chosen, trie_paths, trie, scores, torch.Generator().manual_seed(seed))
    return trie_paths, trie, scores, judged


@pytest.mark.parametrize("sampler", ["importance", "mh"])
@pytest.mark.parametrize(("model", "beta"), [("sampled", None), ("sampled", 0.7), ("tree", None)])
def test_unfiltered_weights_are_the_exact_posterior(sampler, model, beta):
    q, p = tables(3)
    exact, _ = exact_posterior(q, p, model, beta)
    count = 60_000 if sampler == "importance" else 3_000
    found = torch.zeros(WIDTH**DEPTH, dtype=torch.float64)
    repeats = 1 if sampler == "importance" else 12
    for seed in range(repeats):
        paths, _, _, judged = estimated(
            q, p, count=count, seed=seed, model=model, beta=beta, oracle=False, sampler=sampler
        )
        key = paths.tokens[0, :, 0] * WIDTH + paths.tokens[0, :, 1]
        found.index_add_(0, key, judged.weights[0].double() / repeats)
    assert (found - exact).abs().max() < 0.015
    plain = conditionals(q, every_path()).prod(-1)
    assert (plain - exact).abs().max() > 0.08, "the proposals have the posterior already, so the test shows nothing"


def test_survivors_of_the_accept_test_are_weighted_to_the_exact_posterior():
    """With the filter on, fully accepted paths are ∝ q κ; their weights must leave κ out."""
    q, p = tables(3)
    exact, _ = exact_posterior(q, p, "sampled", 0.7)
    paths, _, _, judged = estimated(q, p, count=200_000, seed=1, beta=0.7)
    whole = judged.num_accepted[0] == DEPTH
    key = paths.tokens[0, whole, 0] * WIDTH + paths.tokens[0, whole, 1]
    found = torch.zeros(WIDTH**DEPTH, dtype=torch.float64).index_add_(0, key, judged.weights[0, whole].double())
    assert (found / found.sum() - exact).abs().max() < 0.015


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model", ["sampled", "tree"])
def test_the_bound_is_below_the_log_marginal(seed, model):
    q, p = tables(seed)
    paths = every_path()
    q_t, p_t = conditionals(q, paths), conditionals(p, paths)
    accept = acceptance(model, q_t, p_t, torch.zeros_like(q_t, dtype=torch.bool))
    bound = (q_t.prod(-1) * elbo(q_t.log(), p_t.log(), accept, torch.ones_like(q_t))).sum()
    _, marginal = exact_posterior(q, p, model, None)
    assert bound < marginal - 1e-3


def test_the_bound_is_tight_at_its_optimum():
    q, p = tables(0)
    paths = every_path()
    p_t = conditionals(p, paths)
    # Sampled acceptance: nothing is ever rejected where q = p.
    accept = acceptance("sampled", p_t, p_t, torch.zeros_like(p_t, dtype=torch.bool))
    assert (p_t.prod(-1) * elbo(p_t.log(), p_t.log(), accept, torch.ones_like(p_t))).sum().abs() < 1e-12
    # Tree acceptance does not depend on q: the optimum is the posterior itself.
    posterior, marginal = exact_posterior(q, p, "tree", None)
    joint = posterior.view(WIDTH, WIDTH)
    best = torch.cat([joint.sum(-1)[None], joint / joint.sum(-1, keepdim=True)])
    q_t = conditionals(best, paths)
    bound = (q_t.prod(-1) * elbo(q_t.log(), p_t.log(), p_t, torch.ones_like(q_t))).sum()
    assert torch.isclose(bound, marginal)


def test_the_logged_bound_estimates_the_exact_one():
    q, p = tables(4)
    paths = every_path()
    q_t, p_t = conditionals(q, paths), conditionals(p, paths)
    accept = acceptance("sampled", q_t, p_t, torch.zeros_like(q_t, dtype=torch.bool))
    exact = (q_t.prod(-1) * elbo(q_t.log(), p_t.log(), accept, torch.ones_like(q_t))).sum()
    found = path_metrics(*estimated(q, p, count=60_000, seed=0))["elbo"]
    assert abs(found - exact) < 0.02


def test_corrected_paths_start_with_a_token_of_the_target():
    """Accepted or corrected, the first token of a path has the target's distribution: verification is lossless."""
    q, p = tables(6)
    paths, _, _, judged = estimated(q, p, count=200_000, seed=2)
    first = torch.where(judged.num_accepted[0] > 0, paths.tokens[0, :, 0], judged.correction[0])
    found = torch.bincount(first, minlength=WIDTH) / len(first)
    assert (found - p[0]).abs().max() < 0.006


def test_leaves_of_a_tree_are_weighted_as_what_they_are():
    """They are enumerated and not drawn: their weights are the posterior restricted to them."""
    q, p = tables(3)
    exact, _ = exact_posterior(q, p, "tree", 0.7)
    leaves = every_path()[[1, 3, 4, 8]]
    paths = Paths(leaves[None], torch.full((1, 4), DEPTH), 0)
    trie = merge(paths, WIDTH)
    rows = torch.where(trie.tokens < 0, 0, trie.tokens + 1)
    scores = Scores(q[rows], p[rows], torch.full((len(trie),), -1))
    chosen = EStepSettings(min_ess=0, clip=0, oracle=False, model="tree", beta=0.7)
    weights = judge(chosen, paths, trie, scores, torch.Generator()).weights[0]
    kept = exact[[1, 3, 4, 8]]
    torch.testing.assert_close(weights, kept / kept.sum())


# ---- weights ----


def test_weights_by_hand():
    real = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    logs = torch.tensor([[0.0, 1.0, 9.0], [-torch.inf, 0.0, 0.0], [0.0, 0.0, 0.0]])
    weights = importance_weights(logs, real)
    torch.testing.assert_close(weights[0], torch.tensor([0.268941, 0.731059, 0.0]))
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 0.5, 0.5]))
    assert weights[2].tolist() == [0, 0, 0]
    hopeless = importance_weights(torch.full((1, 2), -torch.inf), torch.ones(1, 2, dtype=torch.bool))
    assert hopeless.tolist() == [[0.5, 0.5]]
    assert (
        importance_weights(torch.tensor([[10.0, 0, 0, 0]]), torch.ones(1, 4, dtype=torch.bool), clip=2.0).max() == 0.5
    )


def test_tempering_keeps_the_effective_sample_size_and_touches_nothing_else():
    generator = torch.Generator().manual_seed(0)
    logs = 1.2 * torch.randn(50, 8, generator=generator)
    real = torch.ones(50, 8, dtype=torch.bool)
    plain = importance_weights(logs, real)
    tempered = importance_weights(logs, real, min_ess=0.5)
    low = effective_sample_size(plain) < 4
    assert 5 < low.sum() < 50
    assert (effective_sample_size(tempered) > 3.99).all()
    assert (effective_sample_size(tempered)[low] < 4.05).all(), "no more than needed"
    assert torch.equal(tempered[~low], plain[~low])
    assert torch.equal(tempered.argsort(-1), plain.argsort(-1))


def test_a_chain_of_equal_weights_moves_every_time():
    weights = metropolis_hastings_weights(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.Generator())
    assert weights.tolist() == [[0.25] * 4] * 2
    stays = metropolis_hastings_weights(
        torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.ones(1, 3, dtype=torch.bool), torch.Generator()
    )
    assert stays.tolist() == [[1, 0, 0]]


# ---- M-step ----


@pytest.mark.parametrize("car", ["linear", "squared", "unlikelihood"])
def test_gradients_of_the_path_loss(car):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    rejected = torch.rand(6, 5, generator=generator, dtype=torch.float64) * (
        torch.rand(6, 5, generator=generator) < 0.4
    )
    rows = path_rows(0.5, 0.3, car)

    def plain(values):
        q = torch.softmax(values, -1)
        price = {
            "linear": q * rejected,
            "squared": (q - (1 - rejected)).square() * (rejected > 0),
            "unlikelihood": -torch.log(1 - q) * (rejected > 0),
        }[car]
        return (-0.5 * wanted * q.log() + 0.3 * price).sum(-1)

    losses, gradient = rows(logits.detach().clone(), torch.stack([wanted, rejected], dim=1))
    torch.testing.assert_close(losses, plain(logits))
    torch.testing.assert_close(gradient, torch.autograd.grad(plain(logits).sum(), logits)[0])
    step = 1e-6
    for row, column in ((0, 0), (3, 2), (5, 4)):
        moved = logits.detach().clone()
        moved[row, column] += step
        difference = (rows(moved, torch.stack([wanted, rejected], dim=1))[0] - losses)[row] / step
        assert abs(difference - gradient[row, column]) < 1e-4


def test_full_targets_are_the_mean_of_sampled_ones():
    q, p = tables(8)
    common = {"arw": False}
    paths, trie, scores, _ = estimated(q, p, count=40, seed=0, **common)
    total = torch.zeros(len(trie), WIDTH, dtype=torch.float64)
    full = torch.zeros_like(total)
    for seed in range(3000):
        judged = judge(EStepSettings(**common), paths, trie, scores, torch.Generator().manual_seed(seed))
        total += soft_targets(MStepSettings(targets="sampled", **common), paths, trie, scores, judged)
        full += soft_targets(MStepSettings(targets="full", **common), paths, trie, scores, judged)
    # Given the drafted contexts; over the drafts too, the accepted share is min(p, q) / q of q.
    reached = full.sum(-1, keepdim=True)
    assert torch.allclose(total.sum(-1, keepdim=True), reached, rtol=0.02)
    root = total[0] / total[0].sum()
    counts = torch.bincount(paths.tokens[0, :, 0], minlength=WIDTH) / 40
    keep = torch.minimum(p[0] / q[0], torch.ones(WIDTH))
    expected = (
        counts * keep + (counts * (1 - keep)).sum() * (p[0] - q[0]).clamp(min=0) / (p[0] - q[0]).clamp(min=0).sum()
    )
    assert (root - expected).abs().max() < 0.01
    torch.testing.assert_close(full[0] / full[0].sum(), p[0])


@pytest.fixture(scope="module")
def world():
    q, p = tables(8)
    return estimated(q, p, count=30, seed=5)


def test_each_switch_changes_exactly_its_own_term(world):
    paths, trie, scores, judged = world
    whole = soft_targets(MStepSettings(), paths, trie, scores, judged)
    plain = soft_targets(MStepSettings(arw=False), paths, trie, scores, judged)
    ended = soft_targets(MStepSettings(correction=False), paths, trie, scores, judged)
    rejected = judged.num_accepted < DEPTH
    # Without corrections only accepted tokens are left ...
    assert torch.isclose(ended.sum(), (judged.weights * judged.num_accepted).sum())
    # ... and what the corrections add is their weight, in full or scaled by 1 - ᾱ.
    added = (judged.weights * rejected).sum()
    assert torch.isclose((plain - ended).sum(), added)
    tested = torch.arange(DEPTH) <= judged.num_accepted[..., None]
    assert torch.equal(tested, judged.tested)
    mean = (judged.accept * tested).sum() / tested.sum()
    assert torch.isclose((whole - ended).sum(), (1 - mean) * added)
    torch.testing.assert_close(whole - ended, (1 - mean) * (plain - ended))
    # CAR prices the rejected children and nothing else.
    priced = rejections(paths, trie, judged, whole)
    children = {
        (int(trie.rows[0, s, t]), int(paths.tokens[0, s, t]))
        for s in range(30)
        if (t := int(judged.num_accepted[0, s])) < DEPTH
    }
    assert {tuple(index) for index in priced.nonzero().tolist()} == children


@pytest.mark.parametrize("model", ["sampled", "tree", "greedy"])
@pytest.mark.parametrize("targets", ["sampled", "full"])
def test_contexts_that_no_path_reached_have_nothing_to_learn(model, targets):
    q, p = tables(8)
    paths, trie, scores, judged = estimated(q, p, count=6, seed=5, model=model)
    rows = reached(trie, judged)
    wanted = soft_targets(MStepSettings(model=model, targets=targets), paths, trie, scores, judged)
    both = wanted.abs() + rejections(paths, trie, judged, wanted)
    others = torch.ones(len(trie), dtype=torch.bool)
    others[rows] = False
    assert others.any()
    assert not both[others].any()
    assert both.sum() > 0


def test_switches_of_the_weights():
    q, p = tables(8)
    base = estimated(q, p, count=30, seed=5, oracle=False)[3]
    without = {
        "kl": estimated(q, p, count=30, seed=5, oracle=False, kl=False)[3],
        "utility": estimated(q, p, count=30, seed=5, oracle=False, beta=None)[3],
        "arw": estimated(q, p, count=30, seed=5, oracle=False, arw=False)[3],
    }
    paths = estimated(q, p, count=30, seed=5)[0].tokens[0]
    q_t, p_t = conditionals(q, paths), conditionals(p, paths)
    accept = acceptance("sampled", q_t, p_t, torch.zeros_like(q_t, dtype=torch.bool))
    logs = {
        "ratio": (p_t / q_t).log().sum(-1),
        "validity": log_validity(accept, torch.ones_like(accept)),
        "utility": expected_length(accept),
    }
    torch.testing.assert_close(base.weights[0], torch.softmax(sum(logs.values()), 0))
    torch.testing.assert_close(without["kl"].weights[0], torch.softmax(logs["validity"] + logs["utility"], 0))
    torch.testing.assert_close(without["utility"].weights[0], torch.softmax(logs["validity"] + logs["ratio"], 0))
    assert without["arw"].weights.unique().tolist() == [pytest.approx(1 / 30)]
    for other in without.values():
        assert torch.equal(other.accept, base.accept)
    assert (base.num_accepted == DEPTH).all(), "without the oracle every proposal is kept whole"


def test_penalties_are_one_sided():
    for kind in ("linear", "squared", "unlikelihood"):
        value, slope = penalty(kind, torch.tensor([0.9, 0.9]), torch.tensor([0.0, 0.5]))
        assert value[0] == 0
        assert slope[0] == 0
        assert value[1] > 0
