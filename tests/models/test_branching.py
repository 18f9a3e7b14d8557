"""Branches of a sequence in one forward: the same states as one plain forward a path, with and without known keys."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import FAMILIES, make_prompt, make_target

from vsdbench.models import branching
from vsdbench.models.branching import Branches, branch_states, can_branch
from vsdbench.models.packed import can_pack

PREFIX = 17
# Paths below roots 3, 9 and 16 of the sequence; tokens by index: 0-1-2, 0-3 and 4 leave from 3, 5-6 from 9, 7 from 16.
LINEAGE = torch.tensor(
    [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 3, -1], [4, -1, -1], [5, -1, -1], [5, 6, -1], [7, -1, -1]]
)
ROOTS = torch.tensor([3, 3, 3, 3, 3, 9, 9, 16])


def make_branches() -> tuple[torch.Tensor, Branches]:
    prefix = torch.tensor(make_prompt(PREFIX))
    return prefix, Branches(torch.tensor(make_prompt(len(ROOTS), seed=1)), ROOTS, LINEAGE)


def plain_states(target, prefix, branches):
    """One forward of the whole text for every branch token."""
    states = []
    for root, lineage in zip(branches.roots.tolist(), branches.lineage.tolist(), strict=True):
        drafted = [int(branches.tokens[i]) for i in lineage if i >= 0]
        ids = torch.cat([prefix[: root + 1], torch.tensor(drafted)])
        with torch.inference_mode(), target.as_shipped() as model:
            states.append(model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1])
    return torch.stack(states)


def known_keys(target, prefix):
    with torch.inference_mode(), target.as_shipped() as model:
        cache = model.get_decoder()(input_ids=prefix[None], use_cache=True).past_key_values
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_plain_forwards(family):
    target = make_target(family)
    prefix, branches = make_branches()
    assert branches.positions.tolist() == [4, 5, 6, 5, 4, 10, 11, 17]
    states = branch_states(target, prefix, branches)
    expected = plain_states(target, prefix, branches)
    close = 1e-5 if target.attention == "eager" else 1e-9  # Gemma 2's own attention has a float32 softmax
    torch.testing.assert_close(states, expected, rtol=close, atol=close)
    if can_branch(target):
        known = known_keys(target, torch.cat([prefix, prefix[:4]]))  # more tokens than are asked for
        torch.testing.assert_close(branch_states(target, prefix, branches, known), expected, rtol=1e-9, atol=1e-9)
    assert target.model.config._attn_implementation == target.attention


def test_the_fast_way_is_taken_where_layers_see_everything():
    taken = {family for family in FAMILIES if can_branch(make_target(family))}
    assert {"llama", "llama-mha", "qwen2", "qwen3", "olmo2"} <= taken
    assert not taken & {"qwen2-window", "mistral-window", "phi3-window", "gemma2", "gemma3"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_near_to_the_truth_as_one_masked_kernel(dtype):
    target, prefix, branches = make_target(dtype=dtype, spread=0.1), *make_branches()
    exact = plain_states(make_target(spread=0.1), prefix, branches)
    every, among = torch.arange(PREFIX), torch.zeros(len(branches), len(branches), dtype=torch.bool)
    for token, lineage in enumerate(LINEAGE.tolist()):
        among[token, [i for i in lineage if i >= 0]] = True
    visible = torch.zeros(PREFIX + len(branches), PREFIX + len(branches), dtype=torch.bool)
    visible[:PREFIX, :PREFIX] = every[:, None] >= every
    visible[PREFIX:, :PREFIX] = ROOTS[:, None] >= every
    visible[PREFIX:, PREFIX:] = among
    ids, positions = torch.cat([prefix, branches.tokens]), torch.cat([every, branches.positions])
    masked = target.branch_states(ids, positions, visible)[PREFIX:]
    error = (branch_states(target, prefix, branches).double() - exact).abs().mean()
    assert error <= 1.5 * (masked.double() - exact).abs().mean() + 1e-7


def test_a_branch_does_not_see_its_neighbours():
    target, prefix, branches = make_target(), *make_branches()
    before = branch_states(target, prefix, branches)
    changed = branches.tokens.clone()
    changed[5] = (changed[5] + 1) % 48  # of the branch 5-6
    moved = (branch_states(target, prefix, Branches(changed, ROOTS, LINEAGE)) != before).any(-1)
    assert moved.tolist() == [False] * 5 + [True, True, False]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_blocks_of_any_size_say_the_same(size, monkeypatch):
    target, (prefix, branches) = make_target(), make_branches()
    expected, known = branch_states(target, prefix, branches), known_keys(target, prefix)
    monkeypatch.setattr(branching, "_BLOCK", size)
    torch.testing.assert_close(branch_states(target, prefix, branches), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(branch_states(target, prefix, branches, known), expected, rtol=1e-9, atol=1e-9)


def test_branches_stand_in_any_order():
    """Ancestors before descendants is all that is asked for; what leaves from one place need not stand together."""
    target, (prefix, branches) = make_target(), make_branches()
    order = torch.tensor([7, 5, 0, 4, 1, 6, 3, 2])
    places = torch.cat([order.argsort(), torch.tensor([-1])])  # the last entry is for -1
    moved = Branches(branches.tokens[order], ROOTS[order], places[LINEAGE[order]])
    states = branch_states(target, prefix, branches)
    torch.testing.assert_close(branch_states(target, prefix, moved), states[order], rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products here")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_layers_say_the_same(family):
    target, (prefix, branches) = make_target(family, dtype=torch.float32), make_branches()
    known = known_keys(target, prefix)
    assert target.layers_are == "fused"
    fused = [branch_states(target, prefix, branches), branch_states(target, prefix, branches, known)]
    target.fused_layers = None
    own = branch_states(target, prefix, branches)
    assert not torch.equal(fused[0], own)
    for states in fused:
        torch.testing.assert_close(states, own, rtol=1e-3, atol=1e-4)
