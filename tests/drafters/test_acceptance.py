"""Objectives of the accepted length: by hand, against automatic differentiation, and on a model."""

from __future__ import annotations

import math

import pytest
import torch
from tests.drafters.path_tools import make_setting

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.acceptance import (
    ExpectedAcceptedLength,
    GroupTree,
    overlap_rows,
    rows_of,
    token_rows,
    tree_reward,
)
from vsdbench_drafters.objectives.base import unroll
from vsdbench_drafters.objectives.token import ForwardKL


@pytest.fixture(scope="module")
def setting():
    return make_setting()


@pytest.mark.parametrize("rows", [overlap_rows, token_rows])
def test_row_values_and_gradients(rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    probs = torch.softmax(torch.randn(200, 7, generator=generator, dtype=torch.float64), -1)
    tokens = torch.randint(0, 7, (200,), generator=generator)
    weights = torch.randn(200, generator=generator, dtype=torch.float64)
    targets = probs if rows is overlap_rows else tokens

    def plain(hidden, head):
        q = torch.softmax(hidden @ head.T, -1)
        return torch.minimum(q, probs).sum(-1) if rows is overlap_rows else q[torch.arange(200), tokens]

    values = rows_of(hidden, head, targets, rows)
    torch.testing.assert_close(values, plain(hidden, head))
    # Squared, so that the weight of a row's gradient depends on its value, as in a product of acceptances.
    found = torch.autograd.grad((weights * values.square()).sum(), (hidden, head))
    expected = torch.autograd.grad((weights * plain(hidden, head).square()).sum(), (hidden, head))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("acceptance", ["overlap", "token"])
def test_expected_accepted_length_is_the_sum_of_products(setting, acceptance):
    objective = ExpectedAcceptedLength(ttt_steps=3, acceptance=acceptance)
    setting.model.zero_grad(set_to_none=True)
    loss = objective.loss(setting.batch, setting.model, setting.view).loss
    probs, table = setting.view.probs(), setting.view.target_to_draft
    total, alive = 0.0, torch.ones(setting.batch.num_rows, dtype=torch.float64)
    for step, hidden in unroll(setting.model, setting.batch, 3):
        q = torch.softmax(setting.model.lm_head(hidden), -1)
        a = torch.zeros_like(alive)
        for row in range(len(alive)):
            if not setting.batch.mask(step)[row]:
                continue
            label = int(table[setting.batch.labels(step)[row]])
            token = q[row, label] if label >= 0 else torch.zeros(())
            a[row] = torch.minimum(q[row], probs[row + step]).sum() if acceptance == "overlap" else token
        alive = alive * a
        total = total + alive.sum()
    torch.testing.assert_close(loss, -total / setting.batch.num_rows)
    loss.backward()
    found = setting.model.fc.weight.grad.clone()
    setting.model.zero_grad(set_to_none=True)
    (-total / setting.batch.num_rows).backward()
    torch.testing.assert_close(found, setting.model.fc.weight.grad)


def test_the_cross_entropy_can_stand_beside_it(setting):
    alone = ExpectedAcceptedLength(ttt_steps=2).loss(setting.batch, setting.model, setting.view).loss
    steps = {"ttt_steps": 2, "step_weight": 0.3}
    both = ExpectedAcceptedLength(**steps, soft_weight=0.5).loss(setting.batch, setting.model, setting.view).loss
    soft = ForwardKL(**steps).loss(setting.batch, setting.model, setting.view).loss
    torch.testing.assert_close(both, alone + 0.5 * soft)


def test_tree_reward_by_hand():
    accept = torch.tensor([[[0.5, 0.5], [0.2, 0.0], [0.9, 0.9]]])
    lengths = torch.tensor([[2, 1, 0]])  # the third is no path
    assert tree_reward(accept, lengths, 1.0).item() == pytest.approx(math.log(math.exp(0.75) + math.exp(0.2)))
    assert tree_reward(accept, lengths, 200.0).item() == pytest.approx(0.75, abs=1e-3)


def test_group_trees_train_away_from_the_drafter_they_began_with(setting):
    model = make_setting().model
    objective = GroupTree(ttt_steps=2, anchors=5, depth=3, tree_budget=6, tree_top_k=3, anchor="off", m_steps=2)
    objective.begin(model)
    first = objective.loss(setting.batch, model, setting.view)
    assert first.loss.item() == pytest.approx(0.0, abs=1e-9), "at first nothing is better or worse than the reference"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(model.fc.weight, objective._reference.fc.weight)
    assert objective._reference.embeddings is model.embeddings, "what is frozen anyway is not copied"
    objective._rounds.clear()
    output = objective.loss(setting.batch, model, setting.view)
    known = objective._rounds[setting.batch.seed]
    output.loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    # At ratio 1 the gradient is that of the advantage-weighted log-likelihood.
    model.zero_grad(set_to_none=True)
    context = model.start(setting.batch)
    model.advance(context, setting.batch.inputs(0))
    likelihood = objective._log_likelihood(model, context.select(known.anchors), known)
    torch.testing.assert_close(likelihood.detach(), known.old)
    (-0.5 * (likelihood * known.advantage).mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)
    for span in setting.batch.spans:
        mine = (known.anchors >= span.first_row) & (known.anchors < span.first_row + span.num_rows)
        assert known.advantage[mine].mean().abs() < 1e-9
    assert known.advantage.abs().max() > 0.1


def test_ratios_are_clipped(setting):
    model = make_setting().model
    objective = GroupTree(ttt_steps=1, anchors=5, depth=2, tree_budget=4, tree_top_k=2, anchor="off", m_steps=2)
    objective.begin(make_setting(seed=5).model)
    objective.loss(setting.batch, model, setting.view)
    known = objective._rounds[setting.batch.seed]
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # likelihoods move far
    context = model.start(setting.batch)
    model.advance(context, setting.batch.inputs(0))
    ratio = torch.exp(objective._log_likelihood(model, context.select(known.anchors), known) - known.old)
    advantage = known.advantage
    expected = -0.5 * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(objective.loss(setting.batch, model, setting.view).loss, expected)
    assert ((ratio < 0.8) | (ratio > 1.2)).any(), "nothing was clipped, so the test shows nothing"
    assert not objective._rounds


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ExpectedAcceptedLength(acceptance="both"), "acceptance is 'both'"),
        (lambda: ExpectedAcceptedLength(soft_weight=-1), "soft_weight is -1"),
        (lambda: GroupTree(eta=0), "eta is 0"),
        (lambda: GroupTree(m_steps=5), "m_steps is 5"),
    ],
)
def test_wrong_options_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
