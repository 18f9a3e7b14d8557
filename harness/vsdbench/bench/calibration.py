"""The prompts on which automatic trees are chosen: never those of the suite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vsdbench.bench.auto_tree import ANSWER_TOKENS
from vsdbench.bench.conversation import encode_turn
from vsdbench.suites.prompts import make_prompt, stratified

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.prompts import Prompt

NUM_PROMPTS = 16

PROMPTS = (
    "My landlord has not repaired the heating for three weeks. Draft a firm but polite letter that names a deadline.",
    "Write the opening paragraph of a mystery novel set on a night train, in the voice of a tired ticket inspector.",
    "You are a medieval blacksmith. A customer asks why your swords cost so much. Answer in character.",
    "Pretend to be a sports commentator and describe somebody who tries to assemble a bookshelf.",
    "Anna is older than Ben, and Carl is younger than Ben but older than Dora. Who is the second oldest, and why?",
    "I left a sealed bottle of water in the freezer overnight and it cracked. Explain what happened, step by step.",
    "A shop lowers a price of 80 euros by 15 percent and then raises it by 10 percent. What is the price now?",
    "How many different ways are there to seat four people on a bench if two of them insist on sitting together?",
    "Write a Python function that merges two sorted lists without using sort, and explain its running time.",
    "What does this regular expression match, and where could it fail: ^[a-z0-9._]+@[a-z0-9]+\\.[a-z]{2,}$",
    "Read: 'Orders: Mia 3 tickets, Leo 5, Sam 2, Mia 1 more.' Give the total for each person as JSON.",
    "From the sentence 'Founded in 1987 in Turin, the firm moved to Lyon in 2004', list every year with its event.",
    "Compare how vaccines and antibiotics work, and say against which kinds of disease each of them helps.",
    "Why does a pendulum clock run slower in summer? Give the physical reason and a rough size of the effect.",
    "What were the main reasons for the decline of the Hanseatic League? Answer in a short essay.",
    "Discuss whether a city should make its public transport free. Give two arguments on each side.",
)
"""Where a suite uses all prompts that its sources have, these stand in for them."""


def calibration_prompts(suite: Suite, target: Target) -> list[Sequence[int]]:
    """Return the token ids of prompts to look at before a run: of the suite's sources if they have more, else our own.

    None where no tree is chosen. Each leaves room for an answer. Ours have no images, so a few that do go before them.
    """
    if not any(entry.tree.kind == "auto" for entry in suite.config.drafters):
        return []
    spare = _spare(suite)
    if len(spare) < NUM_PROMPTS and not any(prompt.images for prompt in spare):
        spare = [make_prompt(identifier=text, category="", turns=[text], source="own") for text in PROMPTS]
    encoded = [encode_turn(target, prompt, suite.config.generation) for prompt in spare]
    room = target.max_positions - ANSWER_TOKENS
    if fitting := [prompt for prompt in encoded if 0 < len(prompt) < room]:
        return fitting
    text = encode_turn(target, replace(spare[0], images=()), suite.config.generation)
    return [list(text)[: max(1, room - 1)]]


def _spare(suite: Suite) -> list[Prompt]:
    """Return prompts that the suite left out, at most ``NUM_PROMPTS``, of its categories in its own proportions."""
    seed, times = suite.config.seed, -(-NUM_PROMPTS // max(1, len(suite.prompts)))
    left: list[Prompt] = []
    for category, size in Counter(prompt.category for prompt in suite.prompts).items():
        left += stratified([prompt for prompt in suite.spare if prompt.category == category], times * size, seed)
    return stratified(left, NUM_PROMPTS, seed)
