"""What the model is taught with: scenes as tensors, and conversations about them packed around one copy of a picture.

Shape legend: B scenes, T tokens of a packed sequence, A answer tokens in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vsdbench.pictures.patches import GRID, WORDS, patch_cells, patch_words
from vsdbench.pictures.scenes import COLUMNS, ROWS, Category, Scene

_PLACE = 0.4  # share of a place's words in the words of the shape that stands there
_WORD_INDEX = {word: index for index, word in enumerate(WORDS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One question and its answer inside a packed sequence.

    Attributes:
        scene: Which of the batch's scenes it is about.
        category: Of the question.
        first: Where its answer begins among the A answer tokens.
        last: One past its end.
    """

    scene: int
    category: Category
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """B scenes with all their questions, each scene one sequence: the picture once, then every question beside it.

    A question sees the picture and itself alone and its positions begin right behind the picture, so that the logits
    are those of a conversation with this one question.

    Attributes:
        pixels: ``[B, 3, 144, 144]`` floats in [-1, 1], as the processor makes them.
        ids: ``[B, T]`` tokens.
        positions: ``[B, T]``.
        visible: ``[B, 1, T, T]`` bool.
        predicts: ``[A]`` indices into the flattened ``[B * T]`` rows: the ones whose next token is part of an answer.
        answers: ``[A]`` those tokens.
        branches: The questions.
    """

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    visible: Tensor
    predicts: Tensor
    answers: Tensor
    branches: tuple[Branch, ...]


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """Return ``[B, 3, 144, 144]`` floats in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([scene.pixels() for scene in scenes]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def word_labels(scenes: Sequence[Scene]) -> Tensor:
    """Return ``[B, 81]`` indices into ``WORDS``: what every patch shows."""
    return torch.tensor([[_WORD_INDEX[word] for word in patch_words(scene.facts)] for scene in scenes])


def word_targets(scenes: Sequence[Scene], words: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the language model should read in every patch: which word, and what the patch adds to it.

    The words of a shape carry a share of the words for its place, so that each can be found by where it is.

    Args:
        scenes: B of them.
        words: ``[W, H]`` the language model's own embeddings of ``WORDS``.

    Returns:
        ``[B, 81]`` indices into ``WORDS``, and ``[B, 81, H]`` additions.
    """
    labels = word_labels(scenes)
    added = words.new_zeros(*labels.shape, words.shape[-1])
    for index, scene in enumerate(scenes):
        for patch, row, column in patch_cells(scene.facts):
            added[index, patch] = _PLACE * (words[_WORD_INDEX[ROWS[row]]] + words[_WORD_INDEX[COLUMNS[column]]])
    return labels, added


def word_tokens(tokenizer: Any) -> list[int]:  # noqa: ANN401 - a transformers tokenizer
    """Return the token of every word in ``WORDS``, as it stands inside a sentence.

    Raises:
        ValueError: A word is more than one token of this tokenizer.
    """
    encoded = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    if long := [word for word, ids in zip(WORDS, encoded, strict=True) if len(ids) != 1]:
        raise ValueError(f"the tokenizer splits {', '.join(long)}; the tower is taught with words of one token.")
    return [ids[0] for ids in encoded]


def make_lesson(scenes: Sequence[Scene], tokenizer: Any, image_token: int) -> Lesson:  # noqa: ANN401 - as above
    """Return scenes with all their questions, packed.

    Args:
        scenes: B of them.
        tokenizer: The processor's.
        image_token: The picture's placeholder, 81 of which stand for one picture.
    """
    prefix = [*_encode(tokenizer, "<|im_start|>user\n"), *[image_token] * GRID**2]
    packed = [_pack(scene, len(prefix), tokenizer) for scene in scenes]
    longest = len(prefix) + max(len(ids) for ids, *_ in packed)
    ids = torch.full((len(scenes), longest), prefix[0])
    positions = torch.zeros(len(scenes), longest, dtype=torch.int64)
    visible = torch.eye(longest, dtype=torch.bool).repeat(len(scenes), 1, 1, 1)  # padding sees itself, never nothing
    ids[:, : len(prefix)] = torch.tensor(prefix)
    positions[:, : len(prefix)] = torch.arange(len(prefix))
    visible[:, :, : len(prefix), : len(prefix)] = torch.ones(len(prefix), len(prefix), dtype=torch.bool).tril()
    predicts, branches = list[int](), list[Branch]()
    for index, (tail, starts, answers, categories) in enumerate(packed):
        ids[index, len(prefix) : len(prefix) + len(tail)] = torch.tensor(tail)
        ends = [*starts[1:], len(prefix) + len(tail)]
        for start, end, answer, category in zip(starts, ends, answers, categories, strict=True):
            positions[index, start:end] = torch.arange(len(prefix), len(prefix) + end - start)
            visible[index, 0, start:end, : len(prefix)] = True
            visible[index, 0, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            branches.append(
                Branch(scene=index, category=category, first=len(predicts), last=len(predicts) + end - answer)
            )
            predicts += range(index * longest + answer - 1, index * longest + end - 1)
    rows = torch.tensor(predicts)
    return Lesson(
        pixels=pixel_values(scenes),
        ids=ids,
        positions=positions,
        visible=visible,
        predicts=rows,
        answers=ids.flatten()[rows + 1],
        branches=tuple(branches),
    )


def _pack(scene: Scene, offset: int, tokenizer: Any) -> tuple[list[int], list[int], list[int], list[Category]]:  # noqa: ANN401
    """Return a scene's questions and answers as tokens, where each question and answer begins, and the categories."""
    tail, starts, answers, categories = list[int](), list[int](), list[int](), list[Category]()
    for category, question, answer in scene.questions():
        starts.append(offset + len(tail))
        tail += _encode(tokenizer, f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
        answers.append(offset + len(tail))
        tail += _encode(tokenizer, f"{answer}<|im_end|>")
        categories.append(category)
    return tail, starts, answers, categories


def _encode(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401 - as above
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
