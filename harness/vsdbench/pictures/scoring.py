"""How well a model sees: its answers about held-out scenes, with the picture and, as controls, without it.

An answer counts if greedy decoding gives it word for word. That is found without decoding: it is so exactly when every
token of the right answer is the model's first choice after the ones before it. A caption is also decoded, and counts
by its sentences, each of which states one fact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vsdbench.pictures.lessons import Lesson, make_lesson, pixel_values
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench.pictures.settings import VIEWS, View
from vsdbench.pictures.training import answer_logits

CAPTION_FACTS = "caption facts"
DESCRIBE = "Describe the picture."

_BATCH = 4
_MAX_CAPTION_TOKENS = 128


def show(pixels: Tensor, view: View) -> Tensor:
    """Return the pictures ``[B, 3, 144, 144]`` that a view shows in the place of those of B scenes."""
    match view:
        case "picture":
            return pixels
        case "blank":
            return torch.zeros_like(pixels)
        case "other":
            return pixels.roll(1, dims=0)


@torch.inference_mode()
def examine(
    model: LlavaForConditionalGeneration,
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    scenes: Sequence[Scene],
    *,
    report: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Return accuracies in [0, 1] by category, then by view; and the number of answers as ``num``.

    Args:
        model: In any dtype, in evaluation mode.
        tokenizer: The processor's.
        scenes: Held-out ones; at least two, so that there is another picture.
        report: Told how many batches are done.
    """
    scores: dict[str, dict[str, float]] = {}
    pixels = pixel_values(scenes)
    image_token, batches = model.config.image_token_id, 0
    for view in VIEWS:
        shown = show(pixels, view)
        right: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
        for start in range(0, len(scenes), _BATCH):
            lesson = make_lesson(scenes[start : start + _BATCH], tokenizer, image_token)
            for category, correct in exact(model, replace(lesson, pixels=shown[start : start + _BATCH])):
                right[category].append(correct)
            report(batches := batches + 1)
        for category, found in right.items():
            scores.setdefault(category, {"num": len(found)})[view] = sum(found) / len(found)
        said = captions(model, tokenizer, shown)
        report(batches := batches + 1)
        facts = [agreement(text, scene.caption()) for text, scene in zip(said, scenes, strict=True)]
        scores.setdefault(CAPTION_FACTS, {"num": len(facts)})[view] = sum(facts) / len(facts)
    return scores


def num_reports(num_scenes: int) -> int:
    """Return how many batches ``examine`` reports."""
    return len(VIEWS) * (-(-num_scenes // _BATCH) + 1)


def exact(model: LlavaForConditionalGeneration, lesson: Lesson) -> list[tuple[str, bool]]:
    """Return the category of every question, and whether greedy decoding answers it word for word."""
    correct = answer_logits(model, lesson).argmax(dim=-1) == lesson.answers
    return [(branch.category, bool(correct[branch.first : branch.last].all())) for branch in lesson.branches]


def captions(model: LlavaForConditionalGeneration, tokenizer: Any, pixels: Tensor) -> list[str]:  # noqa: ANN401
    """Return greedily decoded descriptions of B pictures ``[B, 3, 144, 144]``."""
    slots = model.config.image_seq_length
    prompt = [
        *tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"],
        *[model.config.image_token_id] * slots,
        *tokenizer(f"\n{DESCRIBE}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"],
    ]
    ids = torch.tensor(prompt, device=model.device).repeat(len(pixels), 1)
    decoded = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels.to(model.device, model.dtype),
        do_sample=False,
        max_new_tokens=_MAX_CAPTION_TOKENS,
    )
    texts: list[str] = tokenizer.batch_decode(decoded[:, len(prompt) :], skip_special_tokens=True)
    return texts


def agreement(said: str, right: str) -> float:
    """Return how far two captions state the same facts: the F1 of their sentences.

    >>> agreement("At the top left is a red star. There is more.", "At the top left is a red star.")
    0.6666666666666666
    """
    ours, theirs = _sentences(said), _sentences(right)
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0


def _sentences(text: str) -> set[str]:
    return {sentence.strip(" .") for sentence in text.split(". ") if sentence.strip(" .")}
