"""Divergences by hand, their closed-form gradients against automatic differentiation, and what each is minimal at."""

from __future__ import annotations

import math

import pytest
import torch
from tests.drafters.plain import (
    acceptance_mixture,
    jensen_shannon,
    log_acceptance,
    reverse_kl,
    top_k_cross_entropy,
    total_variation,
)

from vsdbench import registry
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.divergence import (
    JensenShannon,
    LogAcceptance,
    ReverseKL,
    TopK,
    TotalVariation,
)
from vsdbench_drafters.objectives.token import fused, soft_cross_entropy_rows
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures

SOFT = 0.1


def soft_and_top(draft, target):
    return top_k_cross_entropy(draft, target, k=3) - SOFT * (target * draft.log()).sum(-1)


CASES = [
    pytest.param(ReverseKL(), reverse_kl, id="rkl"),
    pytest.param(JensenShannon(), jensen_shannon, id="jsd"),
    pytest.param(JensenShannon(beta=0.1), lambda q, p: jensen_shannon(q, p, 0.1), id="jsd-0.1"),
    pytest.param(TotalVariation(), total_variation, id="tvd"),
    pytest.param(TopK(k=3), soft_and_top, id="topk"),
    pytest.param(TopK(k=3, soft_weight=0), lambda q, p: top_k_cross_entropy(q, p, k=3), id="topk-alone"),
    pytest.param(LogAcceptance(form="alpha"), log_acceptance, id="lk-alpha"),
    pytest.param(LogAcceptance(form="lambda"), acceptance_mixture, id="lk-lambda"),
    pytest.param(LogAcceptance(form="lambda", eta=0.5), lambda q, p: acceptance_mixture(q, p, 0.5), id="lk-0.5"),
]


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    target = torch.softmax(2 * torch.randn(6, 7, generator=generator, dtype=torch.float64), dim=-1)
    return logits, target


def test_by_hand():
    draft, target = torch.tensor([[0.5, 0.5, 1e-9]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert reverse_kl(draft, target).item() == pytest.approx(0.5 * math.log(0.5 / 0.2))
    assert total_variation(draft, target).item() == pytest.approx(0.3)
    assert log_acceptance(draft, target).item() == pytest.approx(-math.log(0.7))
    assert top_k_cross_entropy(draft, target, k=1).item() == pytest.approx(-0.5 * math.log(0.5))
    middle = [0.35, 0.5, 0.15]
    by_hand = 0.5 * (0.2 * math.log(0.2 / 0.35) + 0.3 * math.log(0.3 / 0.15)) + 0.5 * (0.5 * math.log(0.5 / 0.35))
    assert jensen_shannon(draft, target).item() == pytest.approx(by_hand)
    assert sum(middle) == pytest.approx(1)
    draft = torch.tensor([[0.5, 0.25, 0.25]])
    share = math.exp(-3 * 0.7)
    forward = 0.2 * math.log(0.4) + 0.5 * math.log(2) + 0.3 * math.log(1.2)
    assert acceptance_mixture(draft, target).item() == pytest.approx(share * forward + (1 - share) * 0.3)


@pytest.mark.parametrize(("objective", "plain"), CASES)
def test_closed_form_gradients_are_those_of_the_plain_function(objective, plain, operands):
    logits, target = operands
    losses, gradient = objective.row_losses(logits.clone(), target)
    variable = logits.clone().requires_grad_()
    reference = plain(torch.softmax(variable, dim=-1), target)
    torch.testing.assert_close(losses, reference)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference.sum(), variable)[0])
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64))  # a softmax ignores shifts


@pytest.mark.parametrize(("objective", "plain"), CASES)
def test_the_fused_loss_uses_them_with_the_row_weights(objective, plain, operands):
    _, target = operands
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.2, 0.1], dtype=torch.float64)
    loss = fused(hidden, head, target, weights, objective.row_losses)
    reference = (weights * plain(torch.softmax(hidden @ head.T, dim=-1), target)).sum()
    torch.testing.assert_close(loss, reference)
    ours = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(ours, torch.autograd.grad(reference, (hidden, head)))


@pytest.mark.parametrize(
    "objective", [ReverseKL(), JensenShannon(), LogAcceptance(form="alpha"), LogAcceptance()], ids=lambda o: o.name
)
def test_no_distribution_is_better_than_the_targets_own(objective, operands):
    _, target = operands
    best, _ = objective.row_losses(target.log(), target)
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 0.3, 2.0):
        noise = size * torch.randn(target.shape, generator=generator, dtype=torch.float64)
        assert (objective.row_losses(target.log() + noise, target)[0] > best).all()
    torch.testing.assert_close(best, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_top_k_of_the_whole_vocabulary_is_soft_cross_entropy(operands):
    logits, target = operands
    losses, gradient = TopK(k=99, soft_weight=0).row_losses(logits.clone(), target)
    expected, slope = soft_cross_entropy_rows(logits.clone(), target)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: JensenShannon(beta=1.0), "beta is 1.0"),
        (lambda: TopK(k=0), "k is 0"),
        (lambda: LogAcceptance(form="gamma"), "form is 'gamma'"),
    ],
)
def test_options_out_of_range_are_refused(build, said):
    with pytest.raises(ConfigError, match=said):
        build()


@pytest.mark.parametrize("name", ["ce", "kl", "rkl", "jsd", "tvd", "topk", "lk", "coupled"])
def test_every_registered_objective_teaches_the_drafter_something(name, toy_target, toy_sequences):
    model = Eagle3Model.from_target(toy_target, torch.arange(4, 50), seed=3)
    head = toy_target.model.get_output_embeddings().weight
    maker = BatchMaker(toy_sequences, OnlineFeatures(toy_target, toy_sequences), head, model)
    batch, view = maker.make(list(range(len(toy_sequences))))
    objective = registry.load("vsdbench.objectives", name)(ttt_steps=2)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective.loss(batch, model, view).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert objective.name == name
    assert losses[-1] < 0.95 * losses[0]  # soft cross-entropies have the entropy of p as their floor
