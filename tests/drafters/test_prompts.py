"""Prompts must be many, varied, reproducible by index, and never those of an evaluation."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from vsdbench.errors import EnvironmentProblemError
from vsdbench.suites.prompts import prompt_hash
from vsdbench_drafters.training import code_tasks, word_problems
from vsdbench_drafters.training.prompts import Article, PromptSource, read_articles, shorten, split_of
from vsdbench_drafters.training.templates import FIELDS, FOLLOW_UPS, GENERATED, TEMPLATES

ARTICLES = [Article(f"Topic{i:04d}", f"Topic{i:04d} is a thing. It was found in {1000 + i}.") for i in range(600)]


def test_templates_are_many_and_have_every_field():
    templates = [template for _, group in TEMPLATES.values() for template in group]
    assert len(templates) == len(set(templates)) >= 40
    known = dict.fromkeys((*FIELDS, "title", "other", "lead"), "x")
    for template in [*templates, *FOLLOW_UPS]:
        assert "{" not in template.format(**known)
    assert sum(weight for weight, _ in TEMPLATES.values()) + sum(GENERATED.values()) == pytest.approx(1)


def test_prompt_depends_on_seed_and_index_alone():
    first, again = PromptSource(ARTICLES, seed=0), PromptSource(ARTICLES, seed=0)
    forwards = [first[index] for index in range(50)]
    assert [again[index] for index in reversed(range(50))] == forwards[::-1]
    assert first[5000] == again[5000]  # several times through the articles
    other = PromptSource(ARTICLES, seed=1)
    assert sum(other[index] == forwards[index] for index in range(50)) < 5


def test_every_category_has_its_share():
    source = PromptSource(ARTICLES, seed=0)
    found = Counter(source[index].category for index in range(3000))
    shares = {name: weight for name, (weight, _) in TEMPLATES.items()} | GENERATED
    assert found.keys() == shares.keys()
    for name, weight in shares.items():
        assert found[name] / 3000 == pytest.approx(weight, abs=4 * (weight / 3000) ** 0.5)


def test_prompts_are_mostly_different():
    source = PromptSource(ARTICLES, seed=0)
    assert len({source[index].hash for index in range(2000)}) > 1900


def test_splits_share_no_article():
    heldout = {article.title for article in ARTICLES if split_of(article.title) == "heldout"}
    assert 0 < len(heldout) < len(ARTICLES) / 10
    texts = {
        split: " ".join(
            m["content"] for i in range(2000) for m in PromptSource(ARTICLES, seed=0, split=split)[i].messages
        )
        for split in ("train",)
    }
    assert not any(title in texts["train"] for title in heldout)
    source = PromptSource(ARTICLES, seed=0, split="heldout")
    text = " ".join(message["content"] for index in range(300) for message in source[index].messages)
    assert any(title in text for title in heldout)
    assert not any(article.title in text for article in ARTICLES if article.title not in heldout)


def test_excluded_prompts_are_replaced():
    plain = PromptSource(ARTICLES, seed=0)
    banned = frozenset(
        prompt_hash(message["content"]) for index in range(0, 40, 2) for message in plain[index].messages
    )
    source = PromptSource(ARTICLES, seed=0, excluded=banned)
    for index in range(40):
        assert not any(prompt_hash(message["content"]) in banned for message in source[index].messages)
    assert source[1] == plain[1]


def test_follow_ups_end_with_the_user():
    source = PromptSource(ARTICLES, seed=0)
    prompts = [source[index] for index in range(400)]
    turns = {len(prompt.messages) for prompt in prompts}
    assert turns == {1, 3}
    for prompt in prompts:
        roles = [message["role"] for message in prompt.messages]
        assert roles == ["user", "assistant", "user"][-len(roles) :]
        assert all(message["content"].strip() for message in prompt.messages)


def test_examples_of_functions_are_valid_python():
    for seed in range(300):
        prompt = code_tasks.code_completion(random.Random(seed))
        code = prompt[prompt.index("def ") :]
        stub = code[: code.rindex('"""') + 3] + "\n    return None\n"
        compile(stub, "<stub>", "exec")
        assert ">>> " in stub


def test_generated_tasks_are_varied():
    for make in (word_problems.word_problem, code_tasks.code_completion, code_tasks.code_request):
        assert len({make(random.Random(seed)) for seed in range(500)}) > 400


def test_shorten_never_returns_nothing():
    assert shorten("A" * 10 + " " + "B" * 600, 50) == "A" * 10
    assert shorten("Short.") == "Short."


def test_articles_are_read_and_tidied(tmp_path):
    path = tmp_path / "leads.json"
    path.write_text(json.dumps({"A": {"title": "A", "extract": "A\xa0is\nshort ."}}), encoding="utf-8")
    assert read_articles(path) == [Article("A", "A is short.")]
    for text in ("[]", "{", '{"A": {}}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(EnvironmentProblemError, match=r"leads\.json"):
            read_articles(path)


def test_no_articles_of_a_split_is_an_error():
    with pytest.raises(ValueError, match="heldout"):
        PromptSource([a for a in ARTICLES if split_of(a.title) == "train"], seed=0, split="heldout")
