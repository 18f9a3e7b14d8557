"""Scenes: the same everywhere, no split sees another's, pixels show the facts, and answers follow from them."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from vsdbench.pictures import font
from vsdbench.pictures.questions import NO_SIGN, NUMBERS
from vsdbench.pictures.scenes import (
    BACKGROUNDS,
    BOARDS,
    CATEGORIES,
    CELL,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SLOT,
    Facts,
    Scene,
    Sign,
    Thing,
    place,
)

SCENES = [Scene(index, split) for split in ("train", "heldout", "suite") for index in range(40)]


def _nearest(pixel: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: int(((pixel.astype(int) - names[name]) ** 2).sum()))


def _ink(scene: Scene, row: int, column: int) -> np.ndarray:
    """Which pixels of a cell are not the background, which is what fills the picture's edge."""
    pixels = scene.pixels()
    cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    return (cell != pixels[0, 0]).any(axis=-1)


def test_scenes_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for scene in SCENES[::4]:
        digest.update(scene.facts.sha256.encode() + scene.image().tobytes() + repr(scene.questions()).encode())
    assert digest.hexdigest() == "11546402d092f85deb636a95aa1942846a0875881e4a75ccc8f7f3f78e0fafbf"
    assert Scene(3, "suite").image().size == (144, 144)
    assert Scene(3, "suite").image().mode == "RGB"


def test_no_split_sees_a_scene_of_another() -> None:
    seen = {
        split: {Scene(index, split).facts.sha256 for index in range(300)} for split in ("train", "heldout", "suite")
    }
    assert not seen["train"] & seen["heldout"]
    assert not seen["train"] & seen["suite"]
    assert not seen["heldout"] & seen["suite"]
    assert all(len(hashes) > 290 for hashes in seen.values())
    assert all(Scene(7, split).facts.split == split for split in seen)


