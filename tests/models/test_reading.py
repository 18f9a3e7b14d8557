"""Sequences read together are each what it is alone, and images reach fused layers only where embeddings are all."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import make_prompt
from tests.decoding.tiny import make_target as make_text_target
from tests.models.tiny_vision import BUILDERS, SPECIAL, make_image, make_target

from vsdbench.models import reading
from vsdbench.models.image_prefill import embed_images
from vsdbench.models.image_prompt import followed_by
from vsdbench.models.packed import can_pack
from vsdbench.models.reading import packs, prefill_images, read_sequences, reads_packed

PLAIN = ["llava", "idefics3", "smolvlm", "internvl"]
"""Families whose language model is one with fused layers and is given embeddings alone."""
BEHIND = [len(SPECIAL) + i for i in (3, 1, 4, 1, 5)]
needs_packing = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products here")


def question(*seeds):
    images = [make_image(seed, (20 + 6 * seed, 22)) for seed in seeds]
    return {"role": "user", "content": "What is it?", "images": images}


def sequences_of(target):
    shown = [target.encode_chat([question(*seeds)]) for seeds in ((0,), (1, 2), (3,))]
    return [followed_by(shown[0], BEHIND), [*BEHIND, 30, 31], followed_by(shown[1], BEHIND[:2]), shown[2]]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours.features, theirs.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
    assert ours.position_offset == theirs.position_offset
    assert (ours.image_mask is None) == (theirs.image_mask is None) == (ours.embeddings is None)
    if ours.image_mask is not None:
        assert torch.equal(ours.image_mask, theirs.image_mask)
        torch.testing.assert_close(ours.embeddings, theirs.embeddings)


@needs_packing
@pytest.mark.parametrize("family", PLAIN)
def test_images_read_by_fused_layers_are_what_the_models_own_say(family, monkeypatch):
    target = make_target(family, dtype=torch.float32)
    assert reads_packed(target)
    sequences = sequences_of(target)
    fused, target.fused_layers = target.fused_layers, None
    own = read_sequences(target, sequences, keys=True)
    first = target.prefill(sequences[0], 200)
    target.fused_layers = fused
    runs = []
    for layer in target.model.get_decoder().layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(reading, "PACK_TOKENS", len(sequences[0]) + len(sequences[1]))  # more than one pack
    for ours, theirs in zip(read_sequences(target, sequences, keys=True), own, strict=True):
        assert_same(ours, theirs)
    assert not read_sequences(target, sequences[:1], keys=False)[0].layers
    state = target.prefill(sequences[0], 200)
    assert not runs
    torch.testing.assert_close(state.next_logits, first.next_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.features, first.features, rtol=1e-4, atol=1e-4)
    assert state.cache.length == first.cache.length == len(sequences[0])
    for ours, theirs in zip(state.cache.layers, first.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


@needs_packing
@pytest.mark.parametrize("family", sorted(BUILDERS.keys() - {*PLAIN, "llava-next"}))
def test_other_images_are_read_by_the_models_own_layers(family):
    """Positions in three axes, images that attend in both directions, features that enter deeper layers."""
    target = make_target(family, dtype=torch.float32)
    assert embed_images(target, target.encode_chat([question(1)])) is None
    found = read_sequences(target, sequences_of(target), keys=True)
    for ours, sequence in zip(found, sequences_of(target), strict=True):
        state = target.prefill(sequence, len(sequence))
        torch.testing.assert_close(ours.features, state.features, rtol=1e-4, atol=1e-4)
        assert ours.position_offset == state.position_offset


@needs_packing
def test_where_embeddings_are_not_all_fused_layers_stay_out(monkeypatch):
    target = make_target("llava", dtype=torch.float32)
    prompt = target.encode_chat([question(0)])
    wanted = target.prefill(prompt, 200).next_logits
    monkeypatch.setattr(reading, "embed_images", lambda *_: None)
    runs = []
    target.model.get_decoder().layers[0].register_forward_hook(lambda *_: runs.append(1))
    read = read_sequences(target, [prompt, prompt], keys=False)
    torch.testing.assert_close(target.prefill(prompt, 200).next_logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(runs) == 3
    assert torch.equal(read[0].features, read[1].features)


@needs_packing
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_texts_read_together_are_read_alone(family):
    target = make_text_target(family, dtype=torch.float32)
    texts = [make_prompt(length, seed=length) for length in (7, 30, 1)]
    for ours, text in zip(read_sequences(target, texts, keys=True), texts, strict=True):
        state = target.prefill(text, len(text))
        torch.testing.assert_close(ours.features, state.features, rtol=1e-4, atol=1e-4)
        seen = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in state.cache.layers])
        torch.testing.assert_close(ours.keys, seen[..., : len(text), :], rtol=1e-4, atol=1e-4)


@needs_packing
def test_a_prompts_images_are_read_before_any_row_is_committed():
    target = make_target("llava", dtype=torch.float32)
    prompt = target.encode_chat([question(0)])
    cache = target.prefill(prompt, 200).cache
    cache.reset()
    read, features = prefill_images(target, prompt, cache)
    assert cache.length == 0
    assert features.shape == (prompt.num_read, 4 * target.hidden_size)
    assert read.embeddings.shape == (prompt.num_read, target.hidden_size)


def test_packs_hold_what_fits():
    assert list(packs([])) == []
    lengths = [700, 300, 25, 1024, 1500, 1]
    assert list(packs([3, 0, 2, 0], 4)) == [[0], [2]]
    assert [[lengths[i] for i in pack] for pack in packs(lengths)] == [[700, 300], [25], [1024], [1500], [1]]
