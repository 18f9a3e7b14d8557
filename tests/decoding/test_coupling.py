"""Trees that know the numbers of the draw: right where the drafter is, better than trees that do not, never lossy."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import VOCAB, make_prompt, make_target, plain, settings

from vsdbench.decoding import coupling
from vsdbench.decoding.coupling import Foresight
from vsdbench.decoding.engine import decode
from vsdbench.decoding.growing import Level
from vsdbench.decoding.interfaces import TreeShape
from vsdbench.decoding.sampling import KeyedNoise, keyed_noise
from vsdbench_drafters.architectures.draft_model import DraftModelDrafter

PATH = TreeShape(kind="coupled", budget=5, depth=5, top_k=1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_a_drafter_that_is_the_target_is_right_if_the_noise_counts_in_full(temperature, monkeypatch):
    monkeypatch.setattr(coupling, "NOISE_WEIGHT", 1.0)
    target = make_target()
    drafter = DraftModelDrafter(make_target(), VOCAB)
    for seed in range(4):
        prompt, chosen = make_prompt(9, seed), settings(31, temperature=temperature, seed=seed, shape=PATH)
        generation = decode(target, drafter, prompt, chosen)
        assert generation.token_ids == plain(target, prompt, chosen)
        assert [step.num_emitted for step in generation.steps] == [6] * 5


def test_more_is_kept_than_without_the_numbers():
    """Two layers of four: by the draft probabilities alone a quarter or so is kept."""
    target, cut = make_target(), make_target()
    cut.keep_layers(2)
    drafter, kept = DraftModelDrafter(cut, VOCAB), {}
    for kind in ("dynamic", "coupled"):
        shape = TreeShape(kind=kind, budget=4, depth=2, top_k=2)
        answers = [
            decode(target, drafter, make_prompt(9, seed), settings(24, temperature=1.0, seed=seed, shape=shape))
            for seed in range(8)
        ]
        kept[kind] = sum(step.num_accepted for answer in answers for step in answer.steps) / sum(
            len(answer.steps) for answer in answers
        )
    assert kept["coupled"] > 1.5 * kept["dynamic"]


def test_informed_log_probabilities_are_those_of_the_race():
    ids, own = torch.tensor([1, 4, 6]), torch.log_softmax(torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]]), -1)
    foresight = Foresight(KeyedNoise(5), 11, ids, 8, 0.5)
    for depth in range(3):
        gumbel = torch.from_numpy(keyed_noise(5, 11 + depth, 8))[ids]
        expected = torch.log_softmax(own.double() / 0.5 + 0.7 * gumbel, dim=-1)
        torch.testing.assert_close(foresight.informed(own, depth), expected.float())


def test_a_growth_is_sent_what_is_informed():
    foresight = Foresight(KeyedNoise(0), 3, torch.arange(5), 5, 1.0)
    seen, levels = [], [Level(torch.ones(2), torch.ones(2), 1), Level(torch.ones(2), torch.ones(2), 3)]

    def growing():
        for level in levels:
            seen.append((yield level))
        return "tree"

    own = torch.log_softmax(torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), -1)
    growth = foresight.growth(growing())
    assert next(growth) is levels[0]
    assert growth.send(own) is levels[1]
    with pytest.raises(StopIteration) as ended:
        growth.send(own)
    assert ended.value.value == "tree"
    for got, level in zip(seen, levels, strict=True):
        assert torch.equal(got, foresight.informed(own, level.depth))


def test_numbers_that_were_passed_are_forgotten():
    noise, cpu = KeyedNoise(3), torch.device("cpu")
    first, tokens = noise.ahead(10, 3, 6, cpu), torch.tensor([4, 1])
    held = noise.uniforms(11, 6)
    noise.forget(11)
    assert noise.uniforms(11, 6) is held
    assert noise.uniforms(10, 6) is not held
    assert torch.equal(noise.ahead(11, 1, 6, cpu)[0], first[1])
    assert noise.ahead(12, 1, 6, cpu)[0].tolist() == keyed_noise(3, 12, 6).tolist()
    torch.testing.assert_close(noise.at(12, 6, tokens), torch.from_numpy(keyed_noise(3, 12, 6)[[4, 1]]).float())
