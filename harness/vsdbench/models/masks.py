"""Additive attention masks: of any tokens, and of a tree behind a context that all of it sees.

A tree sees its context whole, so what differs from step to step is the few columns of the tree itself. They are written
into one buffer that is zero everywhere else: a step's mask costs the same behind 256 tokens as behind 8,192.

Shape legend: n tokens of one forward, K keys (C committed ones and the new ones), g query heads a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsdbench.decoding.structure import ancestor_mask
from vsdbench.errors import ConfigError
from vsdbench.models import attention

_ALIGNMENT = 64
"""The buffer's width is a multiple of this, so that every row begins where fast kernels want it to."""
_KEPT_ROWS = 1024
"""Rows up to which the buffer is kept: a tree's, once for each query head of a group."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class ContextMask:
    """A mask over a context that all rows see whole; only its last columns differ, and only those are written.

    Args:
        dtype: Of the mask.
        device: Where it is.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.zeros(0, 0, dtype=dtype, device=device)
        self._written = slice(0, 0)

    def ending(self, last: Tensor, width: int) -> Tensor:
        """Return ``[rows, width]``, zero but for its last columns ``[rows, m]``; it holds until the next call."""
        rows, columns = last.shape
        if rows > _KEPT_ROWS:  # a prompt: once an answer, so nothing is kept for it
            return torch.cat([last.new_zeros(rows, width - columns), last], dim=1)
        have = self._buffer.shape
        if have[0] < rows or have[1] < width:
            wide = have[1] if have[1] >= width else max(2 * have[1], -(-width // _ALIGNMENT) * _ALIGNMENT)
            self._buffer = self._buffer.new_zeros(max(rows, have[0]), wide)
        self._buffer[:, self._written] = 0
        self._written = slice(width - columns, width)
        self._buffer[:rows, self._written] = last
        return self._buffer[:rows, :width]


class Masks:
    """Makes the masks of one model: one for all layers, or one a layer type where the model mixes them.

    Args:
        config: The model's text config.
        groups: g, where the model's attention takes masks that stand once for each query head of a group, else 1.
        name: What the user calls the model.
        dtype: Of the masks.
        device: Where they are wanted.

    Attributes:
        slides: Whether some layers see the newest keys alone.

    Raises:
        ConfigError: Some layers attend in a way that cannot verify a tree.
    """

    def __init__(self, config: Any, *, groups: int, name: str, dtype: torch.dtype, device: torch.device) -> None:  # noqa: ANN401 - of transformers
        self.window: int | None = getattr(config, "sliding_window", None)
        self._layer_types = set(getattr(config, "layer_types", None) or [])
        own = set(getattr(config, "attention_layers", None) or []) - {"global"}  # GPT-Neo's, which no mask can widen
        if unknown := (self._layer_types - _LAYER_TYPES) | own:
            raise ConfigError(
                f"'{name}' has layers of {', '.join(sorted(unknown))}, which cannot verify a tree: "
                "use a target whose layers are all of full or sliding attention."
            )
        self._groups, self._dtype, self._device = groups, dtype, device
        self.slides = self.window is not None and (not self._layer_types or "sliding_attention" in self._layer_types)
        self._tree = ContextMask(dtype, device)

    def of(self, positions: Tensor, visible: Tensor, key_positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the mask ``[1, 1, n or g * n, K]`` of any tokens.

        Args:
            positions: ``[n]`` positions. Where B sequences are masked at once, a dimension of B leads all of these.
            visible: ``[n, K]`` bool: which keys each token attends to.
            key_positions: ``[K]`` positions of the keys, for sliding windows.
        """
        if self.window is None or not self.slides:
            return self._of_types(self._additive(visible))
        windowed = self._additive(visible & (positions[..., None] - key_positions[..., None, :] < self.window))
        if not self._layer_types:  # Mistral: every layer slides
            return windowed
        return {"full_attention": self._additive(visible), "sliding_attention": windowed}

    def move(self, device: torch.device) -> None:
        """Make masks on another device from now on."""
        self._device, self._tree = device, ContextMask(self._dtype, device)

    def of_tree(self, parents: Sequence[int], positions: Tensor, committed: int) -> Tensor | dict[str, Tensor]:
        """Return the mask of a root and its tree; it holds until the next call.

        Args:
            parents: Of the tree's N nodes, n = N + 1.
            positions: ``[n]`` positions, the root's first.
            committed: C, all of which every row sees.
        """
        among = ancestor_mask(parents, self._device)
        if self.slides:
            visible = torch.cat([among.new_ones(len(among), committed), among], dim=1)
            return self.of(positions, visible, torch.cat([torch.arange(committed, device=self._device), positions]))
        last = self._additive(among)[0, 0]
        return self._of_types(self._tree.ending(last, committed + len(among))[None, None])

    def _additive(self, keep: Tensor) -> Tensor:
        mask = torch.zeros(keep.shape, dtype=self._dtype, device=self._device)
        mask = mask.masked_fill_(~keep, torch.finfo(self._dtype).min).view(-1, 1, *keep.shape[-2:])
        return attention.stack_mask(mask, self._groups)  # once, and not once a layer

    def _of_types(self, mask: Tensor) -> Tensor | dict[str, Tensor]:
        return dict.fromkeys(self._layer_types, mask) if len(self._layer_types) > 1 else mask
