"""Losses against hand-computed values, fused against plain, and every row against the token that it has to predict."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.drafters.plain import cross_entropy, forward_kl

from vsdbench import registry
from vsdbench_drafters.architectures.eagle import EagleModel
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.objectives.base import DraftBatch, TargetView, unroll
from vsdbench_drafters.objectives.token import (
    CrossEntropy,
    ForwardKL,
    cross_entropy_rows,
    fused,
    soft_cross_entropy_rows,
    step_weights,
)
from vsdbench_drafters.training.features import BatchMaker, OnlineFeatures

ALL = torch.ones(1, dtype=torch.bool)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 0.0]])
    tokens = torch.tensor([1, 0, -1])  # the last one lies outside the draft vocabulary
    mask = torch.tensor([True, True, True])
    assert cross_entropy(logits, tokens, mask).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert cross_entropy(logits, tokens, torch.tensor([True, False, True])).item() == pytest.approx(math.log(4 / 3))
    assert cross_entropy(logits, tokens, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_forward_kl_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # q = (1/4, 3/4)
    soft_ce, kl = forward_kl(logits, torch.tensor([[0.5, 0.5]]), ALL)
    assert soft_ce.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    soft_ce, kl = forward_kl(logits, torch.tensor([[0.0, 1.0]]), ALL)  # a point mass: cross-entropy again, no NaN
    assert soft_ce.item() == pytest.approx(math.log(4 / 3))
    assert kl.item() == pytest.approx(math.log(4 / 3))
    assert forward_kl(logits, torch.tensor([[0.25, 0.75]]), ALL)[1].item() == pytest.approx(0.0, abs=1e-7)


def test_step_weights_decay_and_sum_to_one():
    weights = step_weights(4, 0.8)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(0.8)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    probs = torch.softmax(torch.randn(5, 7, generator=generator, dtype=torch.float64), dim=-1)
    weights = torch.tensor([0.5, 0.0, 0.2, 0.2, 0.1], dtype=torch.float64)
    return hidden, head, probs, weights


def test_fused_losses_pass_gradcheck(operands):
    hidden, head, probs, weights = operands
    assert torch.autograd.gradcheck(lambda h, w: fused(h, w, probs, weights, soft_cross_entropy_rows), (hidden, head))
    tokens = torch.tensor([0, 3, 6, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: fused(h, w, tokens, weights, cross_entropy_rows), (hidden, head))


def test_plain_losses_pass_gradcheck(operands):
    _, _, probs, weights = operands
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    tokens, mask = torch.tensor([0, 3, -1, 2, 2]), weights > 0
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, tokens, mask), logits)
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, probs, mask), logits)


@pytest.mark.parametrize("chunk_elements", [1, 14, 1 << 20])
def test_fused_equals_plain(operands, monkeypatch, chunk_elements):
    monkeypatch.setattr("vsdbench_drafters.objectives.token._CHUNK_ELEMENTS", chunk_elements)
    hidden, head, probs, _ = operands
    mask = torch.tensor([True, False, True, True, True])
    tokens = torch.tensor([0, 3, 6, 2, 2])
    for rows, targets, plain in (
        (soft_cross_entropy_rows, probs, lambda z: forward_kl(z, probs, mask)[0]),
        (cross_entropy_rows, tokens, lambda z: cross_entropy(z, tokens, mask)),
    ):
        loss = fused(hidden, head, targets, mask.double() / mask.sum(), rows)
        reference = plain(hidden @ head.T)
        torch.testing.assert_close(loss, reference)
        ours = torch.autograd.grad(3 * loss, (hidden, head))
        torch.testing.assert_close(ours, torch.autograd.grad(3 * reference, (hidden, head)))


def test_a_frozen_head_gets_no_gradient(operands):
    hidden, head, probs, weights = operands
    frozen = head.detach()
    fused(hidden, frozen, probs, weights, soft_cross_entropy_rows).backward()
    assert hidden.grad is not None
    assert frozen.grad is None


def test_slot_t_sees_token_t_plus_1_and_predicts_t_plus_2():
    ids = [10, 11, 12, 13, 14, 15, 16]
    batch = DraftBatch.pack([[1, 2, 3, 4], ids], [3, 4], torch.zeros(11, 3))
    # The response of the second sequence is 14, 15, 16: slots 2, 3, 4 predict them first.
    second = batch.spans[1]
    assert (second.first_slot, second.num_rows, second.first_row) == (2, 3, 1)
    assert batch.inputs(0).tolist() == [3, 13, 14, 15]
    assert batch.labels(0).tolist() == [4, 14, 15, 16]
    assert batch.mask(0).tolist() == [True] * 4
    assert batch.inputs(1)[1:3].tolist() == [14, 15]
    assert batch.labels(1)[1:3].tolist() == [15, 16]
    assert batch.mask(1).tolist() == [False, True, True, False]
    assert batch.mask(3).tolist() == [False] * 4
    assert batch.features.shape[0] == 11


@pytest.mark.parametrize(("length", "prompt_len", "num_rows"), [(4, 4, 0), (5, 4, 1), (3, 1, 1), (3, 0, 1), (1, 1, 0)])
def test_rows_are_responses_only(length, prompt_len, num_rows):
    batch = DraftBatch.pack([list(range(length))], [prompt_len], torch.zeros(length, 3))
    assert batch.num_rows == num_rows
    if num_rows and prompt_len >= 2:
        assert batch.labels(0).tolist() == list(range(prompt_len, length))


@pytest.fixture
def prepared(toy_target, toy_sequences):
    model = Eagle3Model.from_target(toy_target, torch.arange(4, 50), seed=3)
    head = toy_target.model.get_output_embeddings().weight
    maker = BatchMaker(toy_sequences, OnlineFeatures(toy_target, toy_sequences), head, model)
    return model, *maker.make([4, 1, 0])


def test_the_targets_view_is_its_distribution_of_the_predicted_token(prepared, toy_target, toy_sequences):
    _, batch, view = prepared
    row = 0
    for index, span in zip([4, 1, 0], batch.spans, strict=True):
        ids = toy_sequences[index].ids
        with torch.no_grad(), toy_target.as_shipped() as causal:
            logits = causal(torch.tensor([ids])).logits[0]
        for slot in range(span.first_slot, span.length - 2):
            expected = torch.softmax(logits[slot + 1, 4:50], dim=-1)  # after token t + 1: the one at t + 2
            torch.testing.assert_close(view.probs()[row], expected, rtol=1e-3, atol=1e-5)
            row += 1
    assert row == batch.num_rows


def test_kl_objective_is_the_weighted_mean_of_plain_losses(prepared):
    model, batch, view = prepared
    output = ForwardKL(ttt_steps=3, step_weight=0.5).loss(batch, model, view)
    expected = []
    for step, hidden in unroll(model, batch, 3):
        mask, terms = batch.mask(step), []
        logits = model.lm_head(hidden)
        for row in mask.nonzero()[:, 0].tolist():
            # At step i a row predicts what row + i of the same sequence predicts first.
            terms.append(forward_kl(logits[row : row + 1], view.probs()[row + step : row + step + 1], ALL)[0])
        expected.append(torch.stack(terms).mean())
    total = (expected[0] + 0.5 * expected[1] + 0.25 * expected[2]) / 1.75
    torch.testing.assert_close(output.loss, total)
    torch.testing.assert_close(output.metrics["loss_step_2"], expected[2].detach())


def test_ce_objective_masks_tokens_outside_the_draft_vocabulary(prepared):
    model, batch, view = prepared
    output = CrossEntropy(ttt_steps=2, step_weight=1.0).loss(batch, model, view)
    expected = []
    for step, hidden in unroll(model, batch, 2):
        labels = batch.labels(step)
        drafts = torch.where((labels >= 4) & (labels < 50), labels - 4, -1)
        expected.append(cross_entropy(model.lm_head(hidden), drafts, batch.mask(step)))
    assert (view.target_to_draft[batch.labels(0)] < 0).any()
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("name", ["ce", "kl", "eal", "feature"])
def test_an_answer_may_be_shorter_than_there_are_steps(toy_target, toy_sequences, name, number):
    """The last batch of an epoch may be one answer of two tokens: what lies behind its end counts nothing."""
    architecture = EagleModel if name == "feature" else Eagle3Model
    model = architecture.from_target(toy_target, torch.arange(64), seed=3)
    short = replace(toy_sequences[4], prompt_len=len(toy_sequences[4].ids) - number)
    head = toy_target.model.get_output_embeddings().weight
    batch, view = BatchMaker([short], OnlineFeatures(toy_target, [short]), head, model).make([0])
    assert batch.num_rows == number
    objective = registry.load("vsdbench.objectives", name)
    outputs = [objective(ttt_steps=steps).loss(batch, model, view) for steps in (number, 5)]
    outputs[1].loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for key, value in outputs[1].metrics.items():
        expected = outputs[0].metrics.get(key, torch.zeros(()))
        torch.testing.assert_close(value, expected, msg=key)


def test_gradients_flow_through_the_fed_back_hidden_state(prepared):
    model, batch, view = prepared
    second_only = ForwardKL(ttt_steps=2, step_weight=1.0)
    second_only.weights = [0.0, 1.0]
    second_only.loss(batch, model, view).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_view_keeps_double_precision():
    view = TargetView(torch.randn(2, 3).double(), torch.randn(4, 3).double(), torch.arange(4), torch.randn(9, 3))
    assert view.probs().dtype == torch.float64
    assert view.probs() is view.probs()
