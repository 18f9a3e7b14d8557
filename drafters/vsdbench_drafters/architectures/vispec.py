"""ViSpec (arXiv 2509.15235): an EAGLE layer that reads an image as a few vectors in place of hundreds.

A small attention with ``num_q`` learned queries (tensors ``imadpt``) sums every image up, from its embeddings as they
enter the target's first layer. All but the last of its outputs stand in the drafter's sequence where the image's last
pieces stood, at their positions; the other pieces have no slot, so the drafter's cache and its attention stay as short
as a text prompt's. The last output is the image's global feature: ``img_fc`` adds it to the target's feature of every
token behind the image, the drafted ones included. A prompt's text before its first image has zeros in its place. As in
the public code, an image is a run of its pieces: images without a word between them are read as one.

    h  = img_fc([feature or last output, global feature of the last image])
    x  = fc([embed(next token), h])        at slots followed by text
    x  = imadpt(image embeddings)[i]       at the last ``num_q - 1`` slots followed by a piece of an image

``img_fc`` starts as the identity of its first half. The rest is EAGLE-1/2's. Tensor names are those of the public
checkpoints, which load; their ``num_q`` is that of ``imadpt.q``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vsdbench_drafters.architectures.checkpoints import loader
from vsdbench_drafters.architectures.eagle import EagleConfig, EagleModel
from vsdbench_drafters.architectures.one_layer import Entered
from vsdbench_drafters.architectures.vispec_drafter import ViSpecLayer, first_standing, runs

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer
    from vsdbench_drafters.objectives.base import DraftBatch


class ViSpecConfig(EagleConfig):
    """Dimensions of one drafter.

    Attributes:
        num_q: Vectors that an image is summed up in: ``num_q - 1`` that stand in its place, and the global one.
    """

    label: ClassVar[str] = "ViSpec"
    described_as: ClassVar[dict[str, Any]] = {"architectures": ["LlamaForCausalLMViSpec"]}
    num_q: int = Field(default=2, ge=1)


class ImageAdaptor(nn.Module):
    """Attention of learned queries to an image's pieces.

    Args:
        config: Heads and width are those of the drafter's layer, with a key-value head for every query head.
    """

    def __init__(self, config: ViSpecConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.q = nn.Parameter(torch.zeros(config.num_q, heads, width))
        self.k_proj = nn.Linear(config.hidden_size, heads * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, heads * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)

    def forward(self, pieces: Tensor) -> Tensor:
        """Return ``[num_q, H]`` made from ``[n, H]`` embeddings of an image's pieces."""
        heads, width = self.q.shape[1:]
        keys = self.k_proj(pieces).view(-1, heads, width).transpose(0, 1)
        values = self.v_proj(pieces).view(-1, heads, width).transpose(0, 1)
        mixed = F.scaled_dot_product_attention(self.q.transpose(0, 1).to(keys.dtype)[None], keys[None], values[None])[0]
        out: Tensor = self.o_proj(mixed.transpose(0, 1).flatten(1))
        return out


class ViSpecModel(EagleModel):
    """The trainable drafter: EAGLE's layer, ``imadpt`` and ``img_fc``."""

    name: ClassVar[str] = "vispec"
    layer_class: ClassVar[type[CachedLayer]] = ViSpecLayer
    config_class: ClassVar[type[EagleConfig]] = ViSpecConfig
    config: ViSpecConfig

    def __init__(self, config: ViSpecConfig, embeddings: Tensor, draft_ids: Tensor, head: Tensor) -> None:
        super().__init__(config, embeddings, draft_ids, head)
        self.imadpt = ImageAdaptor(config)
        self.img_fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)

    def randomise(self, seed: int) -> None:
        """Draw all matrices and the adaptor's queries; ``img_fc`` passes its first half through."""
        super().randomise(seed)
        queries = self.imadpt.q
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            queries.copy_(torch.empty(queries.shape).normal_(0.0, queries.shape[-1] ** -0.5, generator=generator))
            self.img_fc.weight.copy_(torch.eye(*self.img_fc.weight.shape))
            if self.img_fc.bias is not None:
                self.img_fc.bias.zero_()

    def recall(self, hidden: Tensor, picture: Tensor | None) -> Tensor:
        """Return ``[n, H]`` hidden states with the last image's global feature added."""
        assert picture is not None  # every context has one: zeros where there was no image
        out: Tensor = self.img_fc(torch.cat([hidden, picture.to(hidden.dtype)], dim=-1))
        return out

    def enter(self, batch: DraftBatch, embedded: Tensor, hidden: Tensor) -> Entered:
        """Return the text's slots, and a few for every image in place of its own.

        Raises:
            ConfigError: An image has fewer pieces than vectors would stand for it.
        """
        known = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # 0: no image; i: the i-th
        shows = batch.shows_image
        if shows is None:
            picture = torch.zeros_like(hidden)
            return Entered(self.mix(embedded, self.recall(hidden, picture))[0], None, picture)
        summaries: list[Tensor] = []
        kept, standing = ~shows, self.config.num_q - 1
        places: list[Tensor] = []
        for span in batch.spans:
            end = span.start + span.length
            for first, stop in runs(shows[span.start : end - 1]):
                summaries.append(self.imadpt(embedded[span.start + first : span.start + stop]))
                place = torch.arange(first_standing(first, stop, standing), stop, device=hidden.device) + span.start
                kept[place] = True
                known[span.start + stop : end] = len(summaries)
                places.append(place)
        stacked = torch.stack(summaries) if summaries else hidden.new_zeros(0, standing + 1, hidden.shape[1])
        table = torch.cat([hidden.new_zeros(1, hidden.shape[1]), stacked[:, -1].to(hidden.dtype)])
        picture = table[known]
        slots = kept.nonzero()[:, 0]
        x, _ = self.mix(embedded[slots], self.recall(hidden[slots], picture[slots]))
        if places:
            at = torch.searchsorted(slots, torch.cat(places))
            x = x.index_put((at,), stacked[:, :-1].flatten(0, 1).to(x.dtype))
        return Entered(x, slots, picture)

    @classmethod
    def shown_by(cls, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the fields of the config that a checkpoint's tensors say, ``num_q`` among them."""
        queries = tensors.get("imadpt.q")
        return super().shown_by(tensors) | ({} if queries is None else {"num_q": queries.shape[0]})

    @classmethod
    def from_target(cls, target: Target, draft_ids: Tensor, *, seed: int, num_q: int = 2, **options: Any) -> Self:  # noqa: ANN401 - of subclasses
        """Return a fresh drafter that reads every image as ``num_q`` vectors (see ``EagleModel.from_target``)."""
        return super().from_target(target, draft_ids, seed=seed, num_q=num_q, **options)


build = loader(ViSpecModel)
