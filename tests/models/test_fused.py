"""Fused layers are the model's own layers, and stand in for them only where they are."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import FAMILIES, make_model, make_prompt, make_target, tree_of

from vsdbench.models.packed import can_pack
from vsdbench.models.target import Target

PROMPT = make_prompt(13, seed=3)
TREE = tree_of([5, 6, 7, 8, 9, 10, 11], [-1, 0, 0, -1, 1, 4, 3])
FUSED = ["llama", "llama-mha", "qwen2", "qwen2-window", "qwen3", "mistral-window"]
DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(not can_pack(torch.device("cpu"), dtype), reason=f"no packed {dtype} products here"),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
needs_packing = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products here")


def both(family, dtype=torch.float32, **changes):
    """A target with fused layers, and the same one without."""
    fused, own = make_target(family, dtype=dtype, **changes), make_target(family, dtype=dtype, **changes)
    own.fused_layers = None
    return fused, own


def begun(target):
    state = target.prefill(PROMPT, len(PROMPT) + 32)
    state.tokens.append(4)
    return state


def error(ours, own):
    """Largest deviation, relative to the largest number."""
    return float((ours - own).abs().max() / own.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FUSED)
def test_states_and_logits_are_those_of_the_models_own_layers(family, dtype):
    fused, own = both(family, dtype)
    assert (fused.layers_are, own.layers_are) == ("fused", "own")
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    ours, theirs = begun(fused), begun(own)
    assert error(ours.features, theirs.features) < tolerance
    assert error(ours.next_logits, theirs.next_logits) < tolerance
    for path in ([], [0, 1], [3]):  # the cache behind a commit too
        if path:
            for state in (ours, theirs):
                state.commit(path, [*(int(TREE.tokens[node]) for node in path), 12])
        after = [target.forward_tree(state, TREE) for target, state in ((fused, ours), (own, theirs))]
        assert after[0].logits.dtype is dtype
        assert error(after[0].features, after[1].features) < tolerance
        assert error(after[0].logits, after[1].logits) < tolerance


@needs_packing
def test_biases_are_added():
    torch.manual_seed(5)
    model = make_model("qwen2", dtype=torch.float32)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)
    fused = Target(model, None, name="qwen2", fingerprint="0" * 16)
    assert fused.layers_are == "fused"
    ours = begun(fused).features
    fused.fused_layers = None
    assert error(ours, begun(fused).features) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(FUSED)))
def test_other_architectures_keep_their_own_layers(family):
    assert make_target(family, dtype=torch.float32).layers_are == "own"


@pytest.mark.parametrize("dtype", [torch.float64])
def test_other_dtypes_keep_their_own_layers(dtype):
    assert make_target("llama", dtype=dtype).layers_are == "own"


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_keeps_its_own_layers(dtype):
    if not can_pack(torch.device("cpu"), dtype):
        pytest.skip(f"no packed {dtype} products here")
    model = make_model("llama", dtype=dtype)
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()  # the config still says silu
    assert Target(model, None, name="odd", fingerprint="0" * 16).layers_are == "own"


@needs_packing
def test_a_cut_model_has_fewer_fused_layers():
    fused, own = both("llama")
    for target in (fused, own):
        target.keep_layers(2)
    own.fused_layers = None
    assert fused.layers_are == "fused"
    assert error(begun(fused).features, begun(own).features) < 1e-5


@needs_packing
def test_sharding_goes_back_to_plain_layers():
    target = make_target("llama", dtype=torch.float32)
    target.prepare_sharding(torch.device("cpu"))
    assert target.layers_are == "own"
