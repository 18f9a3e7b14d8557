"""The benchmark of visual tokens shows the drafters pictures of the wanted size, and says what they keep of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from benchmarks.visual_tokens import describe, make_drafters, make_prompt, measure, ratio, table
from benchmarks.visual_tokens import untrained_target as make_target
from tests.pictures.conftest import SHAPE

from vsdbench.decoding.interfaces import TreeShape
from vsdbench.errors import ConfigError

CPU = torch.device("cpu")
TREE = TreeShape(budget=4, depth=2, top_k=2)


@pytest.fixture(scope="module")
def untrained_target(language_model):
    return make_target(language_model, tower=SHAPE, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def prompts(untrained_target):
    return [make_prompt(untrained_target, count) for count in (16, 144)]


def test_a_picture_takes_the_wanted_tokens_beside_the_same_words(prompts):
    assert [prompt.num_image_tokens for prompt in prompts] == [16, 144]
    assert len({tuple(itertools.compress(prompt, ~prompt.image_mask)) for prompt in prompts}) == 1


def test_the_tower_reads_its_own_size_as_ever(untrained_target):
    prompt = make_prompt(untrained_target, 81)
    stretched = untrained_target.prefill(prompt, 256).features.clone()
    del prompt.model_inputs["interpolate_pos_encoding"]
    assert torch.equal(untrained_target.prefill(prompt, 256).features, stretched)


@pytest.mark.parametrize("count", [-4, 0, 80])
def test_no_square_is_refused(untrained_target, count):
    with pytest.raises(ConfigError, match=f"--tokens has {count}.*square"):
        make_prompt(untrained_target, count)


@pytest.mark.parametrize("num_q", [1, 3])
def test_all_is_measured_and_vispec_keeps_a_few_rows(untrained_target, prompts, num_q):
    drafters = make_drafters(untrained_target, draft_vocab_size=50, num_q=num_q)
    seconds = itertools.count()
    lines = measure(untrained_target, drafters, prompts, shape=TREE, repeats=2, clock=lambda: next(seconds))
    text = len(prompts[0]) - 16
    for line, prompt in zip(lines, prompts, strict=True):
        assert (line["visual_tokens"], line["prompt_tokens"]) == (prompt.num_image_tokens, len(prompt))
        assert {name: found["cache"]["rows"] for name, found in line["drafters"].items()} == {
            "vispec": text + num_q - 1,
            "msd": len(prompt),
            "eagle3": len(prompt),
        }
        for found in line["drafters"].values():
            assert found["cache"]["bytes"] == found["cache"]["rows"] * 2 * 2 * 8 * 4  # k and v, 2 heads, 8 wide, fp32
            assert found["cache"]["bytes"] < found["cache"]["reserved_bytes"]
            assert found["prefill_ms"] == found["step_ms"] == found["tree_ms"] == 1e3  # a second between two readings
        assert line["target"]["verify_ms"] == line["target"]["prefill_ms"] == 1e3
        assert line["target"]["cache"]["bytes"] == len(prompt) * 2 * 2 * 2 * 8 * 4
        assert line["ratios"]["msd"]["tree"] == line["ratios"]["eagle3"]["prefill"] == [1, 1, 1]
    shown = table(
        {"lines": lines, "target": "tiny", "dtype": "float32", "threads": 1, "repeats": 2, "num_q": num_q, "budget": 4}
        | {"time": "clock"}
    )
    assert shown.count("vispec / msd: prefill 1.00") == 2


def test_ratios_are_of_the_same_turn(untrained_target, prompts):
    parts = ("prefill", "step", "tree")
    turns = [
        {(name, part): slow * cost for name, cost in (("target", 9.0), ("vispec", 2.0), ("msd", 4.0)) for part in parts}
        for slow in (1.0, 50.0, 3.0)
    ]
    caches = {name: {"rows": 1} for name in ("target", "vispec", "msd")}
    line = describe(prompts[0], turns, caches)
    assert line["ratios"] == {"msd": {part: [0.5, 0.5, 0.5] for part in parts}}
    assert line["drafters"]["vispec"]["step_ms"] == 6
    assert ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == [1, 0.75, 2]
