"""VSD against what it claims: posterior, bound, gradients, switches, and the acceptance that decoding measures."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.decoding.tiny import settings
from tests.drafters.path_tools import DRAFT_IDS, make_setting

from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3_drafter import Eagle3Drafter
from vsdbench_drafters.objectives.onpolicy import OnPolicy
from vsdbench_drafters.objectives.paths import Paths, Scores, merge, sample_paths, trace
from vsdbench_drafters.objectives.token import ForwardKL
from vsdbench_drafters.objectives.vsd.confidence import penalty
from vsdbench_drafters.objectives.vsd.estep import EStepSettings, judge, path_metrics
from vsdbench_drafters.objectives.vsd.mstep import MStepSettings, path_rows, reached, rejections, soft_targets
from vsdbench_drafters.objectives.vsd.objective import VSD
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
    rows = reached(paths, trie, judged)
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


# ---- the whole objective on a model ----


@pytest.fixture(scope="module")
def setting():
    return make_setting()


def run(setting, **options):
    objective = VSD(ttt_steps=2, **({"anchors": 3, "paths": 4, "depth": 3} | options))
    setting.model.zero_grad(set_to_none=True)
    output = objective.loss(setting.batch, setting.model, setting.view)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in setting.model.named_parameters()}


@pytest.mark.parametrize("proposals", ["sampled", "tree", "mixed"])
@pytest.mark.parametrize("model", ["sampled", "tree", "greedy"])
@pytest.mark.parametrize("targets", ["sampled", "full"])
def test_every_combination_trains(setting, proposals, model, targets):
    output, gradients = run(setting, proposals=proposals, acceptance=model, targets=targets)
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert ("elbo" in output.metrics) == (proposals != "tree")
    again, _ = run(setting, proposals=proposals, acceptance=model, targets=targets)
    assert torch.equal(again.loss, output.loss), "the same batch draws the same paths"


def test_gradients_of_the_model_are_those_of_finite_differences(setting):
    """κ, w and a are constants of the M-step: with the E-step held, the loss's slope is the gradient."""
    objective = VSD(ttt_steps=2, anchors=3, paths=4, depth=3, m_steps=3, car=0.5)
    setting.model.zero_grad(set_to_none=True)
    first = objective.loss(setting.batch, setting.model, setting.view)
    first.loss.backward()
    parameter = setting.model.midlayer.self_attn.o_proj.weight
    gradient = parameter.grad.clone()
    step = 1e-6
    index = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    with torch.no_grad():
        parameter[index] += step
    moved = objective.loss(setting.batch, setting.model, setting.view)
    with torch.no_grad():
        parameter[index] -= step
    again = objective.loss(setting.batch, setting.model, setting.view)
    assert abs((moved.loss - first.loss) / step - gradient[index]) < 1e-4 * abs(gradient[index]) + 1e-5
    assert torch.isclose(again.loss, first.loss, rtol=1e-12)
    assert not objective._rounds, "an E-step is forgotten after its last M-step"


def test_without_path_terms_it_is_its_anchor(setting):
    output, gradients = run(setting, omega=0.0, car=0.0)
    setting.model.zero_grad(set_to_none=True)
    anchor = ForwardKL(ttt_steps=2).loss(setting.batch, setting.model, setting.view)
    anchor.loss.backward()
    assert torch.isclose(output.loss, anchor.loss)
    for name, parameter in setting.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    alone, _ = run(setting, anchor="off")
    assert torch.isclose(alone.loss, run(setting)[0].loss - anchor.loss)


def test_expected_acceptance_is_what_decoding_measures(setting):
    """Mean τ of the oracle's paths against accepted tokens of real first steps, chain drawn from q, T = 1."""
    text = setting.batch.tokens[:14].tolist()
    row, depth, count = 4, 3, 700
    root = int(setting.batch.slots[row]) + 1
    objective = VSD(paths=6000, depth=depth)
    anchors = torch.tensor([row])
    branch = setting.branch(anchors)
    paths = sample_paths(setting.model, branch, 6000, depth, torch.Generator().manual_seed(0))
    trie = merge(paths, len(DRAFT_IDS))
    hidden = trace(setting.model, branch, trie)
    scores = objective.score(setting.batch, setting.model, setting.view, anchors, trie, hidden)
    judged = judge(objective.e_settings, paths, trie, scores, torch.Generator().manual_seed(1))
    expected = judged.utility.mean()
    assert abs(judged.num_accepted.double().mean() - expected) < 0.06, "the accept test has the mean that U says"

    drafter = Eagle3Drafter(setting.model, dtype=torch.float64)
    shape = TreeShape(kind="sampled", budget=depth, depth=depth, top_k=1)
    lengths = []
    for seed in range(count):
        chosen = settings(depth + 2, temperature=1.0, rule="rejection", seed=seed, shape=shape)
        generation = decode(setting.target, FirstToken(drafter, text[root]), text[:root], chosen)
        lengths.append(generation.steps[0].num_accepted)
    measured = torch.tensor(lengths, dtype=torch.float64)
    error = measured.std() / count**0.5
    assert abs(measured.mean() - expected) < 4 * error + 0.01
    assert error < 0.05


class FirstToken:
    """A drafter whose sequence goes on with a given token, whatever the prefill sampled."""

    name = "first-token"

    def __init__(self, drafter, token):
        self._drafter, self._token = drafter, token

    def begin(self, state, max_length):
        state.tokens[-1] = self._token
        self._drafter.begin(state, max_length)

    def propose(self, state, shape, *, temperature, generator):
        return self._drafter.propose(state, shape, temperature=temperature, generator=generator)

    def commit(self, state, num_accepted, features):
        self._drafter.commit(state, num_accepted, features)


@pytest.mark.parametrize("divergence", ["kl", "rkl", "jsd", "tvd", "lk"])
def test_on_policy_divergences_train(setting, divergence):
    objective = OnPolicy(ttt_steps=2, anchors=3, paths=4, depth=3, divergence=divergence, anchor="off")
    setting.model.zero_grad(set_to_none=True)
    output = objective.loss(setting.batch, setting.model, setting.view)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert setting.model.fc.weight.grad.abs().sum() > 0


def test_on_policy_reverse_kl_is_the_mean_over_paths(setting):
    objective = OnPolicy(ttt_steps=1, anchors=2, paths=3, depth=2, anchor="off", omega=1.0)
    seen = {}
    propose = objective.propose

    def watch(*args):
        seen["paths"] = propose(*args)
        return seen["paths"]

    objective.propose = watch
    score = objective.score

    def watch_score(*args):
        seen["scores"], seen["trie"] = score(*args), args[4]
        return seen["scores"]

    objective.score = watch_score
    loss = objective.loss(setting.batch, setting.model, setting.view).loss
    q, p = seen["scores"].draft, seen["scores"].target
    p = p / p.sum(-1, keepdim=True)  # over the draft vocabulary
    divergence = (q * (q.log() - p.log())).sum(-1)
    assert torch.isclose(loss, divergence[seen["trie"].rows].sum(-1).mean(-1).mean())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proposals": "trees"}, "proposals is 'trees'; use sampled, tree, mixed"),
        ({"acceptance": "any"}, "acceptance is 'any'"),
        ({"sampler": "gibbs"}, "sampler is 'gibbs'"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"m_steps": 9}, "m_steps is 9"),
        ({"omega": -1.0}, "omega is -1.0"),
        ({"paths": 0}, "paths is 0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"targets": "full", "oracle": False}, "leaves out"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        VSD(**options)
