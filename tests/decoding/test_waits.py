"""A decode step waits for the device once, and sends it little: counted on a device that is played (``elsewhere``).

What this sees: every operation by which values come to the host, and every copy of a host tensor to the device, of the
whole loop with a target of transformers and drafters of ours, taking the code paths of a GPU; an answer that is not
that of the CPU fails too. What it cannot see: waits inside of CUDA kernels and libraries, pinned memory, streams,
events, and what ``torch.cuda`` is asked for by name; a GPU's own paths (compiled layers) do not run here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.decoding.elsewhere import DEVICE, Border, move
from tests.decoding.tiny import SHAPES, make_model, make_prompt, make_target, settings
from tests.drafters.test_eagle3_decoding import make_drafter_model

from vsdbench.decoding.engine import Autoregressive, decode, decode_together
from vsdbench.models.device import fetch, seconds_between
from vsdbench.models.target import Target
from vsdbench_drafters.architectures.draft_model import DraftModelDrafter

LIKE = {"dtype": torch.float32, "num_hidden_layers": 2}
PROMPTS = [make_prompt(7), make_prompt(3, 1)]


class Counting:
    """Passes everything on; notes at every proposal what has crossed the border so far."""

    def __init__(self, drafter, border):
        self.drafter, self.border, self.name, self.noted = drafter, border, drafter.name, []
        self.begin, self.commit = drafter.begin, drafter.commit

    def propose(self, state, shape, *, temperature, generator):
        self.noted.append((sum(self.border.waits.values()), self.border.sent))
        return self.drafter.propose(state, shape, temperature=temperature, generator=generator)

    def steps(self):
        """``(waits, tensors sent)`` of all steps but the first, which sends what stays, and the last."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.noted[1:], self.noted[2:], strict=False)]


@pytest.fixture(scope="module")
def here():
    return make_target(**LIKE)


@pytest.fixture(scope="module")
def there():
    with Border():
        return Target(move(make_model(**LIKE)), None, name="there", fingerprint="0" * 16)


DRAFTERS = {
    "eagle3": lambda target, put: put(make_drafter_model(make_target(**LIKE))).drafter(target.dtype),
    "draft_model": lambda target, put: DraftModelDrafter(
        Target(put(make_model(seed=3, **LIKE)), None, name="draft", fingerprint="0" * 16), target.vocab_size
    ),
    "autoregressive": lambda target, put: Autoregressive(),
}
CASES = [
    ("eagle3", SHAPES[0], "coupled"),
    ("eagle3", SHAPES[1], "greedy"),
    ("eagle3", SHAPES[2], "greedy"),
    ("eagle3", SHAPES[2], "coupled"),
    ("eagle3", SHAPES[4], "coupled"),
    ("eagle3", SHAPES[3], "rejection"),
    ("eagle3", SHAPES[3], "traversal"),
    ("draft_model", SHAPES[2], "greedy"),
    ("autoregressive", SHAPES[0], "coupled"),
]


@pytest.mark.parametrize(("name", "shape", "rule"), CASES, ids=lambda value: getattr(value, "kind", value))
def test_a_step_waits_once_and_answers_as_on_a_cpu(here, there, name, shape, rule):
    chosen = settings(12, temperature=float(rule != "greedy"), rule=rule, shape=shape)
    expected = decode(here, DRAFTERS[name](here, lambda module: module), PROMPTS[0], chosen)
    with Border() as border:
        drafter = Counting(DRAFTERS[name](there, move), border)
        found = decode(there, drafter, PROMPTS[0], chosen)
    assert found.token_ids == expected.token_ids
    assert [list(step.parents) for step in found.drafted] == [list(step.parents) for step in expected.drafted]
    assert [(step.num_nodes, step.depth) for step in found.steps] == [(s.num_nodes, s.depth) for s in expected.steps]
    assert len(drafter.steps()) > 2
    for before, (waits, sent) in zip(found.steps, drafter.steps(), strict=False):
        assert waits == 1
        # Rows and tokens that were committed; keyed waiting times of new positions; random numbers of every level.
        keyed = before.num_emitted if rule == "coupled" else 0
        assert sent <= 1 + keyed + (shape.depth if shape.kind == "sampled" else 0) + (name == "draft_model")


@pytest.mark.parametrize("shape", [*SHAPES[1:3], SHAPES[4]], ids=lambda shape: shape.kind)
def test_so_does_a_step_of_several_sequences(here, there, shape):
    chosen = [settings(10, shape=shape), settings(10, temperature=1.0, shape=shape)]
    drafters = [make_drafter_model(here).drafter(here.dtype) for _ in chosen]
    expected = [decode(here, drafters[0], *both).token_ids for both in zip(PROMPTS, chosen, strict=True)]
    with Border() as border:
        drafters = [Counting(DRAFTERS["eagle3"](there, move), border) for _ in chosen]
        found = decode_together(there, drafters, PROMPTS, chosen)
    assert [generation.token_ids for generation in found] == expected
    assert {waits for waits, _ in drafters[0].steps()} == {1}
    assert max(sent for _, sent in drafters[0].steps()) <= 3 + shape.depth + 1


def test_a_growth_that_looks_at_its_scores_is_seen(here, there):
    chosen = settings(8, shape=replace(SHAPES[2], min_node_prob=1e-4, min_level_prob=1e-3))
    expected = decode(here, make_drafter_model(here).drafter(here.dtype), PROMPTS[0], chosen)
    with Border() as border:
        drafter = Counting(DRAFTERS["eagle3"](there, move), border)
        found = decode(there, drafter, PROMPTS[0], chosen)
    assert min(waits for waits, _ in drafter.steps()) > 2
    assert found.token_ids == expected.token_ids
    assert [step.num_nodes for step in found.steps] == [step.num_nodes for step in expected.steps]


def test_what_is_fetched_is_what_is_there():
    parts = [torch.arange(3), torch.rand(2, 3), torch.tensor([True, False]), torch.empty(0), torch.rand(5).double()]
    with Border() as border:
        found = fetch([part.to(DEVICE) for part in parts])
    assert sum(border.waits.values()) == 1
    assert all(torch.equal(*both) and both[0].dtype == both[1].dtype for both in zip(found, parts, strict=True))


def test_moments_on_a_gpu_are_events(monkeypatch):
    class Event:
        def __init__(self, at):
            self.at, self.over = at, False

        def synchronize(self):
            self.over = True

        def elapsed_time(self, later):
            assert later.over
            return later.at - self.at

    assert seconds_between(Event(500.0), Event(750.0)) == 0.25
