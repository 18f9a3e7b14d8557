"""MSD (arXiv 2505.14260): an EAGLE layer for targets that see, in which visual tokens pass the fusion by.

EAGLE's ``fc`` mixes the target's feature with the embedding of the token that follows. For a piece of an image both
say the same and neither is a word, so MSD feeds such a slot the image's own embedding, as it enters the target's first
layer, and leaves ``fc`` to the text: ``h = fc([embed(next token), feature])`` at slots followed by text, ``h = image
embedding`` at slots followed by a piece of an image. All else is EAGLE-1/2's, tensor names too, so a public checkpoint
of MSD loads, and one of EAGLE (a drafter trained on text alone) does as well.

The source trains on text first and then on more and more images; here that is a matter of the recipe: a warm start on
text, and ``data.text_share`` of the data that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vsdbench_drafters.architectures.checkpoints import loader
from vsdbench_drafters.architectures.eagle import EagleConfig, EagleModel
from vsdbench_drafters.architectures.msd_drafter import MsdLayer
from vsdbench_drafters.architectures.one_layer import Entered

if TYPE_CHECKING:
    from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer
    from vsdbench_drafters.objectives.base import DraftBatch


class MsdConfig(EagleConfig):
    """Dimensions of one drafter."""

    label: ClassVar[str] = "MSD"
    described_as: ClassVar[dict[str, Any]] = {"architectures": ["LlamaForCausalLMMsd"]}


class MsdModel(EagleModel):
    """The trainable drafter; its tensors are those of an EAGLE checkpoint."""

    name: ClassVar[str] = "msd"
    layer_class: ClassVar[type[CachedLayer]] = MsdLayer
    config_class: ClassVar[type[EagleConfig]] = MsdConfig

    def enter(self, batch: DraftBatch, embedded: Tensor, hidden: Tensor) -> Entered:
        """Return ``fc`` of both at slots followed by text, the embedding as it is at those followed by an image."""
        fused, _ = self.mix(embedded, hidden)
        if batch.shows_image is None:
            return Entered(fused)
        return Entered(torch.where(batch.shows_image[:, None], embedded.to(fused.dtype), fused))


build = loader(MsdModel)
