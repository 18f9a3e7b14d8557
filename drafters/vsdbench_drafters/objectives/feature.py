"""Entry point ``feature``: the loss that EAGLE-1 and EAGLE-2 were published with (arXiv 2401.15077, 2406.16858).

A drafter that predicts the target's last hidden state learns it by regression, with a small share of cross-entropy
through the target's LM head. ``ttt_steps: 1`` is EAGLE's own training; with more, the drafter also learns from its own
predictions (HASS, arXiv 2408.15766). The token-level objectives train such a drafter too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench.models.device import send
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel, LossOutput, TargetView, unroll
from vsdbench_drafters.objectives.token import ForwardKL, mean_weights


def smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Return ``[R]`` the mean over H of ½ d² where |d| < 1 and |d| - ½ elsewhere, d = predicted - target.

    >>> smooth_l1(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 3.0]]))
    tensor([1.3125])
    """
    wide = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    return F.smooth_l1_loss(predicted.to(wide), target.to(wide), reduction="none").mean(-1)


class FeatureRegression(ForwardKL):
    """Entry point ``feature``: SmoothL1 of the target's last hidden state + 0.1 x soft cross-entropy (EAGLE-1/2).

    Args:
        ttt_steps: Steps of training-time test; 1 in the source.
        step_weight: Weight of step i is ``step_weight**i``.
        feature_weight: Of the regression.
        soft_weight: Of the cross-entropy.
        noise: The target's features are disturbed by U(-noise, noise) where the drafter reads them, never where it
            is compared with them. 0: not at all.
    """

    name = "feature"
    architectures: ClassVar[tuple[str, ...] | None] = ("eagle", "msd", "vispec")

    def __init__(
        self,
        *,
        ttt_steps: int = 1,
        step_weight: float = 0.8,
        feature_weight: float = 1.0,
        soft_weight: float = 0.1,
        noise: float = 0.1,
    ) -> None:
        super().__init__(ttt_steps=ttt_steps, step_weight=step_weight)
        for option, value in (("feature_weight", feature_weight), ("soft_weight", soft_weight), ("noise", noise)):
            if value < 0:
                raise ConfigError(f"feature: {option} is {value}; it may not be negative.")
        self.feature_weight, self.soft_weight, self.noise = feature_weight, soft_weight, noise

    def loss(self, batch: DraftBatch, drafter: DraftModel, target_view: TargetView) -> LossOutput:
        """Return the weighted mean of both terms over the steps.

        Raises:
            ConfigError: The drafter predicts no features.
        """
        if not drafter.predicts_features:
            raise ConfigError(
                f"objective 'feature' needs a drafter that predicts the target's last hidden state, and "
                f"{type(drafter).__name__} does not: train architecture 'eagle' with it."
            )
        disturbed = _disturbed(batch, target_view.hidden.shape[-1], self.noise)
        hidden = [states for _, states in unroll(drafter, disturbed, len(self.weights))]
        total = torch.zeros((), device=batch.tokens.device)
        metrics: dict[str, Tensor] = {}
        for step, soft in enumerate(self.step_losses(hidden, batch, drafter, target_view.probs())):
            keep = batch.paired(step)  # row r at this step predicts the feature that row r + step predicts first
            distances = smooth_l1(hidden[step][: len(keep)], target_view.hidden[step:])
            regression = (distances * mean_weights(keep.float())).sum()
            total = total + self.weights[step] * (self.feature_weight * regression + self.soft_weight * soft)
            metrics |= {f"feature_step_{step}": regression.detach(), f"loss_step_{step}": soft.detach()}
        return LossOutput(total, metrics)


def _disturbed(batch: DraftBatch, width: int, noise: float) -> DraftBatch:
    """Return the batch with noise on the last ``width`` features, which the batch's own seed decides."""
    if not noise:
        return batch
    generator = torch.Generator().manual_seed(batch.seed)
    drawn = noise * (2 * torch.rand(len(batch.tokens), width, generator=generator) - 1)
    features = batch.features.clone()
    features[:, -width:] += send(drawn, features.device).to(features.dtype)
    return replace(batch, features=features)
