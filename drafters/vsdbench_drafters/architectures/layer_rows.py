"""Rows of one forward of a draft layer (see ``one_layer_drafter``).

Shape legend: n rows of one forward, m keys or rows of a prompt, H width, W width of the attention's input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PromptRows(NamedTuple):
    """What a prompt with images puts into the layer.

    Attributes:
        x: ``[m, W]`` inputs of the attention.
        residual: ``[m, H]``.
        positions: ``[m]`` int64, in increasing order.
    """

    x: Tensor
    residual: Tensor
    positions: Tensor


class LayerRows(NamedTuple):
    """Arguments of ``CachedLayer.forward``.

    Attributes:
        hidden: ``[n, H]``.
        tokens: ``[n]`` target ids.
        positions: Their positions: n of them, or one for all.
        row: First cache row to write.
        hide: ``[n, m]`` bool, which of the last m keys, the n new ones included, a row must not see; None: of none.
    """

    hidden: Tensor
    tokens: Tensor
    positions: slice
    row: int
    hide: Tensor | None


def later(count: int, device: torch.device) -> Tensor:
    """Return ``[count, count]`` bool: rows behind the own one."""
    own = torch.arange(count, device=device)
    return own[None] > own[:, None]
