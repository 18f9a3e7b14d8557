"""Compiled layers are the eager ones, compile once for any length of context, and say why where they are not there.

They stop before the inductor, whose C++ takes its time: what is checked is the graph that it is given. What it makes of
that is held against the eager layers wherever a target is loaded.
"""

from __future__ import annotations

import os

import pytest
import torch
from tests.decoding.tiny import (
    SHAPES,
    AdversarialDrafter,
    make_model,
    make_prompt,
    make_target,
    plain,
    settings,
    tree_of,
)
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from vsdbench.decoding.engine import decode
from vsdbench.errors import ConfigError
from vsdbench.models import native
from vsdbench.models.compiled import CompiledLayers, Graphs, describe, learn, why_not
from vsdbench.models.fused import FusedLayers
from vsdbench.models.target import Target

PROBE = make_prompt(5)
TREE = tree_of([5, 6, 7, 8, 9, 10, 11], [-1, 0, 0, -1, 1, 4, 3])
ROWS = (1, 8)


@pytest.fixture(scope="module", params=["views", "all-rows"])
def target(request):
    """A target whose graphs run operation by operation, over views of the cache or over all of it."""
    return make_compiled(static=request.param == "all-rows")


def eager():
    """A target with fused layers, though nothing is packed in float64."""
    target = make_target("llama", num_hidden_layers=2)
    target.fused_layers = FusedLayers(target.model.model, target.model.model.layers, target.config)
    return target


def make_compiled(*, static=False, backend=lambda graph, inputs: graph.forward, target=None):
    target = target or eager()
    graphs = Graphs(static=static, backend=backend)
    layers = CompiledLayers(target.fused_layers, target.feature_layers, dtype=target.dtype, graphs=graphs)
    target.not_compiled = learn(target, layers, ROWS, PROBE)
    return target


def begun(target, length=13):
    prompt = make_prompt(length, seed=3)
    state = target.prefill(prompt, length + 32)
    state.tokens.append(4)
    return state


def outputs(target, length):
    """Of trees behind prefill and behind a commit, so that what was written into the cache is read again."""
    state = begun(target, length)
    found = [target.forward_tree(state, TREE)]
    state.commit([0, 1], [5, 6, 12])
    found += [target.forward_tree(state, tree) for tree in (TREE, tree_of([], []), tree_of([3, 4], [-1, -1]))]
    return [torch.cat([output.logits, output.features], dim=-1).clone() for output in found]


def test_trees_and_the_cache_are_those_of_eager_layers(target):
    assert target.not_compiled is None
    for length in (3, 20, 60):
        for ours, theirs in zip(outputs(target, length), outputs(eager(), length), strict=True):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=lambda shape: shape.kind)
def test_decoding_is_lossless(target, shape, temperature):
    prompt = make_prompt(9, seed=1)
    chosen = settings(16, temperature=temperature, shape=shape)
    answer = plain(target, prompt, chosen)
    assert answer == plain(eager(), prompt, chosen)
    drafter = AdversarialDrafter(answer, len(prompt), seed=2)
    assert decode(target, drafter, prompt, chosen).token_ids == answer
    assert drafter.num_accepted > 0


@pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.why_not()}")
@pytest.mark.parametrize("static", [False, True])
def test_kernels_may_have_read_the_prompt(static):
    model = make_model("llama", dtype=torch.float32, num_hidden_layers=2, head_dim=16)
    target = Target(model, None, name="llama", fingerprint="0" * 16)
    assert target.layers_are == "native"
    prompt, chosen = make_prompt(9, seed=1), settings(16)
    answer = plain(target, prompt, chosen)
    assert make_compiled(static=static, target=target).not_compiled is None
    assert describe(target)["graphs"] == len(ROWS)
    assert plain(target, prompt, chosen) == answer


def test_nothing_is_compiled_again(target):
    """Whatever was decoded above: neither contexts nor tree sizes make a graph, nor other caches where all is views."""
    assert describe(target)["graphs"] == len(ROWS)
    assert describe(target)["seconds"] > 0
    state = target.prefill(make_prompt(3), 50 if target.compiled_layers.graphs.static else 700)
    state.tokens.append(4)
    for num_nodes in (0, 1, 7, 12):  # the last one is larger than all that were asked for
        output = target.forward_tree(state, tree_of(range(num_nodes), range(-1, num_nodes - 1)))
        assert len(output.logits) == len(output.features) == num_nodes + 1
    assert describe(target)["graphs"] == len(ROWS)


def test_the_graph_runs_and_not_the_eager_layers(target, monkeypatch):
    state = begun(target)
    monkeypatch.setattr(FusedLayers, "__call__", None)
    assert len(target.forward_tree(state, TREE).logits) == len(TREE) + 1


def test_trees_are_filled_up_within_the_room_that_there_is(target):
    layers = target.compiled_layers
    filled = layers.fill(tree_of([7, 8], [-1, 0]), 50)
    assert (filled.tokens.tolist(), filled.parents, filled.depths) == (
        [7, 8, 0, 0, 0, 0, 0],
        [-1, 0, -1, -1, -1, -1, -1],
        [1, 2, 1, 1, 1, 1, 1],
    )
    assert len(layers.fill(tree_of([7, 8], [-1, 0]), 7)) == 2
    assert len(layers.fill(tree_of([], []), 50)) == 0


def test_a_tree_without_room_is_refused_as_by_eager_layers(target):
    state = begun(target)
    state.cache.length = state.cache.capacity - 1
    with pytest.raises(ConfigError, match="do not fit into a cache"):
        target.forward_tree(state, TREE)


class CountMoving(list):
    """A backend that notes of each graph how many of its arguments do not stay in place."""

    def __call__(self, graph, inputs):
        placeholders = graph.graph.find_nodes(op="placeholder")
        self.append(sum(not node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in placeholders))
        return graph.forward


def test_what_a_cuda_graph_would_copy_or_refuse_to_write_stays_in_place():
    """Weights and the cache: a graph that writes into any other argument is not made a CUDA graph."""
    moving = CountMoving()
    assert make_compiled(static=True, backend=moving).not_compiled is None
    assert moving == [4] * len(ROWS)  # embeddings, positions, mask, rows


def test_layers_that_say_something_else_are_not_taken():
    def wrong(graph, inputs):
        return lambda *args: [result * 1.5 for result in graph.forward(*args)]

    target = make_compiled(backend=wrong)
    assert target.compiled_layers is None
    assert "do not say" in describe(target)["not_compiled"]


def test_without_a_compiler_the_layers_stay_eager_and_the_reason_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    target = Target(make_model("llama"), None, name="llama", fingerprint="0" * 16, compiled=[1])
    assert target.compiled_layers is None
    assert "no-such-compiler" in target.not_compiled
    assert describe(target) == {"graphs": 0, "seconds": 0.0, "not_compiled": target.not_compiled}


def test_compiled_code_is_kept_in_the_cache_folder_unless_another_one_is_asked_for(monkeypatch, tmp_path):
    """torch names a folder of its own as soon as it is imported, so that one says nothing."""
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    for before, after in ((default_cache_dir(), str(tmp_path / "inductor")), ("/elsewhere", "/elsewhere")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        why_not(torch.device("cpu"))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == after


def test_layers_without_a_fused_form_are_not_compiled():
    target = Target(make_model("olmo2"), None, name="olmo2", fingerprint="0" * 16, compiled=[1])
    assert target.compiled_layers is None
    assert target.not_compiled == "its layers have no fused form"
    assert make_target("llama").not_compiled is None
