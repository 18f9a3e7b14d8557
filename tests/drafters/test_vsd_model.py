"""VSD and on-policy training of a tiny model: gradients, every combination of options, what decoding measures."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import settings
from tests.drafters.path_tools import make_setting

from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.onpolicy import OnPolicy
from vsdbench_drafters.objectives.paths import sample_paths
from vsdbench_drafters.objectives.token import ForwardKL
from vsdbench_drafters.objectives.vsd.estep import judge
from vsdbench_drafters.objectives.vsd.objective import VSD


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
    trie, _, scores = objective.score(setting.batch, setting.model, setting.view, anchors, branch, paths)
    judged = judge(objective.e_settings, paths, trie, scores, torch.Generator().manual_seed(1))
    expected = judged.utility.mean()
    assert abs(judged.num_accepted.double().mean() - expected) < 0.06, "the accept test has the mean that U says"

    drafter = setting.model.drafter(torch.float64)
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
        seen["trie"], _, seen["scores"] = found = score(*args)
        return found

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
        ({"tree_top_k": 0}, "tree_top_k is 0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"targets": "full", "oracle": False}, "leaves out"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        VSD(**options)
