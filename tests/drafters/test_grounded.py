"""Grounded training prompts are of the suite's kinds, but share neither articles nor words with it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from vsdbench.suites import rows as row_sources
from vsdbench.suites.articles import part_of
from vsdbench.suites.loaders import load_config, load_suite
from vsdbench_drafters.training.grounded import INSTRUCTIONS, LAYOUTS, GroundedSource
from vsdbench_drafters.training.prompts import Article, PromptSource, split_of
from vsdbench_drafters.training.templates import FIELDS

SUITE = Path(__file__).parents[2] / "suites" / "grounded.yaml"
WANTED = {"train": 300, "heldout": 40, "suite": 100}
SAME = "sources.leads.limit=80"  # changes nothing, but the articles here are not the pinned ones


def make_articles() -> list[Article]:
    """Articles of every part, in the order in which their titles come up."""
    titles = (f"Topic{number:05d}" for number in itertools.count())
    left, articles = dict(WANTED), []
    while any(left.values()):
        title = next(titles)
        if left[part_of(title)]:
            left[part_of(title)] -= 1
            sentences = (f"Sentence {number} says something about {title} that is long." for number in range(9))
            articles.append(Article(title, f"{title} is a thing. " + " ".join(sentences)))
    return articles


ARTICLES = make_articles()


@pytest.fixture
def suite(tmp_path, monkeypatch):
    path = tmp_path / "leads.json"
    path.write_text(json.dumps({article.title: {"extract": article.lead} for article in ARTICLES}))
    monkeypatch.setattr(row_sources, "fetch", lambda *_, **__: path)
    return load_suite(SUITE, [SAME])


def digest(source, num):
    """One hash of the first prompts."""
    found = hashlib.sha256()
    for index in range(num):
        found.update(json.dumps([source[index].category, source[index].messages], ensure_ascii=False).encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(("split", "golden"), [("train", "894e70ed771ce750"), ("heldout", "6e6bb31f6a63f473")])
def test_prompts_of_the_source_wiki_are_what_they_were(split, golden):
    """Data and drafters are cached under the version of the prompts: the same version must give the same prompts."""
    articles = [Article(f"Topic{i:04d}", f"Topic{i:04d} is a thing. It was found in {1000 + i}.") for i in range(600)]
    assert digest(PromptSource(articles, seed=0, split=split), 60) == golden


@pytest.mark.parametrize(("split", "golden"), [("train", "80b9b701db54daca"), ("heldout", "f5b7c6f4b8874880")])
def test_prompts_of_a_version_never_change(split, golden):
    assert digest(GroundedSource(ARTICLES, seed=0, split=split), 60) == golden


def test_instructions_and_layouts_have_every_field_and_differ():
    known = dict.fromkeys((*FIELDS, "title"), "x")
    instructions = [text for group in INSTRUCTIONS.values() for text in group]
    assert len(instructions) == len(set(instructions)) >= 50
    for text in instructions:
        assert "{" not in text.format(**known)
    for layout in LAYOUTS:
        assert {"{instruction}", "{lead}"} <= set(re.findall(r"{\w+}", layout))


def test_categories_are_the_suites_and_have_equal_shares(suite):
    in_suite = Counter(prompt.category for prompt in suite.prompts)
    assert in_suite == dict.fromkeys(INSTRUCTIONS, 16)
    source = GroundedSource(ARTICLES, seed=0)
    found = Counter(source[index].category for index in range(3000))
    assert found.keys() == in_suite.keys()
    assert all(count == pytest.approx(600, abs=90) for count in found.values())


def test_every_prompt_of_the_suite_has_an_article_of_its_own_and_fits(suite):
    assert len({prompt.id for prompt in suite.prompts}) == 80
    for prompt in suite.prompts:
        title = prompt.id.removeprefix("leads/")
        assert part_of(title) == "suite"
        assert f"{title} is a thing. Sentence 0" in prompt.turns[0]
        assert len(prompt.turns[0]) < 800 + 120


@pytest.mark.parametrize("make", [PromptSource, GroundedSource])
def test_no_training_prompt_is_about_an_article_of_the_suite(suite, make):
    asked = {prompt.hash for prompt in suite.prompts}
    names = {article.title for article in ARTICLES if part_of(article.title) != "train"}
    source = make(ARTICLES, seed=0)
    for index in range(2000):
        assert source[index].hash not in asked
        for message in source[index].messages:
            assert names.isdisjoint(re.findall(r"Topic\d+", message["content"]))


def test_heldout_prompts_use_neither_training_nor_suite_articles():
    source = GroundedSource(ARTICLES, seed=0, split="heldout")
    text = "".join(source[index].messages[0]["content"] for index in range(300))
    named = set(re.findall(r"Topic\d+", text))
    assert {part_of(title) for title in named} == {"heldout"}
    assert len(named) == WANTED["heldout"]


def test_wordings_are_not_the_suites():
    config, _, _ = load_config(SUITE)
    asked = {re.sub(r"\W+", " ", variant.template.casefold()) for variant in config.sources[0].variants}
    assert len(asked) == 20
    for text in itertools.chain(*INSTRUCTIONS.values()):
        words = re.sub(r"\W+", " ", text.casefold()).strip()
        assert not any(words in wording for wording in asked)


def test_prompts_are_varied_and_reproducible_by_index():
    source, again = (GroundedSource(ARTICLES, seed=0) for _ in range(2))
    prompts = [source[index] for index in range(2000)]
    assert len({prompt.hash for prompt in prompts}) > 1950
    assert [again[index] for index in reversed(range(50))] == prompts[49::-1]
    assert GroundedSource(ARTICLES, seed=1)[0] != prompts[0]


def test_leads_are_whole_sentences_of_several_lengths():
    source = GroundedSource(ARTICLES, seed=0)
    counts = set()
    for index in range(100):
        text = source[index].messages[0]["content"]
        begun, whole = len(re.findall(r"Sentence \d", text)), text.count("that is long.")
        assert begun == whole
        counts.add(whole)
    assert len(counts) >= 3


def test_the_old_split_holds_out_both_parts():
    for article in ARTICLES:
        assert (split_of(article.title) == "train") == (part_of(article.title) == "train")
