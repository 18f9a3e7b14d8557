"""A key-value cache for tree decoding: allocated once, written in place, compacted in place.

A forward over a tree writes its rows behind the committed length and attends to views of the buffers: nothing is
copied or concatenated. ``commit`` then moves the accepted rows together, for all layers in one operation, and rejected
rows are simply overwritten by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from transformers.cache_utils import Cache, CacheLayerMixin

from vsdbench.errors import ConfigError
from vsdbench.models.device import send_numbers


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One model layer's window on the shared buffers, in the form that transformers' attention expects."""

    def __init__(self, cache: PreallocatedCache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self._index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = _apart(self._cache.buffer("keys", key_states, self._index))
        self.values = _apart(self._cache.buffer("values", value_states, self._index))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self._cache.length
        stop = self._cache.room_for(key_states.shape[-2])
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.length + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.length

    def get_max_length(self) -> int:
        return self._cache.capacity


def _apart(view: Tensor) -> Tensor:
    """Return the same memory as a storage of its own: views of one, a compiler compares with each other for minutes.

    Only their sizes on a CPU are symbols to it, and such comparisons slow.
    """
    return from_dlpack(view) if view.device.type == "cpu" else view


class PreallocatedCache(Cache):  # type: ignore[misc]
    """Keys and values of one sequence, ``[num_layers, 1, num_kv_heads, capacity, head_dim]`` each.

    Layers of equal shape share one buffer, so that compaction is one gather a buffer and not one a layer.

    Args:
        num_layers: Layers of the model.
        capacity: Tokens that fit, the rows of a tree being verified included.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[_Layer(self, index) for index in range(num_layers)])
        self.length = 0
        self.capacity = capacity
        self._buffers: dict[tuple[str, int, int], Tensor] = {}

    def room_for(self, count: int) -> int:
        """Return the row behind ``count`` new ones.

        Raises:
            ConfigError: They do not fit.
        """
        stop = self.length + count
        if stop > self.capacity:
            raise ConfigError(
                f"{stop} tokens do not fit into a cache of {self.capacity}: use a smaller tree (budget, depth, "
                "top_k) or fewer new tokens."
            )
        return stop

    def whole(self, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all layers, ``[num_layers, 1, num_kv_heads, capacity, head_dim]`` each.

        Args:
            shape: Heads and width, the same in every layer.
            like: Of the cache's dtype and device.
        """
        if ("keys", *shape) not in self._buffers:
            none = like.new_empty(1, shape[0], 0, shape[1])
            for layer in self.layers:
                layer.lazy_initialization(none, none)
        return self._buffers["keys", *shape], self._buffers["values", *shape]

    def buffer(self, name: str, states: Tensor, index: int) -> Tensor:
        """Return layer ``index``'s buffer for states of this shape, ``[1, num_kv_heads, capacity, head_dim]``."""
        key = (name, states.shape[1], states.shape[3])
        if key not in self._buffers:
            self._buffers[key] = self._allocate(key, states)
        return self._buffers[key][index]

    def _allocate(self, key: tuple[str, int, int], states: Tensor) -> Tensor:
        _, heads, width = key
        shape = (len(self.layers), 1, heads, self.capacity, width)
        return torch.zeros(shape, dtype=states.dtype, device=states.device)

    def reset(self) -> None:
        """Forget the sequence; the buffers stay."""
        self.length = 0

    @torch.inference_mode()  # the buffers are inference tensors, which refuse to be written outside of it
    def commit(self, rows: Sequence[int], there: Tensor | None = None) -> None:
        """Keep ``rows`` (increasing, relative to the committed length) of the last forward, drop the others.

        Args:
            rows: The rows.
            there: The same on the buffers' device, if they are there already.
        """
        count = len(rows)
        start = self.length
        if rows[-1] != count - 1:  # otherwise the kept rows already stand together
            first = next(i for i, row in enumerate(rows) if row != i)
            if there is None:
                there = send_numbers(rows, self.device)
            source = there[first:] + start
            for buffer in self._buffers.values():
                buffer[..., start + first : start + count, :] = buffer.index_select(-2, source)
        self.length += count

    @property
    def device(self) -> torch.device:
        """Where the buffers are that were allocated so far; the CPU where a model keeps none here."""
        return next((buffer.device for buffer in self._buffers.values()), torch.device("cpu"))

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers allocated so far."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class CachePool:
    """Caches of sequences that are decoded together, over common buffers, so that one kernel may read them all.

    Args:
        num_layers: Layers of the model.
        num_slots: Sequences that fit.
        capacity: Tokens that fit into each, as in ``PreallocatedCache``.

    Attributes:
        caches: One a slot.
        buffers: ``[num_layers, num_slots, num_kv_heads, capacity, head_dim]`` by name, heads and width.
    """

    def __init__(self, num_layers: int, num_slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.buffers: dict[tuple[str, int, int], Tensor] = {}
        self.caches = [PooledCache(num_layers, self, slot) for slot in range(num_slots)]

    @torch.inference_mode()
    def move(self, cache: PooledCache, slot: int) -> PooledCache:
        """Copy a sequence into another slot and return that slot's cache."""
        for buffer in self.buffers.values():
            buffer[:, slot, :, : cache.length] = buffer[:, cache.slot, :, : cache.length]
        self.caches[slot].length = cache.length
        return self.caches[slot]


class PooledCache(PreallocatedCache):
    """One slot of a pool."""

    def __init__(self, num_layers: int, pool: CachePool, slot: int) -> None:
        super().__init__(num_layers, pool.capacity)
        self._pool = pool
        self.slot = slot

    def _allocate(self, key: tuple[str, int, int], states: Tensor) -> Tensor:
        buffers, (_, heads, width) = self._pool.buffers, key
        if key not in buffers:
            shape = (len(self.layers), len(self._pool.caches), heads, self.capacity, width)
            buffers[key] = torch.zeros(shape, dtype=states.dtype, device=states.device)
        return buffers[key][:, self.slot : self.slot + 1]
