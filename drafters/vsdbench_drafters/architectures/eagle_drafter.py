"""EAGLE-1 and EAGLE-2 at decode time: what enters the layer and what its output means (see ``one_layer_drafter``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer

if TYPE_CHECKING:
    from vsdbench_drafters.architectures.eagle import EagleModel


class EagleLayer(CachedLayer):
    """The layer with EAGLE's input: ``fc`` of embedding and feature; its output is a feature of the target."""

    def __init__(self, model: EagleModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.fc_bias = None if model.fc.bias is None else self.cast(model.fc.bias)

    def project(self, features: Tensor) -> Tensor:
        """Return the target's last normed hidden states as they are."""
        return features[:, -self.config.hidden_size :].to(self.dtype)

    def mix(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``fc`` of both, which is the residual too."""
        x = self.fc(torch.cat([embedded, hidden], dim=-1))
        x = x if self.fc_bias is None else x + self.fc_bias
        return x, x

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return ``[n, Vd]`` float32 log-probabilities of the target's LM head."""
        return torch.log_softmax(self.head(hidden).float(), dim=-1)
