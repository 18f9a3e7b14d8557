"""EAGLE-3 at decode time: what enters the layer and what its output means (see ``one_layer_drafter``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer

if TYPE_CHECKING:
    from vsdbench_drafters.architectures.eagle3 import Eagle3Model


class Eagle3Layer(CachedLayer):
    """The layer with EAGLE-3's inputs: embedding and hidden state, normed, side by side."""

    def __init__(self, model: Eagle3Model, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self._feature_width = model.fc.in_features
        self._embedding_norm = self.cast(model.midlayer.input_layernorm.weight)
        self._hidden_norm = self.cast(model.midlayer.hidden_norm.weight)
        self._final_norm = self.cast(model.norm.weight)

    def project(self, features: Tensor) -> Tensor:
        """Return ``[n, H]`` made from the three hidden states that enter layers of the target."""
        return self.fc(features[:, : self._feature_width].to(self.dtype))

    def mix(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, normed, side by side; the residual is ``hidden`` as it is."""
        both = self.norm(embedded, self._embedding_norm), self.norm(hidden, self._hidden_norm)
        return torch.cat(both, dim=-1), hidden

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return ``[n, Vd]`` float32 log-probabilities: final norm, then the drafter's own LM head."""
        return torch.log_softmax(self.head(self.norm(hidden, self._final_norm)), dim=-1, dtype=torch.float32)
