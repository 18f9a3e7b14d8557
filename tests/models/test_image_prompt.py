"""Prompts with images read as token ids, and keep their images when something is put behind them."""

from __future__ import annotations

import pytest
import torch

from vsdbench.models.image_prompt import ImagePrompt, followed_by, num_image_tokens

IDS = (5, 9, 9, 7)


@pytest.fixture(name="prompt")
def _prompt():
    inputs = {"pixel_values": torch.ones(1, 3, 4, 4), "mm_token_type_ids": torch.tensor([[0, 1, 1, 0]])}
    return ImagePrompt(IDS, inputs, torch.tensor([False, True, True, False]), num_read=4)


def test_it_reads_as_its_token_ids(prompt):
    assert len(prompt) == 4
    assert list(prompt) == [*prompt] == list(IDS)
    assert prompt[1] == 9
    assert prompt[-1] == 7
    assert 9 in prompt
    assert num_image_tokens(prompt) == prompt.num_image_tokens == 2
    assert num_image_tokens(list(prompt)) == 0


def test_what_follows_is_text_and_the_images_stay(prompt):
    longer = followed_by(followed_by(prompt, [9]), (1, 2))
    assert isinstance(longer, ImagePrompt)
    assert list(longer) == [*IDS, 9, 1, 2]
    assert longer.model_inputs is prompt.model_inputs
    assert longer.image_mask.tolist() == [False, True, True, False, False, False, False]
    assert longer.num_read == 4
    assert longer.num_image_tokens == 2
    assert len(prompt) == 4


def test_inputs_that_go_token_by_token_are_padded(prompt):
    inputs = followed_by(prompt, [1, 2]).inputs_for(6)
    assert inputs["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0]]
    assert inputs["pixel_values"] is prompt.model_inputs["pixel_values"]
    assert prompt.inputs_for(4)["mm_token_type_ids"].tolist() == [[0, 1, 1, 0]]


def test_it_cannot_be_cut(prompt):
    with pytest.raises(TypeError, match="lose them"):
        prompt[:2]


def test_text_is_followed_as_a_list():
    assert followed_by([1, 2], [3]) == [1, 2, 3]
    assert followed_by((1,), [3]) == [1, 3]
