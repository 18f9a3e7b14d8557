"""ViSpec at decode time: EAGLE's layer over a prompt whose images are summed up (see ``one_layer_drafter``).

``img_fc`` and ``fc`` are one product here: what a token's row adds to it for the last image is the same vector in every
step, so it is made once an image and a draft step costs what EAGLE's does.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle_drafter import EagleLayer
from vsdbench_drafters.architectures.layer_rows import PromptRows

if TYPE_CHECKING:
    from vsdbench_drafters.architectures.vispec import ViSpecModel


class ViSpecLayer(EagleLayer):
    """The layer with ViSpec's input.

    Args:
        model: Its weights are copied, cast and fused.
        dtype: Dtype of the products.
    """

    remembers_images: ClassVar[bool] = True

    def __init__(self, model: ViSpecModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        of_embedding, of_hidden = model.fc.weight.detach().chunk(2, dim=1)
        feature, picture = model.img_fc.weight.detach().chunk(2, dim=1)
        self.fc = self.product(torch.cat([of_embedding, of_hidden @ feature], dim=1))
        constant = torch.zeros(len(of_hidden), device=self.device)
        if model.fc.bias is not None and model.img_fc.bias is not None:
            constant = of_hidden @ model.img_fc.bias.detach() + model.fc.bias.detach()
        self._blind = self.cast(constant)
        self._picture = self.cast(of_hidden @ picture)
        self._adaptor = copy.deepcopy(model.imadpt).to(dtype).requires_grad_(requires_grad=False)
        self._standing = model.config.num_q - 1
        self.forget()

    def forget(self) -> None:
        """Forget the images of the sequence before."""
        self.fc_bias = self._blind

    def enter(self, hidden: Tensor, embedded: Tensor, shows_image: Tensor) -> PromptRows:
        """Return the text's rows and a few for every image; the last image is remembered."""
        kept = ~shows_image
        known = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)  # 0: no image; i: the i-th
        biases = [self._blind]
        standing: list[Tensor] = []
        places: list[Tensor] = []
        for first, stop in runs(shows_image):
            summary = self._adaptor(embedded[first:stop])
            biases.append(self._blind + self._picture @ summary[-1])
            place = torch.arange(first_standing(first, stop, self._standing), stop, device=hidden.device)
            kept[place] = True
            known[stop:] = len(places) + 1
            standing.append(summary[:-1])
            places.append(place)
        self.fc_bias = biases[-1]
        positions = kept.nonzero()[:, 0]
        x = self.fc(torch.cat([embedded[positions], hidden[positions]], dim=-1)) + torch.stack(biases)[known[positions]]
        if places:
            x[torch.searchsorted(positions, torch.cat(places))] = torch.cat(standing)
        return PromptRows(x, x, positions)


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Return ``(first, stop)`` of every run of True in a mask ``[n]``.

    >>> runs(torch.tensor([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    none = mask.new_zeros(1).to(torch.int8)
    edges = torch.diff(mask.to(torch.int8), prepend=none, append=none)
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


def first_standing(first: int, stop: int, standing: int) -> int:
    """Return the first of the last ``standing`` slots of an image's run.

    Raises:
        ConfigError: The run is shorter.
    """
    if stop - first < standing:
        raise ConfigError(
            f"an image has {stop - first} visual tokens, too few to be compressed to {standing}: lower "
            "architecture.num_q."
        )
    return stop - standing
