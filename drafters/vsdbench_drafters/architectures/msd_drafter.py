"""MSD at decode time: EAGLE's layer, whose prompt shows images as they are (see ``one_layer_drafter``)."""

from __future__ import annotations

import torch
from torch import Tensor

from vsdbench_drafters.architectures.eagle_drafter import EagleLayer
from vsdbench_drafters.architectures.layer_rows import PromptRows


class MsdLayer(EagleLayer):
    """The layer with MSD's input: ``fc`` of embedding and feature, or the image's embedding alone."""

    def enter(self, hidden: Tensor, embedded: Tensor, shows_image: Tensor) -> PromptRows:
        """Return ``fc`` of both at slots followed by text, the embedding as it is at those followed by an image."""
        fused, _ = self.mix(embedded, hidden)
        x = torch.where(shows_image[:, None], embedded, fused)
        return PromptRows(x, x, torch.arange(len(x), device=x.device))
