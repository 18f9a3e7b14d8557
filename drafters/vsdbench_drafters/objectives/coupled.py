"""The objective of trees that read the numbers of the draw (``vsdbench.decoding.coupling``): to name the winner.

Where drafter and target share Gumbel noise g, the target emits y = argmax(log p + g), and the drafter expects y with
probability softmax(log q + w g)[y]. Its negative logarithm is the loss; g is drawn anew for every row and step. KL asks
the drafter for p, whatever is then done with it; this asks for what names the target's draw once the noise is known, by
the rule that decoding uses. A row counts as far as the noise leaves the race open.

In the terms of ``vsd``: with g given, the path that verification keeps is known, it is the target's own; so the
posterior over paths is a point, the bound on the probability of a long path is tight, and the E-step costs nothing.
Ours; the coupling is that of arXiv 2408.07978.

Shape legend: R rows, Vd draft vocabulary. p is normalised over the draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench.decoding.coupling import NOISE_WEIGHT
from vsdbench.errors import ConfigError
from vsdbench_drafters.objectives.token import DistributionObjective, cross_entropy_rows

if TYPE_CHECKING:
    from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, LossOutput, TargetView


def race_cross_entropy(draft_probs: Tensor, target_probs: Tensor, gumbel: Tensor, weight: float) -> Tensor:
    """Return ``[R]`` -log softmax(log q + w g)[argmax(log p + g)].

    >>> p, q = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]])
    >>> race_cross_entropy(q, p, torch.tensor([[2.0, 0.0]]), 0.5)  # the first one wins, and is expected to
    tensor([0.3133])
    """
    winners = (target_probs.log() + gumbel).argmax(-1, keepdim=True)
    return -torch.log_softmax(draft_probs.log() + weight * gumbel, dim=-1).gather(-1, winners)[:, 0]


def gumbel_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard Gumbel noise of the shape, dtype and device of a tensor."""
    waits = torch.empty_like(like).exponential_(generator=generator)
    return waits.clamp_(min=torch.finfo(like.dtype).tiny).log_().neg_()


class Coupled(DistributionObjective):
    """Entry point ``coupled``: the cross-entropy of the target's draw, whose noise the drafter knows.

    Args:
        weight: w, what the noise counts for; decoding's own by default. 0 is cross-entropy on a fresh draw.
    """

    name = "coupled"

    def __init__(self, *, ttt_steps: int = 4, step_weight: float = 0.8, weight: float = NOISE_WEIGHT) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        if weight < 0:
            raise ConfigError(f"coupled: weight is {weight}; it may not be negative.")
        self.weight = weight

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the weighted mean over the steps; the batch's seed draws the noise."""
        self._generator = torch.Generator(batch.tokens.device).manual_seed(batch.seed)
        return super().loss(batch, drafter, target_view)

    def row_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients softmax(log q + w g) - 1[y]."""
        noise = gumbel_noise(logits, self._generator)
        winners = targets.to(logits.dtype).log().add_(noise).argmax(-1)
        return cross_entropy_rows(logits.add_(noise, alpha=self.weight), winners)
