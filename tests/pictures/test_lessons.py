"""Packed questions cost one picture and change nothing; patches say what the pixels show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vsdbench.pictures.lessons import make_lesson, pixel_values, word_labels, word_targets, word_tokens
from vsdbench.pictures.patches import GRID, PATCH, WORDS, patch_words
from vsdbench.pictures.scenes import BACKGROUNDS, COLOURS, COLUMNS, ROWS, Scene
from vsdbench.pictures.training import answer_logits

SCENES = [Scene(index, "train") for index in range(3)]


def test_a_patch_that_names_a_colour_shows_it() -> None:
    for scene in (Scene(index, "heldout") for index in range(30)):
        words, pixels = patch_words(scene.facts), scene.pixels()
        assert len(words) == GRID * GRID == 81
        assert set(words) <= set(WORDS)
        for patch in (index for index, word in enumerate(words) if word in COLOURS):
            row, column = divmod(patch, GRID)
            shown = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].reshape(-1, 3)
            distance = np.abs(shown.astype(int) - COLOURS[words[patch]]).max(axis=1)
            assert distance.min() <= 12
        text = "".join(word for word in words if len(word) == 1)
        assert text == (scene.facts.sign.text if scene.facts.sign else "")


def test_an_object_s_words_carry_its_place() -> None:
    words = torch.eye(len(WORDS))
    labels, added = word_targets(SCENES, words)
    assert torch.equal(labels, word_labels(SCENES))
    thing = SCENES[0].facts.things[0]
    patch = (3 * thing.row + 1) * GRID + 3 * thing.column
    named = {WORDS[index]: float(share) for index, share in enumerate(added[0, patch]) if share}
    assert named == pytest.approx({ROWS[thing.row]: 0.4, COLUMNS[thing.column]: 0.4})
    assert not added[0][labels[0] < len(BACKGROUNDS)].any()


def test_pixels_are_the_processor_s(processor) -> None:
    ours = pixel_values(SCENES)
    theirs = processor.image_processor([scene.image() for scene in SCENES], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs)


def test_every_packed_question_has_the_logits_of_its_own_conversation(model, processor) -> None:
    lesson = make_lesson(SCENES, processor.tokenizer, model.config.image_token_id)
    with torch.inference_mode():
        packed = answer_logits(model, lesson)
    asked = [(scene, *question) for scene in SCENES for question in scene.questions()]
    assert len(asked) == len(lesson.branches)
    for branch, (scene, category, question, answer) in zip(lesson.branches, asked, strict=True):
        assert (branch.category, SCENES[branch.scene]) == (category, scene)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[scene.image()], text=f"{prompt}{answer}<|im_end|>", return_tensors="pt")
        length = branch.last - branch.first
        assert inputs["input_ids"][0, -length:].tolist() == lesson.answers[branch.first : branch.last].tolist()
        with torch.inference_mode():
            own = model(**inputs).logits[0, -length - 1 : -1]
        torch.testing.assert_close(packed[branch.first : branch.last], own, atol=1e-5, rtol=1e-4)


def test_a_tokenizer_without_the_words_is_refused(processor) -> None:
    ids = word_tokens(processor.tokenizer)
    assert len(set(ids)) == len(WORDS)

    def letters(text, **_):
        return {"input_ids": list(text)}

    with pytest.raises(ValueError, match="splits white, gray"):
        word_tokens(letters)
