"""Objectives of the accepted length itself: ``eal`` along the data, ``gto`` on the tree that decoding would send.

Both couple the tokens of a path, so a token's loss is not known when its logits are: ``rows_of`` keeps the gradient of
each row's own value, and autograd weights it by what the others turn out to be.

Shape legend: R rows, A anchors, S paths, L depth, Vd draft vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench.models.device import send_numbers
from vsdbench_drafters.objectives.base import TINY, DraftBatch, DraftContext, DraftModel, LossOutput, TargetView, unroll
from vsdbench_drafters.objectives.path_objective import PathObjective, check_choice
from vsdbench_drafters.objectives.paths import Paths, Scores, Trie, trace, tree_paths
from vsdbench_drafters.objectives.token import ForwardKL, RowLosses, cross_entropy_rows
from vsdbench_drafters.objectives.vsd.utility import expected_length

_CHUNK_ROWS = 128


def rows_of(hidden: Tensor, head: Tensor, targets: Tensor, row_losses: RowLosses) -> Tensor:
    """Return ``[R]`` the value of every row's logits ``hidden @ head.T``, differentiable.

    As ``token.fused``, for values that are combined otherwise than by a weighted sum: ``[R, Vd]`` gradients are kept.

    Args:
        hidden: ``[R, H]``.
        head: ``[Vd, H]``.
        targets: ``[R, ...]``.
        row_losses: See ``token.RowLosses``.
    """
    values: Tensor = _Rows.apply(hidden, head, targets, row_losses)  # type: ignore[no-untyped-call]
    return values


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, row_losses: RowLosses) -> Tensor:  # noqa: ANN401
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(hidden.dtype)
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            values = torch.empty(len(hidden), dtype=wide, device=hidden.device)
            gradients = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
            for first in range(0, len(hidden), _CHUNK_ROWS):
                rows = slice(first, first + _CHUNK_ROWS)
                values[rows], gradients[rows] = row_losses((hidden[rows] @ weight.T).to(wide), targets[rows])
        ctx.save_for_backward(hidden, head, gradients)
        return values

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # noqa: ANN401
        hidden, head, gradients = ctx.saved_tensors
        weighted = gradients * grad_output[:, None].to(gradients.dtype)
        grad_head = (weighted.T @ hidden).to(head.dtype) if ctx.needs_input_grad[1] else None
        return weighted @ head.to(hidden.dtype), grad_head, None, None


def overlap_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ min(p, q), the chance that a sampled token is accepted, and its gradient by the logits."""
    q = torch.softmax(logits, dim=-1)
    slope = (q < targets).to(q.dtype)
    return torch.minimum(q, targets.to(q.dtype)).sum(-1), q * (slope - (q * slope).sum(-1, keepdim=True))


def token_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return q(y), the chance that the data's own token is drafted, and its gradient; ``targets`` are draft ids."""
    q = torch.softmax(logits, dim=-1)
    picked = q.gather(-1, targets[:, None])
    return picked[:, 0], -(q * picked).scatter_add_(-1, targets[:, None], -picked)


