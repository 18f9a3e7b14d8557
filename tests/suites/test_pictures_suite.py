"""The suite of rendered pictures needs no files and asks one question about each picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vsdbench.errors import ConfigError
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench.suites.images import pixels_sha256
from vsdbench.suites.loaders import Suite, load_config, load_suite
from vsdbench.suites.schema import control_of

SUITE = Path(__file__).parents[2] / "suites" / "pictures.yaml"


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(SUITE)


def test_every_category_has_its_share_and_no_picture_comes_twice(suite: Suite) -> None:
    assert Counter(prompt.category for prompt in suite.prompts) == dict.fromkeys(CATEGORIES, 3)
    shown = [image.sha256 for prompt in (*suite.prompts, *suite.spare) for image in prompt.images]
    assert len(shown) == len({*shown}) == 28


def test_the_question_is_about_the_picture_and_of_its_category(suite: Suite) -> None:
    for prompt in suite.prompts:
        scene = Scene(int(prompt.id.removeprefix("scenes/")), "suite")
        assert (prompt.category, *prompt.turns) in {(kind, question) for kind, question, _ in scene.questions()}
        (image,) = prompt.images
        assert image.sha256 == pixels_sha256(scene.image())


def test_pictures_are_drawn_only_where_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = Scene.image, list[int]()
    monkeypatch.setattr(Scene, "image", lambda self: drawn.append(self.index) or draw(self))
    few = load_suite(SUITE, ["sources.scenes.count=40", "sources.scenes.limit=4"])
    assert len(drawn) == len(few.prompts) + len(few.spare) == 4 + 16


def test_splits_share_nothing_and_a_wrong_one_is_refused(suite: Suite) -> None:
    others = load_suite(SUITE, ["sources.scenes.split=heldout"])
    assert not {prompt.hash for prompt in others.prompts} & {prompt.hash for prompt in suite.prompts}
    with pytest.raises(ConfigError, match=r"'sources\.0\.split' is 'test'"):
        load_suite(SUITE, ["sources.scenes.split=test"])
    with pytest.raises(ConfigError, match=r"'sources\.0\.count' is 0"):
        load_suite(SUITE, ["sources.scenes.count=0"])


def test_the_control_has_a_twin_for_every_drafter_that_is_shown_another_picture() -> None:
    config, _, _ = load_config(SUITE.with_stem("pictures-control"))
    twins = {entry.name: control_of(entry, config.drafters) for entry in config.drafters if entry.images == "shuffled"}
    assert twins == {f"{name}-kl-shuffled": f"{name}-kl" for name in ("eagle3", "msd", "vispec")}
    assert config.expected_prompts_sha256 is not None
