"""Prompts are hashed by what they say, and slices keep every category's share."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsdbench.suites.prompts import Prompt, make_prompt, prompt_hash, prompts_sha256, stratified

CATEGORIES = st.lists(st.sampled_from("abcdef"), max_size=60)


def _prompts(categories: list[str]) -> list[Prompt]:
    return [
        make_prompt(identifier=str(index), category=category, turns=[f"prompt {index}"], source="s")
        for index, category in enumerate(categories)
    ]


@given(CATEGORIES, st.integers(0, 70), st.integers(0, 3))
def test_a_slice_has_the_right_size_and_the_original_order(categories: list[str], n: int, seed: int) -> None:
    prompts = _prompts(categories)
    kept = stratified(prompts, n, seed)
    assert len(kept) == min(n, len(prompts))
    assert [prompts.index(prompt) for prompt in kept] == sorted({prompts.index(prompt) for prompt in kept})


@given(CATEGORIES, st.integers(0, 70), st.integers(0, 3))
def test_every_category_is_there_and_near_its_share(categories: list[str], n: int, seed: int) -> None:
    prompts = _prompts(categories)
    kept = Counter(prompt.category for prompt in stratified(prompts, n, seed))
    sizes = Counter(categories)
    if n < len(sizes):
        assert set(kept.values()) <= {1}
        return
    assert set(kept) == set(sizes)
    exact = {category: n * size / len(prompts) for category, size in sizes.items()}
    forced = sum(1 - share for share in exact.values() if share < 1)  # given to small categories by the others
    for category, count in kept.items():
        assert count <= max(1, exact[category] + 1)
        assert count >= min(sizes[category], exact[category]) - forced - 1


@given(CATEGORIES, st.integers(0, 70), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_the_data(categories: list[str], n: int, random: object) -> None:
    prompts = _prompts(categories)
    shuffled = list(prompts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(stratified(prompts, n, 7)) == set(stratified(shuffled, n, 7))


def test_the_seed_chooses_and_decides_alone() -> None:
    prompts = _prompts(["a"] * 40)
    assert stratified(prompts, 5, 1) == stratified(prompts, 5, 1)
    assert stratified(prompts, 5, 1) != stratified(prompts, 5, 2)
    with pytest.raises(ValueError, match="cannot take -1 prompts"):
        stratified(prompts, -1, 0)


def test_proportions_by_hand() -> None:
    kept = Counter(prompt.category for prompt in stratified(_prompts(["a"] * 70 + ["b"] * 20 + ["c"] * 10), 10, 0))
    assert kept == {"a": 7, "b": 2, "c": 1}


def test_the_prompt_hash_sees_words_alone() -> None:
    assert prompt_hash("Say\n\tHELLO ") == prompt_hash("say hello")
    assert prompt_hash("STRASSE") == prompt_hash("straße")
    assert prompt_hash("say hello") != prompt_hash("say hallo")
    one = make_prompt(identifier="1", category="a", turns=["x", "y"], source="s")
    other = make_prompt(identifier="1", category="a", turns=["x y"], source="s")
    assert one.hash != other.hash
    assert one.id == "s/1"


def test_the_hash_of_prompts_sees_everything_that_is_run() -> None:
    def sha(source: str = "s", category: str = "a", turns: tuple[str, ...] = ("x", "y")) -> str:
        return prompts_sha256([make_prompt(identifier="1", category=category, turns=turns, source=source)])

    different = {
        sha(),
        sha(source="t"),
        sha(category="b"),
        sha(turns=("X", "y")),
        sha(turns=("xy",)),
        sha(turns=("x",)),
    }
    assert len(different) == 6
    assert sha() == sha()
    first, second = _prompts(["a", "a"])
    assert prompts_sha256([first, second]) != prompts_sha256([second, first])
