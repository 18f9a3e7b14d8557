"""Texts that suites and training data both quote: which of them is whose, and how a long one is cut.

A drafter must not be measured on articles that it was trained on. Which part an article belongs to is therefore said
in one place, by a hash of its title alone: it holds for every drafter, however its data is made, and does not change
when articles are added or left out.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

Part = Literal["train", "heldout", "suite"]

_NOT_TRAINED_ON = 40  # one article in so many
_SUITE = 2  # and of those one in so many
_SENTENCE_END = re.compile(r"(?<=[\w)\]%]{3}[.!?])(?P<quote>[\"'\u201d\u2019)]*) (?=[\"'\u201c\u2018(]?[A-Z0-9])")


def part_of(title: str) -> Part:
    """Return what an article may be used for, by a hash of its title.

    Of 40 articles, 39 are for training; the rest is halved between validation while training and evaluation suites.

    >>> [part_of(title) for title in ("Apple", "Gamelan", "Encyclopedia")]
    ['train', 'heldout', 'suite']
    """
    digest = hashlib.sha256(title.encode()).digest()
    if int.from_bytes(digest[:4], "big") % _NOT_TRAINED_ON:
        return "train"
    return "heldout" if int.from_bytes(digest[4:8], "big") % _SUITE else "suite"


def whole_sentences(text: str, limit: int) -> str:
    """Return as many whole sentences as fit into ``limit`` characters, at least the beginning of the first.

    White space becomes single blanks. A full stop ends a sentence if at least three letters precede it, so that
    initials and most abbreviations do not; a cut that is too early is all that a mistake costs.

    >>> whole_sentences("It was  written by F. Scott Fitzgerald. It is short. Many read it.", 55)
    'It was written by F. Scott Fitzgerald. It is short.'
    """
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    ends = [end for match in _SENTENCE_END.finditer(text) if (end := match.end("quote")) <= limit]
    return text[: ends[-1]] if ends else text[:limit].rsplit(" ", 1)[0]
