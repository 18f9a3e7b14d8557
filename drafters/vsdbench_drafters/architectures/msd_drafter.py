"""MSD at decode time: EAGLE's layer, whose prompt shows images as they are (see ``one_layer_drafter``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench_drafters.architectures.eagle_drafter import EagleLayer
from vsdbench_drafters.architectures.one_layer_drafter import OneLayerDrafter, PromptRows

if TYPE_CHECKING:
    from vsdbench_drafters.architectures.msd import MsdModel


class MsdLayer(EagleLayer):
    """The layer with MSD's input: ``fc`` of embedding and feature, or the image's embedding alone."""

    def enter(self, hidden: Tensor, embedded: Tensor, shows_image: Tensor) -> PromptRows:
        """Return ``fc`` of both at slots followed by text, the embedding as it is at those followed by an image."""
        fused, _ = self.mix(embedded, hidden)
        x = torch.where(shows_image[:, None], embedded, fused)
        return PromptRows(x, x, torch.arange(len(x), device=x.device))


class MsdDrafter(OneLayerDrafter):
    """Proposes trees with one MSD layer (protocol ``Drafter``).

    Args:
        model: The trained drafter.
        dtype: Dtype of its products, usually the target's.
    """

    def __init__(self, model: MsdModel, *, dtype: torch.dtype) -> None:
        super().__init__("msd", MsdLayer(model, dtype), model)
