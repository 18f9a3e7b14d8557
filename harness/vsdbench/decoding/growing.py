"""What grows a tree and what scores its levels: drafters and shapes meet here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from vsdbench.decoding.interfaces import TokenTree


class LevelScorer(Protocol):
    """What a drafter must be able to compute while a tree grows.

    Every token passed to ``level`` takes the next *slot* (0, 1, 2, … in the order of arrival over the whole growth);
    a parent slot of -1 is the root. Vd is the drafter's own vocabulary.
    """

    vocab_size: int
    """V, the target's vocabulary."""

    def root(self) -> Tensor:
        """Return ``[Vd]`` float32 log-probabilities of the root's children."""

    def level(self, tokens: Tensor, parent_slots: Tensor, depth: int) -> Tensor:
        """Return ``[M, Vd]`` float32 log-probabilities of the children of M nodes.

        Args:
            tokens: ``[M]`` int64 target ids of the nodes.
            parent_slots: ``[M]`` int64, the slots of their parents, on the drafter's device: reading them there would
                make the host wait (``structure.Ancestry`` makes masks of them).
            depth: Depth of these nodes (1 for the root's children).
        """

    def to_target(self, ids: Tensor) -> Tensor:
        """Map draft-vocabulary ids to target ids, any shape."""


class Level(NamedTuple):
    """What ``LevelScorer.level`` is asked for, as one value."""

    tokens: Tensor
    parent_slots: Tensor
    depth: int


Growing: TypeAlias = "Generator[Level, Tensor, TokenTree]"
"""A tree that grows: yields the level to be scored next, is sent ``[M, Vd]`` log-probabilities, returns the tree."""


def grow_together(growths: Sequence[Growing], score: Callable[[dict[int, Level]], Sequence[Tensor]]) -> list[TokenTree]:
    """Return the trees of several growths, which go on level by level in step.

    Args:
        growths: One a tree.
        score: Scores the levels of those that still grow, by their index, in order.
    """
    trees: dict[int, TokenTree] = {}
    levels: dict[int, Level] = {}

    def advance(index: int, scored: Tensor | None) -> None:
        try:
            levels[index] = growths[index].send(scored)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as grown:
            trees[index] = grown.value

    for index in range(len(growths)):
        advance(index, None)
    while levels:
        asked, scored = list(levels), score(levels)
        levels = {}
        for index, log_probs in zip(asked, scored, strict=True):
            advance(index, log_probs)
    return [trees[index] for index in range(len(growths))]
