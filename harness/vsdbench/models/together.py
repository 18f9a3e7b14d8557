"""Sequences that are decoded together: a cache for each, and one forward over all their trees.

Trees are ragged and nothing is padded where it costs: the rows of all trees stand one behind the other and go through
the linear layers as one matrix. In attention alone every sequence has as many rows as the largest tree and as many keys
as the longest sequence, hidden by the mask where there are none, so that one kernel a layer serves them all.

With one place this is ``Target.prefill`` and ``Target.forward_tree`` as they are.

Shape legend: B sequences, T rows of all trees (roots included), n rows of the largest tree, K keys of the longest
sequence, A query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.decoding.interfaces import TargetOutput, TokenTree
from vsdbench.decoding.structure import ancestor_mask, row_depths
from vsdbench.errors import ConfigError
from vsdbench.models import attention
from vsdbench.models.device import send_numbers
from vsdbench.models.kv_cache import CachePool, PooledCache
from vsdbench.models.native_layers import sequence_rows

if TYPE_CHECKING:
    from vsdbench.models.state import SequenceState
    from vsdbench.models.target import Target


def check_together(target: Target, size: int) -> None:
    """See that a target can decode so many sequences at once.

    Raises:
        ConfigError: Its attention serves one sequence alone.
    """
    if size > 1 and target.attention != attention.NAME:
        raise ConfigError(
            f"'{target.name}' runs with attention '{target.attention}', which decodes one sequence at a time: use "
            "batch size 1, or another target."
        )


class Together:
    """Places for sequences of one target.

    Args:
        target: The target.
        size: Sequences that are decoded at once, at most.
        capacity: Rows that each cache must hold, scratch rows of a tree included.

    Raises:
        ConfigError: The target's attention serves one sequence alone.
    """

    def __init__(self, target: Target, size: int, capacity: int) -> None:
        self.target = target
        self._size = size
        self.capacity = capacity
        if size == 1:
            return
        check_together(target, size)
        pool = target.pool
        if pool is None or len(pool.caches) < size or pool.capacity < capacity:
            target.pool = None  # the old one goes before the new one comes
            target.pool = pool = CachePool(target.num_layers, size, capacity)
        self._pool = pool
        self._free = list(range(size))

    def prefill(self, prompt: Sequence[int]) -> SequenceState:
        """Return the state of a sequence after its prompt, in a free place; raises as ``Target.prefill``."""
        if self._size == 1:
            return self.target.prefill(prompt, self.capacity)
        cache = self._pool.caches[min(self._free)]
        state = self.target.prefill(prompt, self.capacity, cache)
        self._free.remove(cache.slot)
        return state

    def leave(self, state: SequenceState) -> None:
        """Give the place of a sequence to others."""
        if isinstance(state.cache, PooledCache):
            self._free.append(state.cache.slot)

    @torch.inference_mode()
    def forward_trees(self, states: Sequence[SequenceState], trees: Sequence[TokenTree]) -> list[TargetOutput]:
        """Return what ``Target.forward_tree`` gives for each sequence and its tree, by one forward.

        Args:
            states: All sequences that have a place.
            trees: One each.
        """
        if self._size == 1:
            return [self.target.forward_tree(states[0], trees[0])]
        self._close_gaps(states)
        order = sorted(range(len(states)), key=lambda index: _slot(states[index]))
        rows = _Rows(self.target, self._pool, [states[i] for i in order], [trees[i] for i in order])
        logits, features = rows.run()
        parts = zip(order, torch.split(logits, rows.counts), torch.split(features, rows.counts), strict=True)
        outputs = {index: TargetOutput(*part) for index, *part in parts}
        return [outputs[index] for index in range(len(states))]

    def _close_gaps(self, states: Sequence[SequenceState]) -> None:
        """Move sequences so that they fill the first slots: one kernel reads these as they lie."""
        highest = sorted(states, key=_slot)
        for gap in set(range(len(states))) - {_slot(state) for state in states}:
            state = highest.pop()
            self._free.append(_slot(state))
            self._free.remove(gap)
            state.cache = self._pool.move(self._pool.caches[_slot(state)], gap)


def _slot(state: SequenceState) -> int:
    assert isinstance(state.cache, PooledCache)
    return state.cache.slot


class _Rows:
    """The rows of one forward: where the keys and values of each go, and what it attends to.

    Args:
        target: The target.
        pool: Its caches.
        states: B sequences; the i-th lies in slot i.
        trees: One each.
    """

    def __init__(
        self, target: Target, pool: CachePool, states: Sequence[SequenceState], trees: Sequence[TokenTree]
    ) -> None:
        self._target, self._pool = target, pool
        self._committed = committed = [state.cache.length for state in states]
        self.counts = counts = [len(tree) + 1 for tree in trees]
        self._most = max(counts)
        self._reach = max(map(sum, zip(committed, counts, strict=True)))
        if self._reach > pool.capacity:
            raise ConfigError(f"{self._reach} tokens do not fit into a cache of {pool.capacity}: use a smaller tree.")
        device = self._device = target.device
        pieces = ((state.last_tokens(1), tree.tokens) for state, tree in zip(states, trees, strict=True))
        self.ids = torch.cat(list(itertools.chain.from_iterable(pieces)))
        self._positions = torch.cat(
            [row_depths(tree.depths, device) + start for tree, start in zip(trees, committed, strict=True)]
        )
        self._even = min(counts) == self._most
        starts = list(itertools.accumulate(counts, initial=0))[:-1]
        both = list(zip(starts, counts, strict=True))
        parts = {
            "before": committed,
            "offsets": [
                state.position_offset for state, count in zip(states, counts, strict=True) for _ in range(count)
            ],
            # Where every row stands among B x n, and the row that stands at each of these (any, where there is none).
            "places": [i * self._most + row for i, count in enumerate(counts) for row in range(count)],
            "filled": [start + min(row, count - 1) for start, count in both for row in range(self._most)],
            "columns": [i * pool.capacity + c + row for i, c in enumerate(committed) for row in range(counts[i])],
        }
        sent = send_numbers(list(itertools.chain.from_iterable(parts.values())), device)  # one copy for all of them
        there = dict(zip(parts, torch.split(sent, [len(part) for part in parts.values()]), strict=True))
        self._before, self._offsets = there["before"], there["offsets"]
        self._places, self._filled, self._columns = there["places"], there["filled"], there["columns"]
        self._vectors: dict[int, Tensor] = {}
        self._masks = self._make_masks(trees)

    def run(self) -> tuple[Tensor, Tensor]:
        """Return ``[T, V]`` logits and ``[T, 4H]`` features."""
        positions = self._positions + self._offsets
        logits = self._target.run(self.ids, positions, self._masks, None, layers=self._run_fused, together=self)
        return logits, self._target.features()

    def _run_fused(
        self, embedded: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor], _: None, kept: dict[int, Tensor]
    ) -> Tensor:
        """Return what the target's ``FusedLayers`` do, with the attention of this file."""
        fused = self._target.fused_layers
        assert fused is not None
        if fused.native is not None and fused.native.takes(len(embedded)):
            buffers = self._pool.buffers["keys", *fused.shape], self._pool.buffers["values", *fused.shape]
            return fused.run_native(embedded, positions, masks, buffers, self._lines(masks, buffers[0]), kept=kept)

        def attend(index: int, *parts: Tensor) -> Tensor:
            return self.attend(index, parts, fused.mask_of(index, masks), fused.scaling)

        return fused.run(embedded, positions, attend, kept)

    def _lines(self, masks: Tensor | dict[str, Tensor], buffer: Tensor) -> Tensor:
        """Return where rows, keys and masks of the sequences are."""
        mask = next(iter(masks.values())) if isinstance(masks, dict) else masks
        slots, lengths = torch.arange(len(self.counts)), torch.tensor(self._committed)
        strides = torch.full_like(slots, buffer.stride(2))
        return sequence_rows(
            torch.tensor(self.counts), lengths, slots * buffer.stride(1), strides, slots * mask.shape[-2]
        )

    def attend(self, layer: int, parts: Sequence[Tensor], mask: Tensor, scaling: float | None) -> Tensor:
        """Return ``[T, A * D]``; the T keys and values are written into the caches first.

        Args:
            layer: Index of the layer.
            parts: Queries ``[T, A, D]``, keys ``[T, G, D]`` and values ``[T, G, D]``.
            mask: ``[B, 1, A / G * n or n or 1, K]`` additive.
            scaling: Of the scores; None means 1 / sqrt(D).
        """
        queries, keys, values = parts
        count, size = len(self.counts), self._most
        seen = []
        for name, new in (("keys", keys), ("values", values)):
            heads, width = new.shape[1:]
            buffer = self._pool.buffers[name, heads, width][layer]
            buffer.view(-1, width).index_copy_(0, self._in_storage(heads), new.reshape(-1, width))
            seen.append(buffer[:count, :, : self._reach])
        groups = queries.shape[1] // keys.shape[1]
        if not self._even:
            queries = queries.index_select(0, self._filled)
        # Query heads of a group stand along the query axis, so that keys and values are not repeated.
        stacked = queries.reshape(count, size, keys.shape[1], groups, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if mask.shape[-2] == size:
            mask = attention.stack_mask(mask, groups)
        mixed = F.scaled_dot_product_attention(stacked, seen[0], seen[1], attn_mask=mask, scale=scaling)
        width = mixed.shape[-1]
        mixed = mixed.view(count, -1, groups, size, width).permute(0, 3, 1, 2, 4).reshape(count * size, -1)
        return mixed if self._even else mixed.index_select(0, self._places)

    def _in_storage(self, heads: int) -> Tensor:
        """Return ``[T * G]`` indices into a layer's buffer seen as vectors."""
        if heads not in self._vectors:
            capacity = self._pool.capacity
            first = self._columns + self._columns // capacity * ((heads - 1) * capacity)  # of head 0
            every = torch.arange(0, heads * capacity, capacity, device=self._device)
            self._vectors[heads] = (first[:, None] + every).flatten()
        return self._vectors[heads]

    def _make_masks(self, trees: Sequence[TokenTree]) -> Tensor | dict[str, Tensor]:
        """Return what ``Target`` makes masks of; rows that no tree has see the sequence."""
        before = self._before
        keys = torch.arange(self._reach, device=self._device)
        key_positions = keys.expand(len(trees), -1)
        if self._most == 1:
            visible = (keys <= before[:, None])[:, None]
        else:
            visible = (keys < before[:, None])[:, None].repeat(1, self._most, 1)
            key_positions = key_positions.clone()
            for index, (tree, start, own) in enumerate(
                zip(trees, self._committed, torch.split(self._positions, self.counts), strict=True)
            ):
                stop = start + len(tree) + 1
                visible[index, : len(tree) + 1, start:stop] = ancestor_mask(tree.parents, self._device)
                key_positions[index, start:stop] = own
        positions = self._positions if self._even else self._positions[self._filled]
        positions = positions.view(len(trees), -1)
        return self._target.masks.of(positions, visible, key_positions)
