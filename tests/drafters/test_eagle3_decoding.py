"""EAGLE-3 through the engine, step by step as the model says; ``test_architectures_decoding`` has what all must do."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import SHAPES, VOCAB, make_prompt, make_target, plain, settings

from vsdbench.decoding.engine import decode
from vsdbench.decoding.interfaces import TreeShape
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.eagle3_drafter import Eagle3Layer
from vsdbench_drafters.architectures.one_layer_drafter import OneLayerDrafter
from vsdbench_drafters.objectives.base import DraftBatch, unroll

DRAFT_IDS = torch.arange(2, VOCAB - 4)  # a reduced vocabulary, so that ids must be mapped
WIDE = [TreeShape(kind=shape.kind, budget=3 * shape.budget, depth=4, top_k=4 * shape.top_k) for shape in SHAPES]


def make_drafter_model(target, seed=0):
    """A drafter with every weight random, so that nothing in its forward is masked by a zero or an identity."""
    model = Eagle3Model.from_target(target, DRAFT_IDS, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            offset, scale = (0.0, 0.2) if parameter.dim() == 2 else (1.0, 0.3)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(offset + scale * noise)
    return model.to(target.dtype)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def target(request):
    return make_target(request.param)


@pytest.fixture(scope="module")
def model(target):
    return make_drafter_model(target)


def test_a_fresh_drafter_of_the_targets_own_head_is_lossless(target):
    drafter = Eagle3Model.from_target(target, DRAFT_IDS, seed=0).drafter(target.dtype)
    chosen = settings(24, shape=WIDE[2])
    assert decode(target, drafter, make_prompt(8), chosen).token_ids == plain(target, make_prompt(8), chosen)


class Watching(OneLayerDrafter):
    """Remembers what it knew at the root of every tree."""

    def begin(self, state, max_length):
        super().begin(state, max_length)
        self.roots, self.accepted = [], []

    def propose(self, state, shape, *, temperature, generator):
        tree = super().propose(state, shape, temperature=temperature, generator=generator)
        self.roots.append((len(state.tokens), self.num_committed, self._root_log_probs.clone()))
        return tree

    def commit(self, state, num_accepted, features):
        super().commit(state, num_accepted, features)
        self.accepted.append(num_accepted)


@pytest.mark.parametrize("shape", WIDE[1:], ids=lambda shape: shape.kind)
def test_step_by_step_it_computes_what_the_model_computes_at_once(target, model, shape):
    """Its cache after accepted and refused nodes is that of one forward over the text with the target's features."""
    drafter, accepted, refused = Watching("eagle3", Eagle3Layer(model, target.dtype), model), 0, 0
    for seed in range(2):
        prompt = make_prompt(6, seed)
        answer = decode(target, drafter, prompt, settings(30, seed=seed, shape=shape)).token_ids
        text = [*prompt, *answer]
        features = target.prefill(text, len(text)).features
        batch = DraftBatch.pack([text], [1], features)
        with torch.no_grad():
            hidden = next(iter(unroll(model, batch, 1)))[1]
            expected = torch.log_softmax(model.lm_head(hidden), dim=-1)
        first = batch.spans[0].first_slot
        for num_tokens, committed, log_probs in drafter.roots:
            assert committed == num_tokens - 1
            if committed - 1 - first < len(expected):
                found = expected[committed - 1 - first].float()
                torch.testing.assert_close(log_probs, found, rtol=1e-4, atol=1e-5)
        accepted += sum(drafter.accepted)
        refused += sum(count < shape.depth for count in drafter.accepted)
    assert accepted > 0, "no accepted slot was ever committed, so the test shows nothing"
    assert refused > 0


def test_the_cache_grows_with_what_is_asked(target, model):
    """A longer sequence after a shorter one, and trees larger than the spare rows."""
    drafter = model.drafter(target.dtype)
    huge = TreeShape(kind="dynamic", budget=60, depth=5, top_k=30)
    for prompt, shape in ((make_prompt(4), SHAPES[0]), (make_prompt(80, 1), huge)):
        chosen = settings(20, shape=shape)
        assert decode(target, drafter, prompt, chosen).token_ids == plain(target, prompt, chosen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@pytest.mark.parametrize("shape", WIDE, ids=lambda shape: shape.kind)
def test_greedy_decoding_is_lossless_on_a_gpu(shape):
    target = make_target(device="cuda", dtype=torch.float32)
    drafter = make_drafter_model(target).drafter(torch.float32)
    for seed in range(3):
        chosen = settings(24, shape=shape)
        generation = decode(target, drafter, make_prompt(9, seed), chosen)
        assert generation.token_ids == plain(target, make_prompt(9, seed), chosen)
