"""Objectives that compare the drafter's distribution q with the target's p by something else than forward KL.

Gradients are written down: for a loss with dL/dq = g, dL/dlogits is q (g - Σ q g). The tests hold every class against
automatic differentiation of the loss as its paper writes it.

Shape legend: R rows, Vd draft vocabulary. p is normalised over the draft vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.base import TINY
from vsdbench_drafters.objectives.token import DistributionObjective


class ReverseKL(DistributionObjective):
    """Entry point ``rkl``: Σ q log(q / p) along the data (DistillSpec, arXiv 2310.08461)."""

    name = "rkl"

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients q (log(q / p) - KL)."""
        draft = torch.softmax(logits, dim=-1)
        ratio = _log(draft) - _log(targets.to(draft.dtype))
        return (draft * ratio).sum(-1), _through_softmax(draft, ratio)


class JensenShannon(DistributionObjective):
    """Entry point ``jsd``: β KL(p ‖ m) + (1 - β) KL(q ‖ m) (DistillSpec, arXiv 2310.08461)."""

    name = "jsd"

    def __init__(self, *, ttt_steps: int = 4, step_weight: float = 0.8, beta: float = 0.5) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        if not 0 < beta < 1:
            raise ConfigError(f"jsd: beta is {beta}; it must lie between 0 and 1.")
        self.beta = beta

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients; dL/dq is (1 - β) log(q / m), since the other terms cancel."""
        draft, target = torch.softmax(logits, dim=-1), targets.to(logits.dtype)
        mixed = _log(self.beta * target + (1 - self.beta) * draft)
        ratio = _log(draft) - mixed
        towards_target = (target * (_log(target) - mixed)).sum(-1)
        losses = self.beta * towards_target + (1 - self.beta) * (draft * ratio).sum(-1)
        return losses, _through_softmax(draft, (1 - self.beta) * ratio)


class TotalVariation(DistributionObjective):
    """Entry point ``tvd``: ½ Σ |p - q|, one minus the acceptance of a sampled token (DistillSpec, arXiv 2310.08461)."""

    name = "tvd"

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients; dL/dq is ½ sign(q - p)."""
        draft = torch.softmax(logits, dim=-1)
        difference = draft - targets
        return 0.5 * difference.abs().sum(-1), _through_softmax(draft, 0.5 * difference.sign())


class TopK(DistributionObjective):
    """Entry point ``topk``: -Σ p log q over the target's k likeliest tokens (HASS, arXiv 2408.15766).

    HASS adds it to the loss of EAGLE; of that loss the soft cross-entropy stays here, with HASS's weight 0.1 (EAGLE-3
    has no feature loss). ``soft_weight: 0`` trains with the top-K term alone.
    """

    name = "topk"

    def __init__(self, *, ttt_steps: int = 4, step_weight: float = 0.8, k: int = 10, soft_weight: float = 0.1) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        if k < 1 or soft_weight < 0:
            raise ConfigError(f"topk: k is {k} and soft_weight {soft_weight}; use at least 1 and at least 0.")
        self.k, self.soft_weight = k, soft_weight

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the soft cross-entropy to p_topk + weight · p, which is both terms in one."""
        top = targets.topk(min(self.k, targets.shape[-1]), dim=-1)
        mixed = (self.soft_weight * targets).scatter_add_(-1, top.indices, top.values)
        log_q = torch.log_softmax(logits, dim=-1)
        losses = -(mixed * log_q).sum(-1)
        return losses, log_q.exp_().mul_(mixed.sum(-1, keepdim=True)).sub_(mixed)


class LogAcceptance(DistributionObjective):
    """Entry point ``lk``: LK losses of the acceptance α = Σ min(p, q) (arXiv 2602.23881).

    ``form: alpha`` is -log α; ``form: lambda`` is λ KL + (1 - λ) TV with λ = exp(-η α), α held constant a token.
    """

    name = "lk"

    def __init__(
        self,
        *,
        ttt_steps: int = 4,
        step_weight: float = 0.8,
        form: Literal["alpha", "lambda"] = "lambda",
        eta: float = 3.0,
    ) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        if form not in {"alpha", "lambda"}:
            raise ConfigError(f"lk: form is '{form}'; use 'alpha' or 'lambda'.")
        self.form, self.eta = form, eta

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients of the chosen form."""
        draft, target = torch.softmax(logits, dim=-1), targets.to(logits.dtype)
        if self.form == "alpha":
            accepted = torch.minimum(draft, target).sum(-1).clamp(min=TINY)
            return -accepted.log(), _through_softmax(draft, -(draft < target).to(draft.dtype) / accepted[:, None])
        difference = draft - target
        distance = 0.5 * difference.abs().sum(-1)
        share = torch.exp(-self.eta * (1 - distance))
        losses = share * (target * (_log(target) - _log(draft))).sum(-1) + (1 - share) * distance
        share = share[:, None]
        return losses, share * difference + (1 - share) * _through_softmax(draft, 0.5 * difference.sign())


def _through_softmax(draft_probs: Tensor, slope: Tensor) -> Tensor:
    """Return ``[R, Vd]`` dL/dlogits from dL/dq."""
    return draft_probs * (slope - (draft_probs * slope).sum(-1, keepdim=True))


def _log(probs: Tensor) -> Tensor:
    return probs.clamp(min=TINY).log()
