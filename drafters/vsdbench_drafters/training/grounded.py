"""Training prompts whose answers repeat a given text: summarise, extract, list, rewrite and answer from it.

They are of the same five kinds as the suite ``grounded``, in other words, in many layouts, and about other articles:
its own are never among them, not even for validation.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from vsdbench.suites.articles import part_of, whole_sentences
from vsdbench_drafters.training.prompts import Prompt, PromptSource, Split

GROUNDED_VERSION = 1
"""Raised whenever the same index gives another prompt."""
LEAD_CHARACTERS = (300, 500, 800, 800)
"""A lead is cut to whole sentences of at most one of these; the longest is some 200 tokens."""
NUMBERS = ("two", "three", "four")
"""What ``{n}`` is: leads have few sentences."""

# Category -> instructions; every category has the same share. {title} is the article, the rest is drawn from FIELDS.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "summarise": (
        "Summarise this text in {n} sentences.",
        "Shorten this text to about half its length.",
        "Give a brief summary of this text about {title}.",
        "What are the main statements of this text? Put them into one short paragraph.",
        "Repeat the key points of this text in {n} sentences.",
        "Tell me in a few words what this text says about {title}.",
        "Summarise what is said here, without adding anything.",
        "Condense this into the {n} most important sentences.",
        "What does this text want its reader to know? Sum it up.",
        "In short, what does this text say?",
        "Reduce this text to its essentials.",
        "Write a caption of one or two sentences that sums this text up.",
    ),
    "extract": (
        "Quote the sentence in which {title} is defined.",
        "Copy the first sentence of this text exactly as it stands.",
        "Copy the last two sentences of this text exactly as they stand.",
        "Quote the part of this text that is about {title}.",
        "Which sentences of this text have names in them? Quote them.",
        "Copy the sentences of this text that have a number or a year in them.",
        "Extract the {n} most informative sentences, word for word.",
        "Copy this text from its beginning to the end of its second sentence.",
        "Copy the {n} sentences of this text that a dictionary would take over.",
        "Pull the definition of {title} out of this text.",
        "Find the longest sentence and repeat it.",
        "Give me the opening of this text, unchanged.",
    ),
    "list": (
        "List {n} facts from this text.",
        "Turn this text into bullet points.",
        "Make a numbered list of everything that this text says about {title}.",
        "Write the information in this text as a list, one item a sentence.",
        "Number the facts of this text.",
        "Put the content of this text on a slide with {n} bullets.",
        "List what one learns about {title} here.",
        "Write notes on this text, as a list.",
        "Split this text into single facts and list them.",
        "List the sentences of this text as bullets, a little shorter.",
        "Make a list of the statements in this text, in their order.",
        "Write a fact sheet on {title} from this text.",
    ),
    "rewrite": (
        "Rewrite this text in a {tone} tone and keep its facts.",
        "Paraphrase this text, sentence by sentence.",
        "Edit this text lightly and return all of it.",
        "Repeat this text, with every mistake corrected.",
        "Say the same again in slightly different words.",
        "Rewrite this text for {audience}, and leave nothing out.",
        "Proofread this text and give me the corrected version.",
        "Reword this text so that it is easier to read.",
        "Write this text anew for another encyclopedia.",
        "Copy this text and make it a little clearer where that is possible.",
        "Write this text down again, with each sentence in a paragraph.",
        "Make this text a bit shorter, but keep its sentences where you can.",
    ),
    "answer": (
        "What is {title}? Use nothing but this text.",
        "Who or what is {title}, going by this text?",
        "Use the sentences of this text to say what {title} is.",
        "Explain with the help of this text what {title} is.",
        "Answer with what this text says: who or what is {title}?",
        "Which details about {title} are given? Answer in full sentences taken from the text.",
        "What makes {title} worth an article? Answer from this text.",
        "How does this text describe {title}?",
        "Answer with a quotation from this text: what is {title}?",
        "What does one learn here about {title}? Repeat it in full sentences.",
        "Tell {audience} what {title} is, and stay close to this text.",
        "Give the description of {title} that is in this text.",
    ),
}

LAYOUTS: tuple[str, ...] = (
    "{instruction}\n\n{lead}",
    "{instruction}\n\n{lead}",
    "{lead}\n\n{instruction}",
    "{lead}\n\n{instruction}",
    "{instruction}\n\nText: {lead}",
    "Text:\n{lead}\n\nTask: {instruction}",
    "{instruction}\n\n\"{lead}\"",
    "{title}\n\n{lead}\n\n{instruction}",
    "This is the opening of an article about {title}:\n\n{lead}\n\n{instruction}",
    "{instruction}\n\n{title}\n{lead}",
    "Context: {lead}\n\n{instruction}",
    "### Instruction\n{instruction}\n\n### Input\n{lead}",
    "Read this.\n\n{lead}\n\n{instruction}",
)  # fmt: skip


class GroundedSource(PromptSource):
    """Prompts that give a text and ask for something that is in it: ``train`` or ``heldout``, never the suite's."""

    version: ClassVar[int] = GROUNDED_VERSION
    _name: ClassVar[str] = "grounded/"

    @staticmethod
    def _belongs(title: str, split: Split) -> bool:
        return part_of(title) == split

    def _make(self, index: int, rng: Random) -> Prompt:
        article = self._article(index)
        category = rng.choice(list(INSTRUCTIONS))
        lead = whole_sentences(article.lead, rng.choice(LEAD_CHARACTERS))
        fields = {**self._fields(article, rng), "lead": lead, "n": rng.choice(NUMBERS)}
        instruction = rng.choice(INSTRUCTIONS[category]).format(**fields)
        text = rng.choice(LAYOUTS).format(**{**fields, "instruction": instruction})
        return Prompt([{"role": "user", "content": text}], category)
