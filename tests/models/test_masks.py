"""The mask of a tree, written into a buffer, is the one that would be made from nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.decoding.tiny import random_tree

from vsdbench.decoding.structure import ancestor_mask
from vsdbench.models.masks import ContextMask, Masks

CPU = torch.device("cpu")
LOWEST = torch.finfo(torch.float32).min


def make(groups=1, **config):
    return Masks(SimpleNamespace(**config), groups=groups, name="toy", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_trees_mask_is_that_of_its_rows_whatever_was_masked_before(groups):
    masks = make(groups)
    generator = torch.Generator().manual_seed(0)
    for committed, num_nodes in [(5, 4), (9, 0), (3, 7), (3, 2), (200, 6), (201, 1)]:
        tree = random_tree(generator, num_nodes)
        positions = torch.tensor([0, *tree.depths]) + committed
        found = masks.of_tree(tree.parents, positions, committed)
        one = torch.zeros(num_nodes + 1, committed + num_nodes + 1)
        one[:, committed:].masked_fill_(~ancestor_mask(tree.parents), LOWEST)
        rows = 1 if not num_nodes else groups
        assert torch.equal(found[0, 0], one.repeat(rows, 1))


def test_windows_hide_what_is_too_far_back():
    masks = make(sliding_window=3, layer_types=["sliding_attention", "full_attention"])
    found = masks.of_tree([-1], torch.tensor([5, 6]), 5)
    seen = {name: (mask[0, 0] == 0).tolist() for name, mask in found.items()}
    assert seen["full_attention"] == [[True] * 6 + [False], [True] * 7]
    assert seen["sliding_attention"] == [[False] * 3 + [True] * 3 + [False], [False] * 4 + [True] * 3]


def test_a_prompts_mask_is_not_kept():
    mask = ContextMask(torch.float32, CPU)
    last = torch.full((2000, 3), LOWEST)
    assert torch.equal(mask.ending(last, 5), torch.cat([torch.zeros(2000, 2), last], dim=1))
    assert torch.equal(mask.ending(last[:1], 4), torch.tensor([[0.0, *[LOWEST] * 3]]))
