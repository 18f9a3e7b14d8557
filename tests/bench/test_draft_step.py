"""The benchmark of draft steps times the same drafter in every form, and its forms say the same."""

from __future__ import annotations

import pytest
import torch
from benchmarks import draft_step
from tests.decoding.tiny import make_target
from tests.drafters.test_eagle3_decoding import make_drafter_model

from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError
from vsdbench.models.compiled import Graphs

TREE = TreeShape(budget=4, depth=2, top_k=2)


@pytest.fixture(scope="module")
def target():
    return make_target(dtype=torch.float32)


@pytest.fixture
def drafter(target):
    return make_drafter_model(target).drafter(target.dtype)


def test_steps_and_trees_are_timed_in_every_form(target, drafter, monkeypatch):
    monkeypatch.setattr(draft_step, "why_not", lambda device: None)
    monkeypatch.setattr(Graphs, "_inductor", staticmethod(lambda graph, inputs: graph.forward))
    drafters = draft_step.make_drafters(drafter, [1, 2, 3], compiled=True)
    names = list(drafters)
    assert (names[0], names[-1]) == ("operations", "compiled")
    assert [fork.layer.compiled is not None for fork in drafters.values()][-2:] == [False, True]
    found = draft_step.measure(target, drafters, rows=[1, 3], context=9, shape=TREE, repeats=2)
    assert [line["rows"] for line in found["lines"]] == [1, 3]
    for times in (*(line["ms"] for line in found["lines"]), found["tree"]):
        assert times.keys() == drafters.keys()
        assert all(ms > 0 for ms in times.values())
    assert drafters["compiled"].layer.compiled.graphs.count == 3
    told = found | {"context": 9, "draft_vocab_size": 8, "budget": 4, "repeats": 2, "target": "toy"}
    lines = draft_step.table(told | {"dtype": "float32", "device": "cpu", "threads": 1}).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:]] == ["1 rows", "3 rows", "tree of 4"]
    assert all("operations" in line and "(1.00x)" in line for line in lines[1:])


def test_what_cannot_be_compiled_is_one_sentence(drafter, monkeypatch):
    monkeypatch.setattr(draft_step, "why_not", lambda device: "there is no C++ compiler")
    assert "compiled" not in draft_step.make_drafters(drafter, [1], compiled=False)
    with pytest.raises(ConfigError, match=r"not compiled here: there is no C\+\+ compiler"):
        draft_step.make_drafters(drafter, [1], compiled=True)
