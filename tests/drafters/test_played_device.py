"""Losses on a device that is played (``tests.decoding.elsewhere``): those of a CPU, and seldom waited for.

Objectives take the paths of a GPU there, and a tensor of the host among those of the device is an error.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from tests.decoding.elsewhere import Border, Elsewhere, inside, move
from tests.drafters.path_tools import make_setting

from vsdbench import registry
from vsdbench.models.branching import Branches
from vsdbench_drafters.objectives.base import TargetView

PATHS = {"anchors": 3, "paths": 4, "depth": 3}
CASES = [
    ("kl", {}, 0),
    ("ce", {}, 0),
    ("eal", {"soft_weight": 0.5}, 0),
    ("onpolicy", PATHS, 14),
    ("gto", {"anchors": 3, "depth": 3}, 26),
    ("vsd", PATHS, 17),
]


@pytest.fixture(scope="module")
def here():
    return make_setting(dtype=torch.float32)


@pytest.fixture(scope="module")
def there(here):
    """The same batch, drafter and view on the played device."""
    batch, view = here.batch, here.view

    class Asked:
        def branch_states(self, first, prefix, branches):
            parts = (inside(part) for part in (branches.tokens, branches.roots, branches.lineage))
            return Elsewhere(view.target.branch_states(first, inside(prefix), Branches(*parts)).clone())

    fields = ("tokens", "features", "slots", "ends")
    moved = replace(batch, **{name: Elsewhere(getattr(batch, name)) for name in fields})
    tensors = (view.hidden, view.head, view.target_to_draft, view.full_head.detach())
    with Border():
        model = move(copy.deepcopy(here.model))
    return moved, model, TargetView(*map(Elsewhere, tensors), Asked())


@pytest.mark.parametrize(("name", "options", "most"), CASES, ids=[str(i) + case[0] for i, case in enumerate(CASES)])
def test_a_loss_is_the_cpus_and_sends_nothing_that_waits(here, there, monkeypatch, name, options, most):
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: contextlib.nullcontext())  # there is none there
    objective = registry.load("vsdbench.objectives", name)
    with torch.no_grad():
        expected = objective(**options).loss(here.batch, here.model, here.view).loss
        with Border() as border:
            found = objective(**options).loss(*there).loss
    torch.testing.assert_close(found.held, expected)
    assert border.blocked == 0
    assert sum(border.waits.values()) <= most
