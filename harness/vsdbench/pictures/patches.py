"""What stands in each patch of a picture, in words of one token: what a vision tower is first taught to say.

A patch is 16 x 16 pixels, so a picture has 9 x 9 of them and a cell 3 x 3. The middle row of a cell names its shape
(``small red circle``), the row above says where that is (``top left``), a sign's slots are its letters, and all the
rest says what is behind: read row by row, the words of the patches are close to text.
"""

from __future__ import annotations

from vsdbench.pictures import font
from vsdbench.pictures.scenes import BACKGROUNDS, CELL, COLOURS, COLUMNS, ROWS, SHAPES, SIZE, SIZES, SLOT, Facts

PATCH = SLOT
GRID = SIZE // PATCH  # patches a side
SIGN = "sign"
WORDS = (*BACKGROUNDS, *SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, SIGN, *font.LETTERS)
"""All words that a patch can say; with a space before it, each is one token."""

_PER_CELL = CELL // PATCH


def patch_words(facts: Facts) -> list[str]:
    """Return the 81 words of a picture's patches, row by row.

    >>> from vsdbench.pictures.scenes import Sign, Thing
    >>> words = patch_words(Facts("pink", (Thing("small", "red", "star", 0, 2),), Sign(1, 2, "ABC")))
    >>> words[6:9], words[15:18], words[36:43]
    (['top', 'right', 'pink'], ['small', 'red', 'star'], ['pink', 'sign', 'A', 'B', 'C', 'pink', 'pink'])
    """
    words = [facts.background] * (GRID * GRID)
    for thing in facts.things:
        first = thing.row * _PER_CELL * GRID + thing.column * _PER_CELL
        words[first : first + 2] = ROWS[thing.row], COLUMNS[thing.column]
        words[first + GRID : first + GRID + _PER_CELL] = thing.size, thing.colour, thing.shape
    if facts.sign is not None:
        first = facts.sign.row * _PER_CELL * GRID + facts.sign.start - 1
        words[first] = ROWS[facts.sign.row]
        words[first + GRID : first + GRID + 1 + len(facts.sign.text)] = SIGN, *facts.sign.text
    return words


def patch_cells(facts: Facts) -> list[tuple[int, int, int]]:
    """Return ``(patch, row, column)`` of every patch that names a shape, with the cell that the shape stands in."""
    return [
        ((thing.row * _PER_CELL + 1) * GRID + thing.column * _PER_CELL + offset, thing.row, thing.column)
        for thing in facts.things
        for offset in range(_PER_CELL)
    ]
