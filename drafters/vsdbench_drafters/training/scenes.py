"""Training prompts with images: questions about rendered scenes, with text questions between them where wanted.

Prompt ``i`` of a seed shows a scene of its own (``vsdbench.pictures.scenes``), so the index is the reference of the
image: the data keeps no pixels, and whoever needs them renders them again. Scenes of training, of validation and of
suites are never the same ones. Their numbers begin where no target was built from (``FIRST_SCENE``): a drafter learns
from what its target says about pictures that it has not seen.

``ShownSequences`` are the data with its images back in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from vsdbench.errors import ConfigError
from vsdbench.models.image_prompt import followed_by
from vsdbench.pictures.scenes import CATEGORIES, Scene
from vsdbench_drafters.training.prompts import Prompt, PromptSource, Split

if TYPE_CHECKING:
    from vsdbench_drafters.training.shards import SequenceList

SCENES_VERSION = 1
"""Raised whenever the same index gives another prompt."""
FIRST_SCENE = 1_000_000_000
"""Number of the first scene of seed 0; every seed has as many of its own."""


class SceneSource:
    """An endless list of prompts: ``source[i]`` depends on seed, split, ``text_share`` and ``i`` alone.

    Args:
        seed: Of the whole list.
        split: ``train`` or ``heldout``.
        text: Prompts without an image; None: nobody will ask for one.
        text_share: Share of the prompts that are from ``text``, the ones of the same index.
    """

    def __init__(self, *, seed: int, split: Split, text: PromptSource | None = None, text_share: float = 0.0) -> None:
        self._seed, self._split = seed, split
        self._text, self._text_share = text, text_share
        self._key = f"scenes/{seed}/{split}"

    def shows_image(self, index: int) -> bool:
        """Whether a prompt has an image."""
        return Random(f"{self._key}/{index}/kind").random() >= self._text_share

    def __getitem__(self, index: int) -> Prompt:
        if not self.shows_image(index):
            assert self._text is not None  # whoever asks for text prompts has given them
            return self._text[index]
        rng = Random(f"{self._key}/{index}")
        scene = Scene(FIRST_SCENE * (self._seed + 1) + index, self._split)
        category = rng.choice(CATEGORIES)  # as in suites, every kind has the same share, whatever is asked how often
        question = rng.choice([asked for kind, asked, _ in scene.questions() if kind == category])
        return Prompt([{"role": "user", "content": question, "images": [scene.image()]}], category)


@dataclass(frozen=True, slots=True)
class ShownSequence:
    """A training sequence whose prompt can be seen: ``shards.TokenSequence`` with its images back in place.

    Attributes:
        ids: ``[L]`` token ids, placeholders of images expanded.
        prompt_len: Where the response begins.
        encode: Makes the prompt anew, its image included; None: it has no image.
    """

    ids: NDArray[Any]
    prompt_len: int
    encode: Callable[[], Sequence[int]] | None

    def shown(self, length: int | None = None) -> Sequence[int]:
        """Return the sequence as the target takes it, images included; its first ``length`` tokens, prompt or more.

        Raises:
            ConfigError: The prompt is not what the target answered.
        """
        ids = [int(token) for token in self.ids[:length]]
        if self.encode is None:
            return ids
        prompt = self.encode()
        if list(prompt) != ids[: self.prompt_len]:
            raise ConfigError(
                "the training data's prompts have other tokens now than when the target answered them: its chat "
                "template or image processor has changed; delete the data in the cache to make it anew."
            )
        return followed_by(prompt, ids[self.prompt_len :])


class ShownSequences(Sequence[ShownSequence]):
    """Sequences of data with images.

    Args:
        sequences: The data.
        source: Of its prompts.
        encode: From messages to a prompt as the target takes it (``Target.encode_chat``).
    """

    def __init__(self, sequences: SequenceList, source: SceneSource, encode: Callable[[Any], Sequence[int]]) -> None:
        self._sequences = sequences
        self._source, self._encode = source, encode

    def __len__(self) -> int:
        return len(self._sequences)

    @overload
    def __getitem__(self, position: int) -> ShownSequence: ...
    @overload
    def __getitem__(self, position: slice) -> ShownSequences: ...
    def __getitem__(self, position: int | slice) -> ShownSequence | ShownSequences:
        if isinstance(position, slice):
            return ShownSequences(self._sequences[position], self._source, self._encode)
        sequence = self._sequences[position]
        index = sequence.index
        encode = (lambda: self._encode(self._source[index].messages)) if self._source.shows_image(index) else None
        return ShownSequence(sequence.ids, sequence.prompt_len, encode)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """``[n]`` tokens of each sequence, prompt included."""
        return self._sequences.lengths

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all sequences."""
        return self._sequences.num_response_tokens
