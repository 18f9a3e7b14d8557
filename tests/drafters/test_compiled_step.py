"""Compiled draft steps are the eager ones, compile once whatever the context, and say why where they are not there.

Like ``models/test_compiled`` they stop before the inductor: what is checked is the graph that it is given.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tests.decoding.tiny import SHAPES, make_prompt, make_target, plain, settings
from tests.drafters.test_eagle3_decoding import make_drafter_model
from tests.drafters.test_together import DRAFTERS, spread
from tests.drafters.test_visual_drafters import vispec
from tests.models.test_compiled import CountMoving

from vsdbench.bench.methods import forks
from vsdbench.decoding.engine import decode, decode_together
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.tree import widest_level
from vsdbench.models.compiled import Graphs
from vsdbench_drafters.architectures.compiled_step import compile_step, sizes_for
from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer

ALL = max(SHAPES, key=lambda shape: shape.top_k)
SIZES = sizes_for(ALL.depth + 1)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def target(request):
    return make_target(dtype=request.param)


@pytest.fixture(scope="module", params=["eagle3", "eagle"])
def eager(request, target):
    return DRAFTERS[request.param](target)


@pytest.fixture(scope="module")
def compiled(target, eager):
    """The same weights, its steps as graphs that run operation by operation: over views of the cache, or all of it."""
    drafter = eager.fork()
    graphs = Graphs(static=target.dtype is torch.float64, backend=lambda graph, inputs: graph.forward)
    assert drafter.compile_steps(graphs, ALL) is None
    assert graphs.count == len(SIZES)
    assert graphs.seconds > 0
    assert eager.layer.compiled is None
    return drafter


def drafted(target, drafter, chosen, length=9):
    generation = decode(target, drafter, make_prompt(length, seed=1), chosen)
    return generation.token_ids, generation.drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_trees_and_answers_are_those_of_eager_steps(target, eager, compiled, shape, temperature):
    chosen = settings(16, temperature=temperature, shape=shape)
    tokens, trees = drafted(target, compiled, chosen)
    expected, same = drafted(target, eager, chosen)
    assert tokens == expected == plain(target, make_prompt(9, seed=1), chosen)
    for ours, theirs in zip(trees, same, strict=True):
        assert list(ours.parents) == list(theirs.parents)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-4)


def test_nothing_is_compiled_again_and_eager_layers_do_not_run(target, compiled, monkeypatch):
    ran = []
    forward = CachedLayer.forward
    monkeypatch.setattr(CachedLayer, "forward", lambda layer, *rows: ran.append(len(rows[1])) or forward(layer, *rows))
    for length in (30, 2, 61):  # a longer cache, and rows of it
        drafted(target, compiled, settings(12, shape=ALL), length)
    assert ran == [29, 1, 60]  # the prompts but for their last tokens
    assert compiled.layer.compiled.graphs.count == len(SIZES)


def test_there_are_graphs_for_the_widest_level_of_a_fixed_tree(target):
    drafter = make_drafter_model(target).drafter(target.dtype)
    shape = TreeShape(kind="static", budget=60, depth=4, top_k=4)
    drafter.compile_steps(Graphs(static=False, backend=lambda graph, inputs: graph.forward), shape)
    sizes = drafter.layer.compiled.sizes
    assert widest_level(shape) > max(SIZES)
    assert max(sizes) >= widest_level(shape) > max(sizes) / 2


def test_more_rows_than_there_is_a_graph_or_room_for_run_eagerly(compiled):
    step = compiled.layer.compiled
    rows = SimpleNamespace(tokens=torch.zeros(3), row=10)
    assert step.size(rows, 100) == 4
    assert step.size(rows, 14) == 4
    assert step.size(rows, 13) is None
    assert step.size(SimpleNamespace(tokens=torch.zeros(max(SIZES) + 1), row=0), 100) is None


def test_forks_share_graphs_and_not_caches(target, compiled):
    chosen = [settings(10, seed=seed, shape=SHAPES[2]) for seed in range(3)]
    prompts = [make_prompt(length, seed) for seed, length in enumerate((9, 3, 14))]
    before = compiled.layer.compiled.graphs.count
    several = decode_together(target, forks(compiled, 2), prompts, chosen)
    for generation, *alone in zip(several, prompts, chosen, strict=True):
        assert generation.token_ids == decode(target, compiled, *alone).token_ids
    assert compiled.layer.compiled.graphs.count == before


def test_what_a_cuda_graph_would_copy_or_refuse_to_write_stays_in_place(target):
    layer, moving = make_drafter_model(target).drafter(target.dtype).layer, CountMoving()
    assert compile_step(layer, [1, 4], Graphs(static=True, backend=moving)) is None
    assert moving == [6, 6]  # hidden, tokens, cosines, sines, mask, rows


def test_steps_that_say_something_else_are_not_taken(target):
    def wrong(graph, inputs):
        return lambda *args: [result * 1.5 for result in graph.forward(*args)]

    drafter = make_drafter_model(target).drafter(target.dtype)
    assert "do not say" in drafter.compile_steps(Graphs(static=False, backend=wrong), ALL)
    assert drafter.layer.compiled is None


def test_a_drafter_that_remembers_an_image_in_its_steps_says_so(toy_target):
    drafter = spread(vispec(toy_target), torch.float32).drafter(torch.float32)
    assert "image" in drafter.compile_steps(Graphs(static=False), ALL)


def test_sizes_reach_the_widest_and_at_most_double():
    for most in range(1, 40):
        sizes = sizes_for(most)
        assert most <= sizes[-1] < 2 * most
        assert all(after == 2 * size for size, after in pairwise(sizes))
