"""Scenes: pictures of coloured shapes and a sign, each with all there is to know about it.

A scene is a function of its number and its split alone: the same facts, words and pixels on every machine, so a suite
or a training set made of scenes needs no files. Which split a scene belongs to is decided by a hash of its facts
(shapes, places, letters, background), so no two splits show the same thing, not even in other shades.

The picture is 144 x 144 pixels: three rows by three columns of cells. Shapes stand in cells, one each; a sign with
capital letters may take a whole row, one letter in every 16 pixels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsdbench.pictures import font

T = TypeVar("T")

Split = Literal["train", "heldout", "suite"]
Category = Literal["caption", "attribute", "counting", "reading"]

CATEGORIES: tuple[Category, ...] = ("caption", "attribute", "counting", "reading")

SIZE, CELL, SLOT = 144, 48, 16  # pixels: of the picture, of a cell of the grid, of a letter on a sign
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SIZES, SHAPES = ("small", "large"), ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (243, 140, 28),
    "yellow": (238, 214, 40),
    "green": (48, 158, 68),
    "blue": (44, 92, 206),
    "purple": (146, 62, 176),
    "brown": (122, 76, 40),
    "black": (28, 28, 28),
}
BACKGROUNDS = {"white": (246, 246, 246), "gray": (186, 188, 190), "pink": (250, 206, 216)}
BOARDS = (((24, 44, 92), (244, 244, 244)), ((255, 255, 255), (20, 20, 20)), ((20, 84, 60), (250, 236, 120)))
"""A sign's colour and its letters'."""

_OUT_OF = 16  # of so many scenes, one is held out and one is for suites
_ATTEMPTS = 1000
_FIVE_SIDES = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))  # normals of a pentagon, times 1,000


class Thing(NamedTuple):
    """A shape in its cell: ``row`` and ``column`` are 0, 1 or 2 from the top left."""

    size: str
    colour: str
    shape: str
    row: int
    column: int


class Sign(NamedTuple):
    """A sign: its row, the 16-pixel slot where its text begins, and the text, 3 to 5 capital letters."""

    row: int
    start: int
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All there is to know about a scene.

    Attributes:
        background: Name of the colour behind everything.
        things: The shapes, from the top left, row by row.
        sign: The sign, if there is one.
    """

    background: str
    things: tuple[Thing, ...]
    sign: Sign | None

    @property
    def sha256(self) -> str:
        """The sha256 of the facts, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def split(self) -> Split:
        """The split that scenes with these facts belong to."""
        rest = int(self.sha256[:8], 16) % _OUT_OF
        return "suite" if rest == 0 else "heldout" if rest == 1 else "train"


@dataclass(frozen=True)
class Scene:
    """The scene with a number, of one split.

    >>> Scene(0, "suite").facts.sha256 == Scene(0, "heldout").facts.sha256
    False

    Args:
        index: Any number from 0.
        split: ``train``, ``heldout`` or ``suite``.
    """

    index: int
    split: Split

    @functools.cached_property
    def facts(self) -> Facts:
        """What it shows."""
        if self.index < 0:
            raise ValueError(f"a scene's number is {self.index}; it must be 0 or more.")
        for attempt in range(_ATTEMPTS):
            facts = _invent(Dice(f"facts/{self.split}/{self.index}/{attempt}"))
            if facts.split == self.split:
                return facts
        raise ValueError(f"there is no split '{self.split}'; it must be train, heldout or suite.")

    def image(self) -> Image.Image:
        """Return the picture, RGB, 144 x 144 pixels."""
        return Image.fromarray(self.pixels())

    def pixels(self) -> NDArray[np.uint8]:
        """Return the picture as ``[144, 144, 3]`` bytes."""
        return _draw(self.facts, Dice(f"pixels/{self.split}/{self.index}"))

    def caption(self) -> str:
        """Return a description of all that is in the picture."""
        from vsdbench.pictures.questions import caption  # noqa: PLC0415 - the words are made of scenes

        return caption(self.facts)

    def questions(self) -> list[tuple[Category, str, str]]:
        """Return questions about the picture, each with its category and its one right answer."""
        from vsdbench.pictures.questions import questions  # noqa: PLC0415

        return questions(self.facts, Dice(f"questions/{self.split}/{self.index}"))


def place(row: int, column: int) -> str:
    """Return the words for a cell.

    >>> place(2, 0)
    'bottom left'
    """
    return f"{ROWS[row]} {COLUMNS[column]}"


class Dice:
    """Choices that a text decides, on every machine and with every version of Python.

    >>> dice = Dice("an example")
    >>> [dice.below(100) for _ in range(3)]
    [47, 50, 0]
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """Return a number from 0 to ``n`` - 1; ``random`` is the one method whose numbers Python promises to keep."""
        return int(self._random.random() * n)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of them."""
        return options[self.below(len(options))]

    def take(self, options: Sequence[T], count: int) -> list[T]:
        """Return ``count`` different ones of them."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def near(self, value: int, spread: int) -> int:
        """Return a number that is at most ``spread`` away from ``value``."""
        return value - spread + self.below(2 * spread + 1)


