"""Both stages learn, keep what they shall, go on bit for bit after a stop; scores are what decoding gives."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from vsdbench.errors import ConfigError
from vsdbench.pictures import scoring
from vsdbench.pictures.lessons import make_lesson, pixel_values, word_targets
from vsdbench.pictures.llava import SPARE_TOKEN, assemble, image_features
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench.pictures.scoring import CAPTION_FACTS, VIEWS, agreement, captions, exact, examine, num_reports, show
from vsdbench.pictures.settings import StageSettings, TowerShape
from vsdbench.pictures.training import Answering, Naming


def _stage(kind, model, processor, **changes):
    settings = StageSettings(num_steps=4, batch_size=2, learning_rate=1e-2, language_learning_rate=0.0)
    return kind(model, replace(settings, **changes), torch.float32, processor.tokenizer)


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _changed(before, after):
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("kind", "rate"), [(Naming, 0.0), (Answering, 1e-2)])
def test_a_stopped_stage_goes_on_as_if_it_had_not(kind, rate, model, processor, tmp_path) -> None:
    start = _weights(model)
    _stage(kind, model, processor, language_learning_rate=rate).run(tmp_path / "whole.pt")
    whole = _weights(model)
    assert _changed(start, whole) == {"vision_tower", "multi_modal_projector"} | ({"language_model"} if rate else set())
    model.load_state_dict(start)

    def stop(number, _loss):
        if number == 2:
            raise KeyboardInterrupt

    stage = _stage(kind, model, processor, language_learning_rate=rate)
    stage.save_every_s = 0.0
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path / "stopped.pt", stop)
    model.load_state_dict(start)
    seen = []
    again = _stage(kind, model, processor, language_learning_rate=rate)
    again.run(tmp_path / "stopped.pt", lambda number, _loss: seen.append(number))
    assert seen == [2, 3, 4]
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def test_a_tuned_language_model_keeps_its_embeddings(model, processor, tmp_path) -> None:
    before = _weights(model)
    _stage(Answering, model, processor, language_learning_rate=1e-2).run(tmp_path / "stage.pt")
    after = model.state_dict()
    kept = [name for name in before if "embed_tokens" in name or "lm_head" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_patches_learn_their_words(model, processor, tmp_path) -> None:
    stage = _stage(Naming, model, processor, num_steps=40, batch_size=6, learning_rate=1e-2)
    scenes = [Scene(index, "heldout") for index in range(6)]
    labels, added = word_targets(scenes, stage.words)

    def right():
        with torch.inference_mode():
            distances = stage.distances(image_features(model, pixel_values(scenes)), added)
        return float((distances.argmin(-1) == labels).float().mean())

    before = right()
    losses = []
    stage.run(tmp_path / "naming.pt", lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert right() > before + 0.2


def test_an_answer_counts_exactly_if_greedy_decoding_gives_it(model, processor) -> None:
    scene = Scene(0, "heldout")
    lesson = make_lesson([scene], processor.tokenizer, model.config.image_token_id)
    model.generation_config.eos_token_id = None  # so that every answer gets as long as the right one
    for index, (branch, (_, question, _)) in enumerate(zip(lesson.branches, scene.questions(), strict=True)):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[scene.image()], text=prompt, return_tensors="pt")
        length = branch.last - branch.first
        said = model.generate(**inputs, do_sample=False, max_new_tokens=length)[0, -length:]
        said[-1] += index % 2  # every other one ends in a wrong token
        lesson.ids.view(-1)[lesson.predicts[branch.first : branch.last] + 1] = said
        lesson.answers[branch.first : branch.last] = said
    found = exact(model, lesson)
    assert [right for _, right in found] == [index % 2 == 0 for index in range(len(lesson.branches))]
    assert [category for category, _ in found] == [category for category, _, _ in scene.questions()]


def test_an_examination_scores_every_category_and_view(model, processor, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "_MAX_CAPTION_TOKENS", 4)
    scenes = [Scene(index, "heldout") for index in range(5)]
    done = []
    scores = examine(model, processor.tokenizer, scenes, report=done.append)
    assert set(scores) == {*CATEGORIES, CAPTION_FACTS}
    assert done == list(range(1, num_reports(5) + 1))
    for row in scores.values():
        assert set(row) == {"num", *VIEWS}
        assert all(0 <= row[view] <= 1 for view in VIEWS)
    assert sum(scores[category]["num"] for category in CATEGORIES) == sum(len(scene.questions()) for scene in scenes)


def test_views_show_the_picture_nothing_or_another() -> None:
    pixels = pixel_values([Scene(index, "heldout") for index in range(3)])
    assert torch.equal(show(pixels, "picture"), pixels)
    assert not show(pixels, "blank").any()
    assert torch.equal(show(pixels, "other")[1], pixels[0])
    assert torch.equal(show(pixels, "other")[0], pixels[2])


def test_captions_are_what_the_model_says_of_each_picture(model, processor, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "_MAX_CAPTION_TOKENS", 12)
    pixels = pixel_values([Scene(index, "heldout") for index in range(2)])
    both = captions(model, processor.tokenizer, pixels)
    assert both == [captions(model, processor.tokenizer, one[None])[0] for one in pixels]


@pytest.mark.parametrize(
    ("said", "right", "share"),
    [
        ("A. B.", "A. B.", 1.0),
        ("B. A", "A. B.", 1.0),
        ("A. C.", "A. B.", 0.5),
        ("", "A.", 0.0),
        ("A. A. A.", "A.", 1.0),
    ],
)
def test_captions_agree_by_their_sentences(said, right, share) -> None:
    assert agreement(said, right) == pytest.approx(share)


def test_a_language_model_without_a_spare_token_is_refused(language_model, tmp_path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(language_model, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace(SPARE_TOKEN, "<other>"), encoding="utf-8")
    with pytest.raises(ConfigError, match="no token <empty_output>"):
        assemble(folder, TowerShape())
