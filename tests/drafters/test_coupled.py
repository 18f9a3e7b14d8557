"""The objective of coupled trees: by hand, its gradient, what it draws, and where it leads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vsdbench import registry
from vsdbench.decoding.coupling import NOISE_WEIGHT
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.coupled import Coupled, gumbel_noise, race_cross_entropy
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def operands():
    logits = 2 * torch.randn(6, 7, generator=generator(0), dtype=torch.float64)
    return logits, torch.softmax(2 * torch.randn(6, 7, generator=generator(1), dtype=torch.float64), dim=-1)


def objective_with(seed, **options):
    objective = Coupled(**options)
    objective._generator = generator(seed)
    return objective


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_closed_form_gradient_is_that_of_the_plain_function(weight, operands):
    logits, target = operands
    losses, gradient = objective_with(3, weight=weight).row_losses(logits.clone(), target)
    noise, variable = gumbel_noise(logits, generator(3)), logits.clone().requires_grad_()
    reference = race_cross_entropy(torch.softmax(variable, -1), target, noise, weight)
    torch.testing.assert_close(losses, reference)
    torch.testing.assert_close(gradient, torch.autograd.grad(reference.sum(), variable)[0])


def test_by_hand():
    """p = (1/4, 3/4), q even, noise (2, 0): the first wins, e^2 / 4 against 3 / 4, and has e : 1 at weight 1/2."""
    found = race_cross_entropy(
        torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]]), torch.tensor([[2.0, 0.0]]), 0.5
    )
    assert found.item() == pytest.approx(-math.log(math.e / (math.e + 1)))


def test_the_winner_is_drawn_from_the_target():
    target = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(20_000, -1)
    winners = (target.log() + gumbel_noise(target, generator(0))).argmax(-1)
    shares = torch.bincount(winners, minlength=4) / len(winners)
    torch.testing.assert_close(shares, target[0], atol=0.012, rtol=0)


def test_training_by_it_makes_drafter_and_target_win_the_same_races():
    """One row of free logits: what is learned for a weight is better at it than q = p, which is better than none."""
    target = torch.softmax(1.5 * torch.randn(8, generator=generator(4)), dim=-1)
    logits = torch.zeros(8)
    objective, optimiser = objective_with(5), torch.optim.Adam([logits.requires_grad_()], lr=0.05)
    for _ in range(300):
        _, gradient = objective.row_losses(logits.detach().expand(64, -1).clone(), target.expand(64, -1))
        logits.grad = gradient.mean(0)
        optimiser.step()
    noise = gumbel_noise(torch.empty(8000, 8), generator(6))

    def loss(probs, weight=NOISE_WEIGHT):
        return race_cross_entropy(probs.expand(8000, -1), target.expand(8000, -1), noise, weight).mean().item()

    learned = torch.softmax(logits.detach(), -1)
    assert loss(learned) < loss(target) < loss(target, weight=0.0)
    assert int(learned.argmax()) == int(target.argmax())


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="weight is -1"):
        Coupled(weight=-1)


def test_the_batch_decides_the_noise(toy_target, toy_sequences):
    model = Eagle3Model.from_target(toy_target, torch.arange(4, 50), seed=3)
    head = toy_target.model.get_output_embeddings().weight
    maker = BatchMaker(toy_sequences, OnlineFeatures(toy_target, toy_sequences), head, model)
    batch, view = maker.make(list(range(len(toy_sequences))))
    objective = registry.load("vsdbench.objectives", "coupled")(ttt_steps=2)
    first, again, other = (objective.loss(replace(batch, seed=seed), model, view).loss.item() for seed in (1, 1, 2))
    assert first == again != other
