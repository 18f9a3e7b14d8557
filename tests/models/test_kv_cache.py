"""The cache: what is committed stands where a plain cache would have it, whatever the tree was."""

from __future__ import annotations

import pytest
import torch

from vsdbench.errors import ConfigError
from vsdbench.models.kv_cache import PreallocatedCache

LAYERS, HEADS, WIDTH, CAPACITY = 3, 2, 4, 12


def states(first, count, layer, width=WIDTH):
    """Rows whose values say which row of which layer they are."""
    rows = torch.arange(first, first + count, dtype=torch.float64)[:, None] + 100 * layer
    return rows.expand(1, HEADS, count, width).contiguous()


def write(cache, first, count):
    views = []
    for layer in range(LAYERS):
        keys = states(first, count, layer)
        views.append(cache.update(keys, keys + 0.5, layer))
    return views


def kept(cache, layer=0):
    rows = cache.layers[layer].keys[0, 0, : cache.length, 0] - 100 * layer
    return rows.tolist()


@pytest.fixture
def cache():
    return PreallocatedCache(LAYERS, CAPACITY)


def test_a_forward_sees_committed_rows_and_its_own(cache):
    write(cache, 0, 3)
    cache.length = 3
    for layer, (keys, values) in enumerate(write(cache, 10, 2)):
        assert (keys[0, 1, :, 0] - 100 * layer).tolist() == [0, 1, 2, 10, 11]
        torch.testing.assert_close(values, keys + 0.5)
    assert cache.length == 3  # nothing is committed by a forward


@pytest.mark.parametrize(
    "rows", [[0], [0, 1], [0, 1, 2, 3], [0, 2], [0, 3, 4], [0, 1, 4], [0, 4], [0, 2, 3, 4]], ids=str
)
def test_commit_keeps_rows_in_every_layer_and_both_buffers(cache, rows):
    write(cache, 0, 3)
    cache.length = 3
    write(cache, 10, 5)
    cache.commit(rows)
    for layer in range(LAYERS):
        assert kept(cache, layer) == [0, 1, 2, *(10 + row for row in rows)]
        view = cache.layers[layer]
        torch.testing.assert_close(view.values[..., : cache.length, :], view.keys[..., : cache.length, :] + 0.5)


def test_commit_of_rows_that_stand_together_copies_nothing(cache, monkeypatch):
    write(cache, 0, 5)
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *_: pytest.fail("rows were gathered"))
    cache.commit([0, 1, 2])
    assert kept(cache) == [0, 1, 2]
    with pytest.raises(pytest.fail.Exception, match="gathered"):
        cache.commit([0, 2])


def test_rejected_rows_are_overwritten(cache):
    write(cache, 0, 4)
    cache.commit([0, 2])
    write(cache, 20, 2)
    cache.commit([0, 1])
    assert kept(cache) == [0, 2, 20, 21]


def test_reset_keeps_the_buffers(cache):
    write(cache, 0, 4)
    cache.commit([0, 1, 2, 3])
    before = cache.layers[0].keys.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    write(cache, 30, 2)
    cache.commit([0, 1])
    assert kept(cache) == [30, 31]
    assert cache.layers[0].keys.data_ptr() == before


def test_capacity_and_bytes(cache):
    assert cache.num_bytes == 0
    write(cache, 0, CAPACITY)
    assert cache.num_bytes == 2 * LAYERS * HEADS * CAPACITY * WIDTH * 8
    assert cache.layers[0].get_max_length() == CAPACITY
    cache.length = CAPACITY - 1
    with pytest.raises(ConfigError, match=f"{CAPACITY + 1} tokens do not fit into a cache of {CAPACITY}"):
        write(cache, 0, 2)


def test_mask_sizes_are_those_of_the_visible_rows(cache):
    write(cache, 0, 4)
    cache.commit([0, 1, 2])
    assert cache.layers[0].get_mask_sizes(5) == (8, 0)


def test_layers_of_different_shapes_get_buffers_of_their_own():
    cache = PreallocatedCache(2, CAPACITY)
    for layer, width in enumerate((4, 6)):
        cache.update(states(0, 3, layer, width), states(0, 3, layer, width), layer)
    cache.commit([0, 2])
    assert [cache.layers[layer].keys.shape[-1] for layer in range(2)] == [4, 6]
    assert [kept(cache, layer) for layer in range(2)] == [[0, 2], [0, 2]]
