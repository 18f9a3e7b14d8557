"""The negative control of drafters that see: their prompt shows another prompt's pictures (``images: shuffled``).

If a drafter makes use of the picture, its tau falls when it is shown another one. The target sees the true one all the
time, so answers stay what they are. What is exchanged is all that the drafter's prefill gets of the prompt: the
target's features at every token of it and the embeddings at the pictures' tokens are those of the same conversation
with the other pictures, read by the target beside the clock. What is not: the token ids, the first token of the answer,
and the target's features of what is generated, from which every later step drafts and which know the true picture. So
a fall says that the drafter uses what it reads of the picture; it is not what the picture is worth, for a wrong one may
mislead more than none, and later steps still hear of the true one. This is so for every architecture: EAGLE's, Medusa
and ``draft_model`` (which reads the other pictures itself) like those made for pictures. A drafter that looks at token
ids alone (``ngram``) drafts the same as ever.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vsdbench.errors import ConfigError
from vsdbench.suites.images import ImageRef, reference
from vsdbench.suites.prompts import Prompt, with_images

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from vsdbench.decoding.interfaces import Drafter, TargetState, TokenTree, TreeShape
    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite


def exchanged_prompts(suite: Suite) -> dict[str, Prompt]:
    """Return by id every prompt that has pictures, with those of another one.

    All prompts with the same pictures get the same others, none of which is one of theirs, and as many. A picture of
    another size is scaled to the size of the one it stands for, so that it takes as many tokens. The suite's seed
    decides.

    Raises:
        ConfigError: There are no pictures, or not enough different ones.
    """
    seeing = [prompt for prompt in suite.prompts if prompt.images]
    if not seeing:
        raise ConfigError("'images: shuffled' is for prompts with pictures, and this suite has none: leave it out.")
    by_count: dict[int, dict[tuple[str, ...], tuple[ImageRef, ...]]] = {}
    for prompt in seeing:
        by_count.setdefault(len(prompt.images), {})[_pixels(prompt.images)] = prompt.images
    others: dict[tuple[str, ...], tuple[ImageRef, ...]] = {}
    for sets in by_count.values():
        others |= _deranged(sets, suite.config.seed)
    return {prompt.id: with_images(prompt, _fitted(others[_pixels(prompt.images)], prompt.images)) for prompt in seeing}


def _pixels(images: Sequence[ImageRef]) -> tuple[str, ...]:
    return tuple(image.sha256 for image in images)


def _deranged(
    sets: Mapping[tuple[str, ...], tuple[ImageRef, ...]], seed: int
) -> dict[tuple[str, ...], tuple[ImageRef, ...]]:
    """Return for each set of pictures another one that shares none with it: sets in a random order, shifted.

    Raises:
        ConfigError: There is no such shift.
    """
    order = sorted(sets)
    random.Random(f"{seed}/images").shuffle(order)
    for shift in range(1, len(order)):
        pairs = list(zip(order, [*order[shift:], *order[:shift]], strict=True))
        if all(set(own).isdisjoint(other) for own, other in pairs):
            return {own: sets[other] for own, other in pairs}
    count = len(order[0])
    raise ConfigError(
        f"'images: shuffled' needs prompts with other pictures to take them from, but those with {count} "
        f"picture{'s' if count > 1 else ''} show too few different ones: take more prompts."
    )


def _fitted(images: Sequence[ImageRef], places: Sequence[ImageRef]) -> list[ImageRef]:
    """Return pictures in the sizes of those whose places they take."""
    fitted: list[ImageRef] = []
    for image, place in zip(images, places, strict=True):
        size = place.open().size
        fits = image.open().size == size
        fitted.append(image if fits else reference(partial(_scaled, image, size), f"{image.name}, scaled"))
    return fitted


def _scaled(image: ImageRef, size: tuple[int, int]) -> Image.Image:
    return image.open().resize(size)


class Misled:
    """A drafter that is shown other pictures than the target (protocol ``Drafter``).

    Args:
        target: What reads the prompt with the other pictures.
        drafter: The drafter.
    """

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name = drafter.name
        self.max_depth: int | None = getattr(drafter, "max_depth", None)
        self._target = target
        self._other: TargetState | None = None

    def show(self, prompt: Sequence[int]) -> None:
        """Take what the next sequence's prompt shall look like: the same tokens, other pictures."""
        self._other = self._target.prefill(prompt, len(prompt) + 1)

    def begin(self, state: TargetState, max_length: int) -> None:
        """Begin with the other prompt's features and embeddings, or as ever where nothing was shown.

        Raises:
            ConfigError: The other pictures take other tokens.
        """
        other, self._other = self._other, None
        if other is not None and list(other.prompt) != list(state.prompt):
            raise ConfigError(
                f"The prompt has {len(state.prompt)} tokens with its own pictures and {len(other.prompt)} with the "
                "others: 'images: shuffled' needs a target that gives pictures of one size the same tokens."
            )
        self.drafter.begin(state if other is None else _Seen(state, other), max_length)

    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Propose as the drafter does."""
        return self.drafter.propose(state, shape, temperature=temperature, generator=generator)

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Learn what the target kept, and its features of it."""
        self.drafter.commit(state, num_accepted, features)


class _Seen:
    """A sequence whose prompt is seen as another one (protocol ``TargetState``)."""

    def __init__(self, state: TargetState, other: TargetState) -> None:
        self.tokens, self.noise = state.tokens, state.noise
        self.prompt = other.prompt
        self.features = other.features
        self.next_logits = other.next_logits
        self.embeddings = other.embeddings
        self.image_mask = other.image_mask
        self._state = state

    def commit(self, path: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Commit in the sequence itself."""
        return self._state.commit(path, tokens)

    def last_tokens(self, count: int) -> Tensor:
        """Return those of the sequence itself."""
        return self._state.last_tokens(count)
