"""Packed rows find their places beside those of other sequences, and back; keys that are none are seen by nobody."""

from __future__ import annotations

import pytest
import torch

from vsdbench.models.side_by_side import Keys, Rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [[3, 1, 2], [1], [0, 2, 0], [4, 4]])
def test_rows_come_back_from_their_places(lengths):
    rows = Rows.packed(lengths, CPU)
    packed = torch.arange(1, sum(lengths) * 2 + 1, dtype=torch.float64).view(-1, 2).requires_grad_()
    spread = rows.spread(packed)
    assert spread.shape == (len(lengths), max(lengths), 2) == (*rows.shape, 2)
    for own, one in zip(torch.split(packed, lengths), spread, strict=True):
        assert torch.equal(one[: len(own)], own)
        assert not one[len(own) :].any()
    assert torch.equal(rows.gather(spread), packed)
    torch.autograd.gradcheck(lambda part: rows.gather(rows.spread(part).cumsum(0)), packed)


def test_the_most_rows_are_found_where_nobody_says():
    owners = torch.tensor([0, 0, 2, 2, 2])
    rows, told = Rows.of(owners, 4), Rows.of(owners, 4, 3)
    assert rows.shape == told.shape == (4, 3)
    assert rows.places.tolist() == told.places.tolist() == [0, 1, 6, 7, 8]
    assert Rows.of(owners[:0], 2).shape == (2, 0)
    assert Rows.of(owners[:0], 0).shape == (0, 0)


def test_keys_stand_side_by_side_and_what_is_none_lies_behind_all():
    keys, values = torch.randn(7, 2, 3), torch.randn(7, 2, 3)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    there = Keys.of(keys, values, positions, [(0, 2), (4, 7)])  # two keys belong to nobody
    assert there.keys.shape == there.values.shape == (2, 2, 3, 3)
    assert torch.equal(there.keys[0, :, :2], keys[:2].transpose(0, 1))
    assert torch.equal(there.values[1], values[4:].transpose(0, 1))
    assert there.positions[:, :2].tolist() == [[0, 1], [0, 1]]
    assert int(there.positions[1, 2]) == 2
    assert int(there.positions[0, 2]) > 10**12
