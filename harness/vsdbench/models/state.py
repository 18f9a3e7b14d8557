"""A sequence being decoded: its tokens, its cache, and what a drafter may know of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench.models.device import send_numbers
from vsdbench.models.kv_cache import PreallocatedCache

if TYPE_CHECKING:
    from vsdbench.decoding.sampling import KeyedNoise


class SequenceState:
    """A sequence being decoded by a ``Target`` (see ``interfaces.TargetState``)."""

    def __init__(self, prompt: Sequence[int], cache: PreallocatedCache) -> None:
        self.prompt = prompt
        self.tokens = list(prompt)
        self.cache = cache
        self.features = torch.empty(0)
        self.next_logits = torch.empty(0)
        self.embeddings: Tensor | None = None
        self.image_mask: Tensor | None = None
        self.noise: KeyedNoise | None = None
        self._newest = torch.empty(0, dtype=torch.int64)  # the last of the first ``_num_tokens`` tokens
        self._num_tokens = 0
        self.position_offset = 0
        """What the model adds to a row's number to get its position: not 0 where an image takes fewer positions."""

    def commit(self, path: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Keep the root and the accepted nodes of the last forward; append their tokens and the one that follows.

        Returns:
            ``[A + 1]`` int64, the rows that were kept; they and the tokens reach the device together.
        """
        rows = [0, *(node + 1 for node in path)]
        sent = send_numbers([*rows, *tokens], self.cache.device)
        kept, self._newest = sent[: len(rows)], sent[len(rows) :]
        self.cache.commit(rows, kept)
        self.tokens += tokens
        self._num_tokens = len(self.tokens)
        return kept

    def last_tokens(self, count: int) -> Tensor:
        """Return ``[count]`` int64, the last tokens on the target's device; those of the last commit are there."""
        if self._num_tokens != len(self.tokens) or count > len(self._newest):
            self._newest, self._num_tokens = send_numbers(self.tokens[-count:], self.cache.device), len(self.tokens)
        return self._newest[-count:]
