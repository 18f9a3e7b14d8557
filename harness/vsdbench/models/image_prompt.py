"""Prompts with images: token ids like any other prompt's, and beside them what the model's own code reads as images.

Everything that takes a prompt takes a sequence of token ids. An ``ImagePrompt`` is one, with the placeholders of its
images expanded, so lengths and positions are right wherever they are counted; only the target reads the rest. What is
built from a prompt goes through ``followed_by``, because ``[*prompt, *tokens]`` would leave the images behind.

Shape legend: L tokens of the prompt, R of them read together with the images; the L - R others follow as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

PER_TOKEN_INPUTS = frozenset({"mm_token_type_ids", "token_type_ids"})
"""Inputs of ``[1, R]``, one number a token, 0 for text."""


@dataclass(frozen=True, slots=True, eq=False)
class ImagePrompt(Sequence[int]):
    """The token ids of a prompt with images. It cannot be cut: a part of it has other images.

    Attributes:
        tokens: The L token ids, placeholders expanded as the model's processor gives them.
        model_inputs: What the model's own forward takes beside the first R ids: pixel values, grids, sizes; on the CPU.
        image_mask: ``[L]`` bool, where an image stands.
        num_read: R.
    """

    tokens: tuple[int, ...]
    model_inputs: Mapping[str, Tensor]
    image_mask: Tensor
    num_read: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self.tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            msg = "a part of a prompt with images would lose them: take list(prompt) to cut the token ids alone"
            raise TypeError(msg)
        return self.tokens[index]

    @property
    def num_image_tokens(self) -> int:
        """Positions that images take."""
        return int(self.image_mask.sum())

    def followed_by(self, tokens: Sequence[int]) -> ImagePrompt:
        """Return the prompt with more tokens behind: text, even where an id is a placeholder's."""
        behind = torch.zeros(len(tokens), dtype=torch.bool)
        return replace(self, tokens=(*self.tokens, *tokens), image_mask=torch.cat([self.image_mask, behind]))

    def inputs_for(self, count: int) -> dict[str, Tensor]:
        """Return the model's inputs for the first ``count`` tokens, at least R; those of one number a token padded."""
        inputs = dict(self.model_inputs)
        for name in PER_TOKEN_INPUTS & inputs.keys():
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, count - self.num_read))
        return inputs


def followed_by(prompt: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
    """Return a prompt with more tokens behind; its images, if it has any, stay with it.

    >>> followed_by([1, 2], [3])
    [1, 2, 3]
    """
    if isinstance(prompt, ImagePrompt):
        return prompt.followed_by(tokens)
    return [*prompt, *tokens]


def num_image_tokens(prompt: Sequence[int]) -> int:
    """Return how many positions of a prompt images take: 0 for text.

    >>> num_image_tokens([1, 2])
    0
    """
    return prompt.num_image_tokens if isinstance(prompt, ImagePrompt) else 0
