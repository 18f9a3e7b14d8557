"""What can be asked about a scene, and the one right answer to each question, made from the scene's facts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vsdbench.pictures.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Category, Dice, Facts, Sign, Thing, place

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
NO_SIGN = "There is no sign in the picture."

_CAPTION = ("Describe the picture.", "What is in the picture?", "What does the picture show?")
_READ = ("What does the sign say?", "Read the sign.", "Which letters are on the sign?")
_TOTAL = ("How many shapes are there?", "How many shapes are in the picture?", "Count the shapes.")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_NUM_ATTRIBUTES = 3

Question = tuple[Category, str, str]


def caption(facts: Facts) -> str:
    """Return a description: how many shapes, each with its place, then the sign."""
    count = len(facts.things)
    sentences = [f"The picture shows {NUMBERS[count]} {_shapes(count)} on a {facts.background} background."]
    sentences += [f"At the {place(thing.row, thing.column)} is {named(thing)}." for thing in facts.things]
    if facts.sign is not None:
        sentences.append(f"The sign at the {ROWS[facts.sign.row]} says {spelled(facts.sign.text)}.")
    return " ".join(sentences)


def questions(facts: Facts, dice: Dice) -> list[Question]:
    """Return two captions, up to three attributes, two countings and one or two readings, each with its answer.

    Args:
        facts: What is in the picture.
        dice: Decides what is asked, and in which words.
    """
    row = dice.pick(sorted({thing.row for thing in facts.things}))
    found: list[Question] = [
        ("caption", dice.pick(_CAPTION), caption(facts)),
        ("caption", f"What is in the {ROWS[row]} row?", _row(facts, row)),
    ]
    attributes = list(_attributes(facts, dice))
    found += [
        ("attribute", question, answer)
        for question, answer in dice.take(attributes, min(_NUM_ATTRIBUTES, len(attributes)))
    ]
    found.append(("counting", dice.pick(_TOTAL), f"{_there_are(len(facts.things), 'shape')} in the picture."))
    found.append(("counting", *_counted(facts, dice)))
    found.append(("reading", dice.pick(_READ), NO_SIGN if facts.sign is None else _reading(facts.sign)))
    if facts.sign is not None:
        number = dice.below(len(facts.sign.text))
        ordinal, letter = _ORDINALS[number], facts.sign.text[number]
        found.append(("reading", f"What is the {ordinal} letter on the sign?", f"The {ordinal} letter is {letter}."))
    return found


def named(thing: Thing) -> str:
    """Return a shape's full name.

    >>> named(Thing("small", "orange", "star", 0, 0))
    'a small orange star'
    """
    return f"a {thing.size} {thing.colour} {thing.shape}"


def spelled(text: str) -> str:
    """Return a sign's letters one by one.

    >>> spelled("KOP")
    'K O P'
    """
    return " ".join(text)


def plural(shape: str) -> str:
    """Return the plural of a shape's name.

    >>> plural("cross"), plural("red ring")
    ('crosses', 'red rings')
    """
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _shapes(count: int) -> str:
    return "shape" if count == 1 else "shapes"


def _reading(sign: Sign) -> str:
    return f"The sign says {spelled(sign.text)}."


def _row(facts: Facts, row: int) -> str:
    """Return what stands in a row that has shapes in it, from left to right."""
    parts = [f"{named(thing)} at the {COLUMNS[thing.column]}" for thing in facts.things if thing.row == row]
    return f"In the {ROWS[row]} row there is {_enumerated(parts)}."


def _enumerated(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _there_are(count: int, kind: str) -> str:
    return f"There is one {kind}" if count == 1 else f"There are {NUMBERS[count]} {plural(kind)}"


def _attributes(facts: Facts, dice: Dice) -> Iterator[tuple[str, str]]:
    """Yield a question of every kind that has one right answer, and that answer."""
    yield "What color is the background?", f"The background is {facts.background}."
    if facts.sign is not None:
        yield "Where is the sign?", f"The sign is at the {ROWS[facts.sign.row]}."
    free = [row for row in range(len(ROWS)) if facts.sign is None or row != facts.sign.row]
    row, column = dice.pick(free), dice.below(len(COLUMNS))
    there = [thing for thing in facts.things if (thing.row, thing.column) == (row, column)]
    where = place(row, column)
    yield (
        f"What is at the {where}?",
        f"At the {where} is {named(there[0])}." if there else f"There is nothing at the {where}.",
    )
    thing = dice.pick(facts.things)
    where = place(thing.row, thing.column)
    yield f"Which shape is at the {where}?", f"The shape at the {where} is a {thing.shape}."
    yield f"What color is the shape at the {where}?", f"The shape at the {where} is {thing.colour}."
    shapes, colours = (Counter(getattr(thing, name) for thing in facts.things) for name in ("shape", "colour"))
    pairs = Counter((thing.colour, thing.shape) for thing in facts.things)
    if single := [thing for thing in facts.things if shapes[thing.shape] == 1]:
        thing = dice.pick(single)
        yield f"What color is the {thing.shape}?", f"The {thing.shape} is {thing.colour}."
    if single := [thing for thing in facts.things if colours[thing.colour] == 1]:
        thing = dice.pick(single)
        yield f"Which shape is {thing.colour}?", f"The {thing.colour} shape is a {thing.shape}."
    if single := [thing for thing in facts.things if pairs[thing.colour, thing.shape] == 1]:
        thing = dice.pick(single)
        name, where = f"{thing.colour} {thing.shape}", place(thing.row, thing.column)
        yield f"Where is the {name}?", f"The {name} is at the {where}."


def _counted(facts: Facts, dice: Dice) -> tuple[str, str]:
    """Return how many there are of some shape or colour: mostly one that is there, sometimes any."""
    by_shape, any_kind = dice.below(2) == 0, dice.below(5) == 0
    if by_shape:
        present = [thing.shape for thing in facts.things]
        kind = dice.pick(SHAPES if any_kind else present)
        members = [thing for thing in facts.things if thing.shape == kind]
    else:
        present = [thing.colour for thing in facts.things]
        colour = dice.pick(tuple(COLOURS) if any_kind else present)
        members = [thing for thing in facts.things if thing.colour == colour]
        kind = f"{colour} shape"
    places = _enumerated([f"at the {place(thing.row, thing.column)}" for thing in members] or [""])
    answer = _there_are(len(members), kind) + (f": {places}." if members else ".")
    return f"How many {plural(kind)} are there?", answer
