"""Generated word problems, because a drafter must have seen arithmetic too.

Numbers, names and things vary, so that there are many thousands of different ones. None is taken from an evaluation
set.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_NAMES = [
    "Amara",
    "Beatriz",
    "Chen",
    "Dmitri",
    "Elif",
    "Farid",
    "Greta",
    "Hana",
    "Ivo",
    "Jamal",
    "Kofi",
    "Lucia",
    "Marek",
    "Nadia",
    "Omar",
    "Priya",
    "Quentin",
    "Rosa",
    "Sven",
    "Tomas",
    "Uma",
    "Viktor",
    "Wanjiru",
    "Ximena",
    "Yusuf",
    "Zofia",
    "Anders",
    "Bilal",
    "Carmen",
    "Dana",
]
_THINGS = [
    "apples",
    "notebooks",
    "pencils",
    "tickets",
    "seashells",
    "stamps",
    "cookies",
    "marbles",
    "bottles",
    "books",
    "photographs",
    "seedlings",
    "candles",
    "buttons",
    "lemons",
    "postcards",
    "bricks",
    "muffins",
    "keys",
    "lanterns",
]
_PLACES = (
    "bakery",
    "library",
    "farm",
    "workshop",
    "museum",
    "school",
    "garden",
    "factory",
    "bookshop",
    "harbour",
)
_STEPS = (
    "",
    "",
    " Think step by step.",
    " Show your work.",
    " Explain each step and give the final number.",
    " Solve it step by step and end with the answer.",
)


def _shopping(rng: Random) -> str:
    first, second = rng.sample(_THINGS, 2)
    a, b, x, y = rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 15)
    name, paid = rng.choice(_NAMES), (a * x + b * y) // 10 * 10 + rng.choice((10, 20, 50))
    return (
        f"{name} buys {a} {first} at ${x} each and {b} {second} at ${y} each and pays with ${paid}. "
        "How much change is given back?"
    )


def _sharing(rng: Random) -> str:
    people, each, left = rng.randint(3, 9), rng.randint(4, 20), rng.randint(1, 2)
    return (
        f"{rng.choice(_NAMES)} has {people * each + left} {rng.choice(_THINGS)} and shares them equally among {people} "
        "friends. How many does each friend get, and how many are left over?"
    )


def _rate(rng: Random) -> str:
    speed, hours, rest = rng.randint(3, 18) * 5, rng.randint(2, 7), rng.randint(1, 6) * 10
    kind = rng.choice(("train", "bus", "cyclist", "ship", "lorry"))
    return (
        f"A {kind} travels at {speed} km per hour for {hours} hours and then covers another {rest} km. "
        "What is the total distance?"
    )


def _percent(rng: Random) -> str:
    price, percent, count = rng.randint(2, 30) * 20, rng.choice((5, 10, 15, 20, 25, 30, 40)), rng.randint(2, 6)
    thing = rng.choice(("coat", "bicycle", "lamp", "table", "camera", "tent"))
    return (
        f"A {thing} costs ${price}. It is reduced by {percent}%. How much do {count} of them cost at the reduced price?"
    )


def _weekly(rng: Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    morning, evening, days = rng.randint(3, 15), rng.randint(2, 12), rng.randint(4, 14)
    given = rng.randint(5, 4 * days)
    return (
        f"Each morning {name} collects {morning} {thing}, and each evening {evening} more. After {days} days, {name} "
        f"gives away {given} of them. How many {thing} are left?"
    )


def _production(rng: Random) -> str:
    place, thing = rng.choice(_PLACES), rng.choice(_THINGS)
    machines, per_hour, hours, broken = rng.randint(2, 9), rng.randint(10, 60), rng.randint(3, 9), rng.randint(2, 30)
    return (
        f"A {place} has {machines} machines, each of which makes {per_hour} {thing} an hour. They run for {hours} "
        f"hours, and {broken} of the {thing} have to be thrown away. How many good ones are there?"
    )


def _ages(rng: Random) -> str:
    older, younger = rng.sample(_NAMES, 2)
    factor, age, years = rng.randint(2, 5), rng.randint(4, 14), rng.randint(2, 12)
    return (
        f"{older} is {factor} times as old as {younger}, who is {age}. "
        f"What will be the sum of their ages in {years} years?"
    )


def _fractions(rng: Random) -> str:
    part, whole = rng.choice(((1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (2, 5)))
    total, place, more = whole * rng.randint(6, 40), rng.choice(_PLACES), rng.randint(3, 20)
    return (
        f"There are {total} {rng.choice(_THINGS)} in a {place}. {part}/{whole} of them are sold in the morning and "
        f"{more} arrive in the afternoon. How many are there at the end of the day?"
    )


def _area(rng: Random) -> str:
    width, length, cost = rng.randint(3, 25), rng.randint(4, 40), rng.randint(2, 12)
    return (
        f"A rectangular {rng.choice(('garden', 'hall', 'field', 'courtyard'))} is {width} m wide and {length} m long. "
        f"Fencing costs ${cost} a metre. What are its area and the cost of a fence around it?"
    )


def _equation(rng: Random) -> str:
    a, x, b = rng.randint(2, 12), rng.randint(-9, 15), rng.randint(1, 30)
    return rng.choice(
        (
            f"Solve for x: {a}x + {b} = {a * x + b}.",
            f"Find x if {a}(x - {b}) = {a * (x - b)}.",
            f"What is {rng.randint(12, 99)} * {rng.randint(12, 99)} + {rng.randint(100, 999)}?",
            f"If f(x) = {a}x^2 - {b}x + {abs(x) + 1}, what is f({rng.randint(1, 6)})?",
        )
    )


def _probability(rng: Random) -> str:
    red, blue, green = (rng.randint(2, 9) for _ in range(3))
    return (
        f"A bag holds {red} red, {blue} blue and {green} green balls. One ball is drawn at random. What is the "
        f"probability that it is {rng.choice(('red', 'blue', 'green'))}, and that it is not?"
    )


def _earnings(rng: Random) -> str:
    name, wage, hours, extra = rng.choice(_NAMES), rng.randint(9, 30), rng.randint(20, 40), rng.randint(2, 10)
    rent = rng.randint(50, 150)
    return (
        f"{name} earns ${wage} an hour and works {hours} hours a week, plus {extra} hours of overtime paid at twice "
        f"the rate. After paying ${rent} for rent, how much is left each week?"
    )


def _order(rng: Random) -> str:
    a, b, c, d = rng.sample(_NAMES, 4)
    more, less = rng.choice((("taller", "tallest"), ("faster", "fastest"), ("older", "oldest"), ("richer", "richest")))
    return f"{a} is {more} than {b}. {c} is {more} than {a}. {d} is less so than {b}. Who is the {less}, and why?"


_PROBLEMS: tuple[Callable[[Random], str], ...] = (
    _shopping, _sharing, _rate, _percent, _weekly, _production, _ages, _fractions, _area, _equation, _probability,
    _earnings, _order,
)  # fmt: skip


def word_problem(rng: Random) -> str:
    """Return a short problem of arithmetic, algebra or ordering, often with a request to show the steps."""
    return rng.choice(_PROBLEMS)(rng) + rng.choice(_STEPS)
