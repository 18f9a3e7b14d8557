"""Rows and keys of several sequences as one tensor with an axis of sequences, for attention in one product.

A batch is packed: sequences stand one behind the other, and few operations see them apart. Attention must, and a loop
over sequences would cost a call each for little work, in both directions.

Shapes: B sequences, R rows of all of them, r rows of the sequence with most, K packed keys, L keys of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsdbench.models.device import send, send_numbers

_NEVER = torch.iinfo(torch.int64).max  # position of a key that is none


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values of B sequences; what stands behind a shorter one's last is never seen.

    Attributes:
        keys: ``[B, G, L, D]``. ``values``: likewise.
        positions: ``[B, L]`` int64, of each key in its sequence.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor, ranges: Sequence[tuple[int, int]]) -> Keys:
        """Return packed keys side by side.

        Args:
            keys: ``[K, G, D]``.
            values: ``[K, G, D]``.
            positions: ``[K]`` int64.
            ranges: First key of each sequence, and one behind its last.
        """
        firsts, stops = send_numbers(ranges, keys.device).view(-1, 2, 1).unbind(1)
        every = firsts + torch.arange(max((stop - first for first, stop in ranges), default=0), device=keys.device)
        there, shape = every.clamp(max=len(keys) - 1).flatten(), (*every.shape, *keys.shape[1:])
        padded = [part.index_select(0, there).view(shape).transpose(1, 2) for part in (keys, values)]
        seen = positions.index_select(0, there).view(every.shape).masked_fill(every >= stops, _NEVER)
        return cls(padded[0], padded[1], seen)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows are whose.

    Attributes:
        owners: ``[R]`` int64, the sequence of each row, in increasing order.
        places: ``[R]`` int64, where each stands among ``B * r``.
        shape: B and r.
    """

    owners: Tensor
    places: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, owners: Tensor, count: int, most: int | None = None) -> Rows:
        """Return the places of rows.

        Args:
            owners: ``[R]`` int64, in increasing order.
            count: B.
            most: r; None: it is found, for which a GPU is read once.
        """
        every = torch.arange(count, device=owners.device)
        firsts, ends = (torch.searchsorted(owners, every, right=right) for right in (False, True))
        if most is None:
            most = int((ends - firsts).max()) if count else 0
        places = owners * most + torch.arange(len(owners), device=owners.device) - firsts[owners]
        return cls(owners, places, (count, most))

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device) -> Rows:
        """Return the places of rows that stand sequence by sequence, so many of each."""
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        return cls.of(send(owners, device), len(lengths), max(lengths, default=0))

    def spread(self, rows: Tensor) -> Tensor:
        """Return ``[R, ...]`` rows as ``[B, r, ...]``, zeros where there is none."""
        there = rows.new_zeros(self.shape[0] * self.shape[1], *rows.shape[1:])
        return there.index_copy(0, self.places, rows).view(*self.shape, *rows.shape[1:])

    def gather(self, spread: Tensor) -> Tensor:
        """Return the ``[R, ...]`` rows of what ``spread`` made, or of what became of it."""
        return spread.flatten(0, 1).index_select(0, self.places)
