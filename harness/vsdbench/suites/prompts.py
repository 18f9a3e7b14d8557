"""Prompts: what one is, how it is hashed, and how a few are picked so that every category keeps its share."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vsdbench.suites.images import ImageRef


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a suite.

    Attributes:
        id: Unique in its suite: ``source/identifier``.
        category: What results are grouped by.
        turns: The user's turns, at least one.
        source: Name of the source that it really came from.
        hash: 16 hexadecimal digits of the normalised turns and the images.
        images: What the first turn shows; they stand before its text.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    source: str
    hash: str
    images: tuple[ImageRef, ...] = ()


def make_prompt(
    *, identifier: str, category: str, turns: Sequence[str], source: str, images: Sequence[ImageRef] = ()
) -> Prompt:
    """Return a prompt with its id and its hash filled in."""
    bare = Prompt(id=f"{source}/{identifier}", category=category, turns=tuple(turns), source=source, hash="")
    return with_images(bare, images)


def with_images(prompt: Prompt, images: Sequence[ImageRef]) -> Prompt:
    """Return the prompt with these images, hashed anew."""
    text = "\x00".join([*map(_written, images), *prompt.turns])
    return replace(prompt, hash=prompt_hash(text), images=tuple(images))


def _written(image: ImageRef) -> str:
    return f"image {image.sha256}"


def prompt_hash(text: str) -> str:
    """Return 16 hexadecimal digits of sha256 of a text, whatever its case and its white space.

    >>> prompt_hash("Say  HELLO ") == prompt_hash("say hello")
    True
    """
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()[:16]


def prompts_sha256(prompts: Iterable[Prompt]) -> str:
    """Return sha256 of prompts: their ids, categories, exact turns and images' pixels, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        for part in (
            prompt.id,
            prompt.category,
            str(len(prompt.turns)),
            *prompt.turns,
            *map(_written, prompt.images),
        ):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def stratified(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """Return ``n`` prompts (all, if there are fewer), each category in proportion, in their original order.

    Every category gets at least one where ``n`` allows it; the rest goes by largest remainder. Which prompts of a
    category are taken depends on the seed and their hashes alone, so reordering the data does not change the choice.

    Args:
        prompts: All of them.
        n: How many to keep.
        seed: Chooses among the prompts of a category.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"cannot take {n} prompts; the number must be 0 or more.")
    if n >= len(prompts):
        return list(prompts)
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt.category, []).append(index)
    shares = _shares({category: len(indices) for category, indices in members.items()}, n)
    kept: list[int] = []
    for category, indices in members.items():
        order = sorted(indices, key=lambda index: (prompts[index].hash, prompts[index].id))
        random.Random(f"{seed}/{category}").shuffle(order)
        kept += order[: shares[category]]
    return [prompts[index] for index in sorted(kept)]


def _shares(sizes: dict[str, int], n: int) -> dict[str, int]:
    """Return how many to take of each category: one each while ``n`` allows, the rest in proportion to size.

    With fewer prompts than categories, the largest categories get one each.
    """
    by_size = sorted(sizes, key=lambda category: (-sizes[category], category))
    shares = {category: int(rank < n) for rank, category in enumerate(by_size)}
    total = sum(sizes.values())
    while sum(shares.values()) < n:
        behind = max(
            (category for category in by_size if shares[category] < sizes[category]),
            key=lambda category: n * sizes[category] / total - shares[category],
        )
        shares[behind] += 1
    return shares
