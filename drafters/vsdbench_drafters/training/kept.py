"""What the target says of every token while it answers, kept so that drafters need no second forward over the answer.

Decoding computes the very states that features are made of (``features``), and the keys and values lie in its cache.

Shape legend: S slots, C columns of a slot, T tokens of one forward, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Keeps:
    """What is kept of the tokens of an answer and its prompt.

    Attributes:
        layers: The states that enter these are kept, and the last normed one (``Target.feature_layers``).
        keys: Keys and values are kept too.
    """

    layers: tuple[int, ...]
    keys: bool = False


class KeptStates:
    """The states of every slot so far, ``[S + 1, C, 4H]``: slot S has the shared prefix of all."""

    def __init__(self, layers: Sequence[int], slots: int, columns: int) -> None:
        self._layers = tuple(layers)
        self._shape = slots + 1, columns
        self._states = torch.empty(0)

    def wanted(self) -> dict[int, Tensor]:
        """Return what a forward is asked to fill with the states that enter layers (``FusedLayers.run``)."""
        return dict.fromkeys(self._layers, torch.empty(0))

    def put(self, place: tuple[Tensor, Tensor], entering: dict[int, Tensor], last: Tensor) -> None:
        """Note the states of T tokens.

        Args:
            place: ``[T]`` slots, and ``[T]`` columns.
            entering: ``[1, T, H]`` by layer.
            last: ``[T, H]``.
        """
        found = torch.cat([*(entering[layer][0] for layer in self._layers), last], dim=-1)
        if not len(self._states):
            self._states = found.new_zeros(*self._shape, found.shape[-1])
        self._states[place] = found

    def copy_prefix(self, slots: Tensor, length: int) -> None:
        """Give slots ``[n]`` the states of the shared prefix."""
        self._states[slots, :length] = self._states[-1, :length]

    def take(self, slot: int, length: int) -> Tensor:
        """Return ``[length, 4H]`` of a slot."""
        return self._states[slot, :length].clone()