def _invent(dice: Dice) -> Facts:
    """Return the facts of some scene: 1 to 6 shapes, often of few kinds so that there is something to count."""
    rows, sign = [0, 1, 2], None
    if dice.below(10) < 8:
        row, length = dice.below(3), 3 + dice.below(3)
        sign = Sign(row, 1 + dice.below(SIZE // SLOT - length), "".join(dice.pick(font.LETTERS) for _ in range(length)))
        rows.remove(row)
    shapes = dice.take(SHAPES, 2) if dice.below(2) else SHAPES
    colours = dice.take(tuple(COLOURS), 2) if dice.below(3) == 0 else tuple(COLOURS)
    cells = dice.take([(row, column) for row in rows for column in range(len(COLUMNS))], 1 + dice.below(6))
    things = [
        Thing(dice.pick(SIZES), dice.pick(colours), dice.pick(shapes), row, column) for row, column in sorted(cells)
    ]
    return Facts(dice.pick(tuple(BACKGROUNDS)), tuple(things), sign)


# ---- pixels: whole numbers only, so that no machine rounds differently ----


def _draw(facts: Facts, dice: Dice) -> NDArray[np.uint8]:
    """Return the picture of some facts; shades, exact places and exact sizes are the dice's."""
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    canvas[:] = _shade(BACKGROUNDS[facts.background], dice, 6)
    for thing in facts.things:
        radius = dice.near(9, 1) if thing.size == "small" else dice.near(18, 1)
        x = dice.near(thing.column * CELL + CELL // 2, 3)
        y = dice.near(thing.row * CELL + CELL // 2, 3)
        across, down = np.arange(SIZE)[None, :] - x, np.arange(SIZE)[:, None] - y
        canvas[_inside(thing.shape, across, down, radius)] = _shade(COLOURS[thing.colour], dice, 12)
    if facts.sign is not None:
        _draw_sign(canvas, facts.sign, dice)
    return canvas


def _shade(colour: tuple[int, int, int], dice: Dice, spread: int) -> tuple[int, ...]:
    return tuple(min(max(dice.near(value, spread), 0), 255) for value in colour)


def _inside(shape: str, across: NDArray[np.int_], down: NDArray[np.int_], radius: int) -> NDArray[np.bool_]:
    """Return which pixels, given by their offsets from the centre, belong to a shape."""
    inside: NDArray[np.bool_]
    match shape:
        case "circle":
            inside = across**2 + down**2 <= radius**2
        case "ring":
            inside = (across**2 + down**2 <= radius**2) & (100 * (across**2 + down**2) >= 36 * radius**2)
        case "square":
            inside = np.maximum(abs(across), abs(down)) * 20 <= 17 * radius
        case "diamond":
            inside = 10 * (abs(across) + abs(down)) <= 11 * radius
        case "triangle":
            inside = (20 * abs(across) <= 11 * (down + radius)) & (4 * down <= 3 * radius)
        case "cross":
            inside = (np.minimum(abs(across), abs(down)) * 3 <= radius) & (np.maximum(abs(across), abs(down)) <= radius)
        case "star":  # a five-pointed star is what lies behind at least four sides of a pentagon
            behind = [x * across + y * down <= 330 * radius for x, y in _FIVE_SIDES]
            inside = np.sum(behind, axis=0) >= 4
        case _:
            raise ValueError(f"there is no shape '{shape}'; it must be one of {', '.join(SHAPES)}.")
    return inside


def _draw_sign(canvas: NDArray[np.uint8], sign: Sign, dice: Dice) -> None:
    board, ink = dice.pick(BOARDS)
    top, left = sign.row * CELL + SLOT, sign.start * SLOT
    edge = 3 + dice.below(4)
    canvas[top - edge : top + SLOT + edge, left - 2 : left + len(sign.text) * SLOT + 2] = _shade(board, dice, 5)
    shade, lift = _shade(ink, dice, 5), dice.below(3)
    for slot, letter in enumerate(sign.text):
        drawn = font.bitmap(letter, 2)
        x = left + slot * SLOT + dice.near(3, 2)
        canvas[top + lift : top + lift + drawn.shape[0], x : x + drawn.shape[1]][drawn] = shade