def test_shades_and_places_in_the_cell_differ_where_the_facts_are_the_same() -> None:
    facts = Facts("white", (Thing("small", "red", "star", 0, 0),), None)
    first, second = (Scene(index, "train") for index in (0, 1))
    for scene in (first, second):
        scene.__dict__["facts"] = facts
    assert not np.array_equal(first.pixels(), second.pixels())


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.split}{scene.index}")
def test_the_pixels_show_the_facts(scene: Scene) -> None:
    facts, pixels = scene.facts, scene.pixels()
    assert _nearest(pixels[0, 0], BACKGROUNDS) == facts.background
    assert 1 <= len(facts.things) <= 6
    occupied = {(thing.row, thing.column): thing for thing in facts.things}
    for row in set(range(3)) - ({facts.sign.row} if facts.sign else set()):
        for column in range(3):
            ink = _ink(scene, row, column)
            if (row, column) not in occupied:
                assert not ink.any()
                continue
            thing = occupied[row, column]
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            assert _nearest(np.median(cell[ink], axis=0), COLOURS) == thing.colour
            assert (max(np.ptp(axis) for axis in np.nonzero(ink)) >= 25) == (thing.size == "large")
            centre = [int(axis.min() + axis.max()) // 2 for axis in np.nonzero(ink)]
            assert ink[centre[0], centre[1]] == (thing.shape != "ring")


def test_every_shape_is_another() -> None:
    areas = {}
    for shape in SHAPES:
        scene = Scene(0, "train")
        scene.__dict__["facts"] = Facts("white", (Thing("large", "blue", shape, 1, 1),), None)
        areas[shape] = _ink(scene, 1, 1)
    for shape, ink in areas.items():
        others = [(ink != other).sum() for name, other in areas.items() if name != shape]
        assert min(others) > 100, shape


def test_the_letters_of_a_sign_can_be_read_from_the_pixels() -> None:
    signs = 0
    for scene in SCENES:
        sign = scene.facts.sign
        if sign is None:
            continue
        signs += 1
        assert 3 <= len(sign.text) <= 5
        strip = scene.pixels()[sign.row * CELL + SLOT : sign.row * CELL + 2 * SLOT]
        inks = {f"board{index}": ink for index, (_, ink) in enumerate(BOARDS)}
        boards = {f"board{index}": board for index, (board, _) in enumerate(BOARDS)}
        for slot, letter in enumerate(sign.text, start=sign.start):
            patch = strip[:, slot * SLOT : (slot + 1) * SLOT]
            style = _nearest(patch[0, 0], boards)
            wet = abs(patch.astype(int) - inks[style]).max(axis=-1) <= 5
            rows, columns = np.nonzero(wet)
            drawn = font.bitmap(letter, 2)
            assert wet.sum() == drawn.sum()
            found = wet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            kept = drawn[drawn.any(axis=1)][:, drawn.any(axis=0)]
            assert np.array_equal(found, kept)
    assert signs > len(SCENES) // 2


def test_letters_differ() -> None:
    assert len(font.LETTERS) == 26
    assert len({font.bitmap(letter).tobytes() for letter in font.LETTERS}) == 26


@pytest.mark.parametrize("scene", SCENES[::3], ids=lambda scene: f"{scene.split}{scene.index}")
def test_the_answers_follow_from_the_facts(scene: Scene) -> None:
    facts = scene.facts
    asked = scene.questions()
    assert {category for category, _, _ in asked} == set(CATEGORIES)
    assert asked == scene.questions()
    assert len({question for _, question, _ in asked}) == len(asked)
    text = scene.caption()
    assert text in {answer for category, _, answer in asked if category == "caption"}
    for thing in facts.things:
        assert f"At the {place(thing.row, thing.column)} is a {thing.size} {thing.colour} {thing.shape}." in text
    assert ("says" in text) == (facts.sign is not None)
    for category, question, answer in asked:
        _check(facts, category, question, answer)


def _check(facts: Facts, category: str, question: str, answer: str) -> None:
    """Look an answer up in the facts again, from the words of the question."""
    things = facts.things
    if category == "counting":
        words = re.findall(r"[a-z]+", question)
        stem = next((name for name in (*COLOURS, *SHAPES) if any(word.startswith(name) for word in words)), "")
        members = [thing for thing in things if stem in {"", thing.colour, thing.shape}]
        assert NUMBERS[len(members)] in answer.split()
        assert not stem or all(place(thing.row, thing.column) in answer for thing in members)
    elif category == "reading":
        if facts.sign is None:
            assert answer == NO_SIGN
        elif "letter is" in answer:
            number = ("first", "second", "third", "fourth", "fifth").index(question.split()[3])
            assert answer.endswith(f"{facts.sign.text[number]}.")
        else:
            assert answer == f"The sign says {' '.join(facts.sign.text)}."
    elif found := re.fullmatch(r"What color is the (\w+)\?", question):
        colours = {thing.colour for thing in things if thing.shape == found[1]}
        assert answer.endswith(f"{facts.background if found[1] == 'background' else colours.pop()}.")
        assert not colours or found[1] == "background"
    elif found := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        (only,) = [thing for thing in things if (thing.colour, thing.shape) == found.groups()]
        assert answer.endswith(f"{place(only.row, only.column)}.")
    elif found := re.search(rf"at the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})\?", question):
        there = [thing for thing in things if place(thing.row, thing.column) == f"{found[1]} {found[2]}"]
        assert bool(there) == ("nothing" not in answer)
        assert not there or there[0].colour in answer or there[0].shape in answer


def test_a_question_about_a_place_is_never_about_the_sign() -> None:
    for scene in SCENES:
        if scene.facts.sign:
            row = ROWS[scene.facts.sign.row]
            assert not any(f"{row} {column}" in question for _, question, _ in scene.questions() for column in COLUMNS)


def test_a_sign_is_facts_like_any_other() -> None:
    one = Facts("white", (Thing("small", "red", "star", 0, 0),), Sign(1, 2, "ABC"))
    other = Facts("white", (Thing("small", "red", "star", 0, 0),), Sign(1, 2, "ABD"))
    assert one.sha256 != other.sha256


@pytest.mark.parametrize(("index", "split", "message"), [(-1, "train", "-1"), (0, "test", "'test'")])
def test_what_is_no_scene_is_refused(index: int, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scene(index, split).facts  # noqa: B018
