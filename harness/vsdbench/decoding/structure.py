"""The shape of a tree in both places that need it: on the device for masks and positions, on the host for the walk.

A shape that is known beforehand is sent to the device once and stays there. One that grew on the device is read by the
host only with all else that it needs for its decision (``models.device.fetch``).

Shape legend: N draft tokens, S slots of a growing tree, M slots that are added.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.models.device import send_numbers


class Numbers(Sequence[int]):
    """Parents or depths that a device made. How many is known; the host waits for the rest unless it was told.

    Args:
        there: ``[N]`` int64.
        deepest: Depth that no node of the tree exceeds.
    """

    def __init__(self, there: Tensor, deepest: int) -> None:
        self.there, self.deepest = there, deepest
        self._here: list[int] | None = None

    def tell(self, here: list[int]) -> None:
        """Take what they are."""
        self._here = here

    @property
    def here(self) -> list[int]:
        """What they are."""
        if self._here is None:
            self._here = self.there.tolist()
        return self._here

    def __len__(self) -> int:
        return len(self.there)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.here[index]


def deepest(depths: Sequence[int]) -> int:
    """Return a depth that no node exceeds, without waiting for a device."""
    return depths.deepest if isinstance(depths, Numbers) else max(depths, default=0)


def extended(numbers: Sequence[int], count: int, value: int) -> Sequence[int]:
    """Return parents or depths with ``count`` more nodes of one value."""
    if isinstance(numbers, Numbers):
        there = torch.cat([numbers.there, numbers.there.new_full((count,), value)])
        return Numbers(there, max(numbers.deepest, 1))
    more = (value,) * count
    return [*numbers, *more] if isinstance(numbers, list) else (*numbers, *more)


def row_depths(depths: Sequence[int], device: torch.device) -> Tensor:
    """Return ``[N + 1]`` int64, the depth of every row, the root's first; it must not be written to."""
    if isinstance(depths, Numbers):
        return F.pad(depths.there, (1, 0))
    return send_numbers([0, *depths], device) if isinstance(depths, list) else _kept_depths(tuple(depths), device)


def ancestor_mask(parents: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return ``[N + 1, N + 1]`` bool: row r may attend to row c if c is r itself, its ancestor, or the root.

    It must not be written to: that of a shape that will come again is kept.

    >>> ancestor_mask([-1, 0, -1]).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    """
    if isinstance(parents, Numbers):
        return _climb(parents)
    device = device or torch.device("cpu")
    return _mask(parents, device) if isinstance(parents, list) else _kept_mask(tuple(parents), device)


class Ancestry:
    """Which slots of a growing tree each one sees: its ancestors and itself (slots as in ``growing.LevelScorer``)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._count = 0
        self._seen: Tensor | None = None  # by the root and all slots but the newest; None while the tree is a chain
        self._newest: Tensor | None = None

    def add(self, parent_slots: Tensor) -> Tensor | None:
        """Return ``[M, S + M]`` bool: what M more slots see, None if that is all; ``parent_slots`` are ``[M]``."""
        first, count = self._count, len(parent_slots)
        self._count += count
        if self._seen is None:
            if count == 1:
                return None
            self._seen = torch.ones(first + 1, first, dtype=torch.bool, device=self._device).tril(-1)
        elif self._newest is not None:
            self._seen = torch.cat([F.pad(self._seen, (0, first - self._seen.shape[1])), self._newest])
        own = torch.eye(count, dtype=torch.bool, device=self._device)
        self._newest = torch.cat([self._seen.index_select(0, parent_slots + 1), own], dim=1) if first else own
        return self._newest


def _mask(parents: Sequence[int], device: torch.device) -> Tensor:
    lines = [[0] * (len(parents) + 1) for _ in range(len(parents) + 1)]
    lines[0][0] = 1
    for node, parent in enumerate(parents):
        lines[node + 1] = list(lines[parent + 1])
        lines[node + 1][node + 1] = 1
    return send_numbers(lines, device, torch.bool)


_kept_mask = functools.lru_cache(maxsize=64)(_mask)


@functools.lru_cache(maxsize=64)
def _kept_depths(depths: tuple[int, ...], device: torch.device) -> Tensor:
    return send_numbers([0, *depths], device)


def _climb(parents: Numbers) -> Tensor:
    """Return the mask on the device, by steps that double how far up every row sees."""
    above = F.pad(parents.there + 1, (1, 0))  # the row over each row; the root's is itself
    mask = torch.eye(len(above), dtype=torch.bool, device=above.device)
    for _ in range(parents.deepest.bit_length()):
        mask = mask | mask.index_select(0, above)
        above = above.index_select(0, above)
    return mask
