"""A sequence being decoded: its tokens, its cache, and what a drafter may know of its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsdbench.models.kv_cache import PreallocatedCache


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
        self.position_offset = 0
        """What the model adds to a row's number to get its position: not 0 where an image takes fewer positions."""

    def commit(self, path: Sequence[int], tokens: Sequence[int]) -> None:
        """Keep the root and the accepted nodes of the last forward; append their tokens and the one that follows."""
        self.cache.commit([0, *(node + 1 for node in path)])
        self.tokens += tokens