class ExpectedAcceptedLength(ForwardKL):
    """Entry point ``eal``: -E[accepted length] along the data, -Σ_j ∏_{t ≤ j} a_t (arXiv 2609.24150, 2606.11552).

    The sources' forms are inferred. A row whose path would leave its sequence ends there.

    Args:
        ttt_steps: Longest path.
        step_weight: Of the cross-entropy, if there is any.
        acceptance: ``overlap``: a = Σ min(p, q); ``token``: a = q(y) of the data's own token.
        soft_weight: Weight of EAGLE-3's soft cross-entropy beside it.
    """

    name = "eal"

    def __init__(
        self,
        *,
        ttt_steps: int = 4,
        step_weight: float = 0.8,
        acceptance: Literal["overlap", "token"] = "overlap",
        soft_weight: float = 0.0,
    ) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        check_choice(self.name, "acceptance", acceptance, ("overlap", "token"))
        if soft_weight < 0:
            raise ConfigError(f"eal: soft_weight is {soft_weight}; it may not be negative.")
        self.acceptance, self.soft_weight = acceptance, soft_weight

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return minus the mean expected accepted length, and the cross-entropy if it has a weight."""
        probs = target_view.probs()
        hidden = [states for _, states in unroll(drafter, batch, len(self.weights))]
        accepts = []
        for step, states in enumerate(hidden):
            keep = batch.paired(step)
            if self.acceptance == "overlap":
                values = rows_of(states[: len(keep)], drafter.head(step), probs[step:], overlap_rows)
            else:
                labels = target_view.target_to_draft[batch.labels(step)][: len(keep)]
                keep = keep & (labels >= 0)
                values = rows_of(states[: len(keep)], drafter.head(step), labels.clamp(min=0), token_rows)
            accepts.append(F.pad(values * keep, (0, len(states) - len(keep))))
        length = expected_length(torch.stack(accepts, dim=-1)).mean()
        terms = self.step_losses(hidden, batch, drafter, probs) if self.soft_weight else []
        soft = sum((weight * term for weight, term in zip(self.weights, terms, strict=False)), start=0.0)
        metrics = {f"acceptance_step_{i}": a.detach().mean() for i, a in enumerate(accepts)}
        return LossOutput(self.soft_weight * soft - length, metrics | {"expected_length": length.detach()})


def tree_reward(accept: Tensor, lengths: Tensor, eta: float) -> Tensor:
    """Return ``[A]`` (1 / η) log Σ_i exp(η L_i) over the paths of each tree, L_i their expected accepted lengths.

    Source: GTO, arXiv 2509.22134: a smooth maximum, so that one good path is enough.

    Args:
        accept: ``[A, S, L]`` target probabilities of the paths' tokens, 0 behind a path's end.
        lengths: ``[A, S]`` of the paths; 0 fills up.
        eta: η.
    """
    expected = expected_length(accept).masked_fill(lengths == 0, -torch.inf)
    return torch.logsumexp(eta * expected, dim=-1) / eta


@dataclass(frozen=True, slots=True)
class _Round:
    anchors: Tensor
    paths: Paths
    trie: Trie
    best: Tensor
    old: Tensor
    advantage: Tensor
    reward: Tensor
    left: int


class GroupTree(PathObjective):
    """Entry point ``gto``: Group Tree Optimization (arXiv 2509.22134).

    Reward of an anchor's draft tree: a smooth maximum of its paths' expected accepted lengths under the target. What a
    place in the text is worth anyway is taken out by the reward of the drafter that training began with, at the same
    place; what is left is standardised within a sequence (the group) and weights the likelihood of the tree's best path
    by PPO's clipped ratio, length-normalised. The choice of that path is this project's reading of the paper.

    Args:
        omega: Weight of the tree term beside the anchor loss.
        eta: η of the smooth maximum.
        clip: ε of PPO.
        m_steps: Optimiser steps on one set of trees. With one, as other objectives have, the ratio is 1 and nothing is
            clipped.
        base: See ``PathObjective``; ``paths`` and ``proposals`` have no meaning here.
    """

    name = "gto"

    def __init__(
        self,
        *,
        omega: float = 0.5,
        eta: float = 1.0,
        clip: float = 0.2,
        m_steps: int = 1,
        **base: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**base, proposals="tree")
        for option, value in (("eta", eta), ("clip", clip)):
            if value <= 0:
                raise ConfigError(f"gto: {option} is {value}; it must be above 0.")
        if not 1 <= m_steps <= 4:
            raise ConfigError(f"gto: m_steps is {m_steps}; use 1 to 4.")
        self.omega, self.eta, self.clip, self.m_steps = omega, eta, clip, m_steps
        self._reference: DraftModel | None = None
        self._rounds: dict[int, _Round] = {}

    def begin(self, drafter: DraftModel) -> None:
        """Remember the drafter as it is before training: the one that debiases rewards."""
        shared = {id(buffer): buffer for buffer in drafter.buffers()}
        self._reference = copy.deepcopy(drafter, shared).requires_grad_(requires_grad=False)

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the anchor loss and the clipped surrogate of the tree reward."""
        known = self._rounds.pop(batch.seed, None)
        generator = torch.Generator().manual_seed(batch.seed)
        anchors = known.anchors if known else self.place(batch, generator)
        terms, branch = self.walk(batch, drafter, target_view, anchors)
        if known is None:
            known = self._plant(batch, drafter, target_view, anchors, branch)
        if known.left > 1:
            self._rounds[batch.seed] = replace(known, left=known.left - 1)
        ratio = torch.exp(self._log_likelihood(drafter, branch, known) - known.old)
        surrogate = torch.minimum(
            ratio * known.advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * known.advantage
        ).mean()
        metrics = {"tree_reward": known.reward.mean(), "loss_tree": -surrogate.detach()}
        return self.beside_anchor(-self.omega * surrogate, terms, metrics)

    def _plant(
        self, batch: DraftBatch, drafter: DraftModel, view: TargetView, anchors: Tensor, branch: DraftContext
    ) -> _Round:
        """Grow trees with the drafter as it is and with the reference, and compare their rewards."""
        if self._reference is None:
            self.begin(drafter)
        assert self._reference is not None
        with torch.no_grad():
            paths, trie, scores = self._tree(batch, drafter, view, anchors, branch)
            context = self._reference.start(batch)
            self._reference.advance(context, batch.inputs(0))
            frozen, frozen_trie, frozen_scores = self._tree(
                batch, self._reference, view, anchors, context.select(anchors)
            )
        accept = scores.target[trie.rows, paths.tokens] * paths.valid
        frozen_accept = frozen_scores.target[frozen_trie.rows, frozen.tokens] * frozen.valid
        reward = tree_reward(accept, paths.lengths, self.eta)
        gain = reward - tree_reward(frozen_accept, frozen.lengths, self.eta)
        best = expected_length(accept).masked_fill(paths.lengths == 0, -torch.inf).argmax(-1)
        chosen = torch.arange(len(best), device=best.device)
        q = scores.draft[trie.rows, paths.tokens].clamp(min=TINY).log() * paths.valid
        old = q[chosen, best].sum(-1) / paths.lengths[chosen, best].clamp(min=1)
        return _Round(anchors, paths, trie, best, old, _standardise(gain, batch, anchors), reward, self.m_steps)

    def _tree(
        self, batch: DraftBatch, drafter: DraftModel, view: TargetView, anchors: Tensor, branch: DraftContext
    ) -> tuple[Paths, Trie, Scores]:
        paths = tree_paths(drafter, branch, budget=self.tree_budget, top_k=self.tree_top_k, depth=self.depth)
        trie, _, scores = self.score(batch, drafter, view, anchors, branch, paths)
        return paths, trie, scores

    @staticmethod
    def _log_likelihood(drafter: DraftModel, branch: DraftContext, known: _Round) -> Tensor:
        """Return ``[A]`` mean log q of the tokens of each tree's best path."""
        hidden = trace(drafter, branch, known.trie)
        chosen = torch.arange(len(known.best), device=hidden.device)
        rows, tokens = known.trie.rows[chosen, known.best], known.paths.tokens[chosen, known.best]
        owner, place = known.paths.valid[chosen, known.best].nonzero(as_tuple=True)
        losses = rows_of(hidden[rows[owner, place]], drafter.head(), tokens[owner, place], cross_entropy_rows)
        sums = losses.new_zeros(len(chosen)).index_add(0, owner, -losses)
        return sums / known.paths.lengths[chosen, known.best].clamp(min=1)


def _standardise(gain: Tensor, batch: DraftBatch, anchors: Tensor) -> Tensor:
    """Return gains less their sequence's mean, over its deviation; a sequence with one anchor gives 0."""
    result = torch.zeros_like(gain)
    bounds = send_numbers([span.first_row + span.num_rows for span in batch.spans], anchors.device)
    first = 0
    for stop in torch.searchsorted(anchors, bounds).tolist():  # anchors stand in increasing order
        if stop > first + 1:
            group = gain[first:stop]
            result[first:stop] = (group - group.mean()) / (group.std() + 1e-6)
        first = stop
    return result
