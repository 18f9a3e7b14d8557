"""Behind a long context a step makes the same tensors as behind a short one, and the cache has the bytes foretold."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import VOCAB, make_prompt, make_target
from torch.utils._python_dispatch import TorchDispatchMode

from vsdbench.bench.estimate import cache_bytes
from vsdbench.bench.long_context import measure_contexts
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.tree import any_chain
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3 import Eagle3Model
from vsdbench_drafters.architectures.ngram import NgramDrafter

CPU = torch.device("cpu")
CONTEXTS = (40, 90, 200)
SHAPE = TreeShape(kind="dynamic", budget=6, depth=3, top_k=3)


class Bytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations make; views of tensors that were there make none."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and not t.is_mkldnn}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made += tensor.nbytes
        return result


def target_of(family, **changes):
    return make_target(family, dtype=torch.float32, max_position_embeddings=512, **changes)


def made_at(target, context, step):
    """The bytes that a step makes behind a context, the second time, when buffers have been made."""
    state = target.prefill(make_prompt(context), 512)
    state.tokens.append(3)
    for _ in range(2):
        with torch.inference_mode(), Bytes() as counted:
            step(state)
    return counted.made


@pytest.mark.parametrize("num_nodes", [0, 7])
@pytest.mark.parametrize("family", ["llama", "llama-mha", "olmo2"])
def test_a_step_makes_no_more_behind_a_long_context(family, num_nodes):
    target = target_of(family)
    made = {
        made_at(target, count, lambda state: target.forward_tree(state, any_chain(num_nodes, CPU)))
        for count in CONTEXTS
    }
    assert len(made) == 1
    assert made.pop() > 0


def test_the_count_sees_a_mask_as_long_as_the_context():
    target = target_of("llama")

    def step(state):
        length = len(state.tokens)
        keys = torch.arange(length)
        target.forward(torch.tensor([3]), keys[-1:], torch.ones(1, length, dtype=torch.bool), keys, state.cache)

    assert made_at(target, CONTEXTS[1], step) > made_at(target, CONTEXTS[0], step)


def test_drafting_makes_no_more_behind_a_long_context():
    target = target_of("llama")
    drafter = Eagle3Model.from_target(target, torch.arange(VOCAB), seed=0).drafter(torch.float32)

    def draft(state):
        if not drafter.num_committed:
            drafter.begin(state, 512)
        drafter.propose(state, SHAPE, temperature=0.0, generator=torch.Generator())

    made = set()
    for count in CONTEXTS:
        drafter._committed = 0
        made.add(made_at(target, count, draft))
    assert len(made) == 1


def test_lookups_look_at_no_more_than_some():
    drafter = NgramDrafter()
    looked_at = []
    for count in (2_000, 4_000):
        state = target_of("llama").prefill([1], 8)
        state.tokens = [1] * count  # every ending has occurred everywhere, with one continuation
        drafter.begin(state, count + 8)
        looked_at.append(sum(1 for _ in drafter._matches(state.tokens)))
    assert looked_at[0] == looked_at[1]


@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3", "olmo2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cache_has_the_bytes_that_are_foretold(family, dtype):
    target = make_target(family, dtype=dtype)
    cache = target.prefill(make_prompt(5), 37).cache
    assert cache.num_bytes == cache_bytes(target, 37) > 0


def test_a_long_prompt_read_in_parts_is_the_prompt(monkeypatch):
    target = make_target("llama", dtype=torch.float64)
    prompt = make_prompt(30)
    whole = target.prefill(prompt, 64)
    features, logits = whole.features.clone(), whole.next_logits.clone()
    monkeypatch.setattr("vsdbench.models.target._CHUNK", 7)
    parts = target.prefill(prompt, 64)
    assert torch.allclose(parts.features, features)
    assert torch.allclose(parts.next_logits, logits)
    assert parts.cache.length == 30


def test_every_context_is_measured_against_the_first():
    target = target_of("llama")
    result = measure_contexts(
        target, make_prompt(60), [20, 60], rows=4, drafters={"ngram": NgramDrafter()}, shape=SHAPE, repeats=2
    )
    first, second = result["lines"]
    assert (first["context"], second["context"]) == (20, 60)
    assert first["plain_ratio"] == first["tree_ratio"] == first["draft_ratio"]["ngram"] == 1
    assert second["plain_ratio"] == pytest.approx(second["plain_ms"] / first["plain_ms"])
    assert second["draft_ratio"]["ngram"] == pytest.approx(second["draft_ms"]["ngram"] / first["draft_ms"]["ngram"])
    assert result["cache"]["bytes"] == result["cache"]["computed_bytes"]


def test_a_context_may_be_shorter_than_the_turns_are_many():
    result = measure_contexts(
        target_of("llama"), make_prompt(9), [3, 9], rows=4, drafters={"ngram": NgramDrafter()}, shape=SHAPE, repeats=4
    )
    assert [line["context"] for line in result["lines"]] == [3, 9]


@pytest.mark.parametrize(
    ("contexts", "message"),
    [([60, 20], "the shortest first"), ([20, 90], "needs a longer one"), ([20, 505], "positions")],
)
def test_contexts_that_cannot_be_are_refused(contexts, message):
    tokens = make_prompt(80 if contexts[-1] == 90 else 600)
    with pytest.raises(ConfigError, match=message):
        measure_contexts(target_of("llama"), tokens, contexts)
