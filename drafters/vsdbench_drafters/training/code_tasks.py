"""Generated programming tasks, because a drafter must have seen code too.

Each is built from a small function of our own whose examples are computed, so that what a prompt claims is true. None
is taken from an evaluation set.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

# Name, what it does ({n}: a number, {c}: a letter), what it is given, and what it returns.
_FUNCTIONS: tuple[tuple[str, str, str, Callable[..., object]], ...] = (
    ("count_above", "Return how many values are greater than {n}.", "ints", lambda v, n, _: sum(x > n for x in v)),
    (
        "drop_multiples",
        "Return the values that are not multiples of {n}, in order.",
        "ints",
        lambda v, n, _: [x for x in v if x % n],
    ),
    ("scale_all", "Return each value multiplied by {n}.", "ints", lambda v, n, _: [x * n for x in v]),
    (
        "clip_top",
        "Return the values with everything above {n} replaced by {n}.",
        "ints",
        lambda v, n, _: [min(x, n) for x in v],
    ),
    (
        "every_nth",
        "Return the values at the indices 0, {n}, 2 * {n}, 3 * {n} and so on.",
        "ints",
        lambda v, n, _: v[::n],
    ),
    (
        "spread",
        "Return the difference between the largest and the smallest value.",
        "ints",
        lambda v, *_: max(v) - min(v),
    ),
    (
        "running_totals",
        "Return the list of sums of the first 1, 2, 3, ... values.",
        "ints",
        lambda v, *_: [sum(v[: i + 1]) for i in range(len(v))],
    ),
    (
        "rotate_left",
        "Return the values rotated to the left by {n} places.",
        "ints",
        lambda v, n, _: v[n % len(v) :] + v[: n % len(v)],
    ),
    ("squares_of_odd", "Return the squares of the odd values.", "ints", lambda v, *_: [x * x for x in v if x % 2]),
    (
        "neighbour_gaps",
        "Return the absolute differences of neighbouring values.",
        "ints",
        lambda v, *_: [abs(a - b) for a, b in pairwise(v)],
    ),
    (
        "second_largest",
        "Return the second largest distinct value, or None if there is none.",
        "ints",
        lambda v, *_: sorted(set(v))[-2] if len(set(v)) > 1 else None,
    ),
    (
        "alternating_sum",
        "Return first minus second plus third minus fourth, and so on.",
        "ints",
        lambda v, *_: sum(v[::2]) - sum(v[1::2]),
    ),
    (
        "pair_up",
        "Return a list of pairs of each value and its index.",
        "ints",
        lambda v, *_: [(x, i) for i, x in enumerate(v)],
    ),
    (
        "most_common",
        "Return the value that appears most often, the smallest one on ties.",
        "ints",
        lambda v, *_: max(sorted(set(v)), key=v.count),
    ),
    (
        "chunks",
        "Split the values into lists of length {n}; the last may be shorter.",
        "ints",
        lambda v, n, _: [v[i : i + n] for i in range(0, len(v), n)],
    ),
    (
        "count_letter",
        "Return how often the letter '{c}' appears, ignoring case.",
        "text",
        lambda t, _, c: t.lower().count(c),
    ),
    ("mask_letter", "Replace each '{c}' in the text by '*'.", "text", lambda t, _, c: t.replace(c, "*")),
    (
        "long_words",
        "Return the words that have more than {n} letters.",
        "text",
        lambda t, n, _: [w for w in t.split() if len(w) > n],
    ),
    (
        "reverse_each_word",
        "Reverse each word, but keep the order of the words.",
        "text",
        lambda t, *_: " ".join(w[::-1] for w in t.split()),
    ),
    (
        "initials",
        "Return the first letters of the words as upper-case letters.",
        "text",
        lambda t, *_: "".join(w[0].upper() for w in t.split()),
    ),
    (
        "word_lengths",
        "Return a dictionary from each word to its length.",
        "text",
        lambda t, *_: {w: len(w) for w in t.split()},
    ),
    (
        "starts_with_count",
        "Return how many words begin with the letter '{c}'.",
        "text",
        lambda t, _, c: sum(w.startswith(c) for w in t.split()),
    ),
    (
        "truncate_words",
        "Keep only the first {n} characters of each word.",
        "text",
        lambda t, n, _: " ".join(w[:n] for w in t.split()),
    ),
    (
        "swap_ends",
        "Return the text with its first and last words exchanged.",
        "text",
        lambda t, *_: " ".join([t.split()[-1], *t.split()[1:-1], t.split()[0]]),
    ),
    (
        "title_every_other",
        "Write every other word in upper case, beginning with the first.",
        "text",
        lambda t, *_: " ".join(w.upper() if i % 2 == 0 else w for i, w in enumerate(t.split())),
    ),
    (
        "digit_total",
        "Return the sum of the decimal digits of a non-negative number.",
        "int",
        lambda k, *_: sum(map(int, str(k))),
    ),
    ("is_multiple", "Return True if the number is a multiple of {n}.", "int", lambda k, n, _: k % n == 0),
    (
        "divisor_list",
        "Return all positive divisors in ascending order.",
        "int",
        lambda k, *_: [d for d in range(1, k + 1) if k % d == 0],
    ),
    (
        "to_base",
        "Return the digits of the number in base {n}, most significant first.",
        "int",
        lambda k, n, _: _digits(k, max(2, n)),
    ),
    ("round_down", "Round down to the nearest multiple of {n}.", "int", lambda k, n, _: k - k % n),
    (
        "count_steps",
        "Return how often the number can be halved (rounding down) before it is 0.",
        "int",
        lambda k, *_: k.bit_length(),
    ),
    (
        "triangle_rows",
        "Return the largest r such that 1 + 2 + ... + r is at most the number.",
        "int",
        lambda k, *_: max(r for r in range(k + 1) if r * (r + 1) // 2 <= k),
    ),
)
_PARAMETERS = {"ints": "values: list[int]", "text": "text: str", "int": "number: int"}
_WORDS = [
    "river",
    "stone",
    "window",
    "green",
    "silver",
    "paper",
    "garden",
    "music",
    "winter",
    "candle",
    "yellow",
    "mountain",
    "little",
    "forest",
    "bridge",
    "summer",
    "orange",
    "planet",
    "simple",
    "circle",
    "market",
    "kitchen",
    "rabbit",
    "engine",
    "cloud",
]


def _digits(number: int, base: int) -> list[int]:
    digits = [number % base]
    while number := number // base:
        digits.append(number % base)
    return digits[::-1]


def _argument(kind: str, rng: Random) -> object:
    if kind == "ints":
        return [rng.randint(-9, 20) for _ in range(rng.randint(3, 6))]
    if kind == "text":
        return " ".join(rng.sample(_WORDS, rng.randint(3, 5)))
    return rng.randint(5, 120)


def _function(rng: Random) -> tuple[str, str, str, list[str]]:
    """Return name, parameters, description and examples (``call`` and result lines) of a random function."""
    name, description, kind, compute = rng.choice(_FUNCTIONS)
    number, letter = rng.randint(2, 9), rng.choice("aeilnorst")
    examples = []
    for _ in range(rng.randint(1, 3)):
        argument = _argument(kind, rng)
        examples += [f">>> {name}({argument!r})", repr(compute(argument, number, letter))]
    if "{n}" in description and rng.random() < 0.5:
        name_n = f"{name}_{number}"
        examples = [line.replace(f"{name}(", f"{name_n}(") for line in examples]
        name = name_n
    return name, _PARAMETERS[kind], description.format(n=number, c=letter), examples


def code_completion(rng: Random) -> str:
    """Return a Python signature with a docstring and examples, to be completed."""
    name, parameters, description, examples = _function(rng)
    helper = rng.choice(("", "", "", "from typing import List\n\n\n", "import math\n\n\n"))
    body = "\n".join(f"    {line}" for line in examples)
    opening = rng.choice((f'    """{description}\n', f'    """ {description}\n', f'    """\n    {description}\n'))
    stub = f'{helper}def {name}({parameters}):\n{opening}{body}\n    """\n'
    ask = rng.choice(
        (
            "{stub}",
            "{stub}",
            "Complete the following Python function.\n\n{stub}",
            "Complete this function:\n\n```python\n{stub}```",
            "Finish the body of the function below and return only code.\n\n{stub}",
            "Write the missing implementation.\n\n```python\n{stub}```\n\nThen explain it in one sentence.",
        )
    )
    return ask.format(stub=stub)


_EXTRAS = (
    "",
    "",
    " Add comments.",
    " Keep it as short as you can.",
    " Include type hints and a docstring.",
    " Show how to call it.",
    " Explain how it works afterwards.",
)


def code_request(rng: Random) -> str:
    """Return a request in words for a small function, a test, an explanation or a translation of one."""
    name, parameters, description, examples = _function(rng)
    wish = description[0].lower() + description[1:-1]
    ask = rng.choice(
        (
            "Write a Python function `{name}({parameters})` that should do this: {wish}.",
            "Implement {name} in Python. It must {wish}. For example:\n{example}",
            "Write {language} code for this: given `{parameters}`, {wish}.",
            "Write unit tests with pytest for a function `{name}({parameters})` that must {wish}.",
            "How would you {wish} in {language}? Show code and say what its complexity is.",
            "Write a Python script that reads its input from the command line in order to {wish}.",
            "My function `{name}` should {wish}, but it fails on an empty input. Write a robust version.",
        )
    )
    language = rng.choice(("Python", "JavaScript", "Java", "C++", "Go", "Python", "Rust"))
    return (ask + rng.choice(_EXTRAS)).format(
        name=name, parameters=parameters, wish=wish, example="\n".join(examples[:2]), language=language
    )
