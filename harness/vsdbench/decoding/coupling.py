"""Drafting with the numbers by which the target will draw (Gumbel coupling, arXiv 2408.07978).

Under the rule ``coupled`` the target's next token is the argmax of ``log p + g``, where p is its distribution and g is
Gumbel noise that depends on the seed and the position alone. A drafter that only has q guesses the argmax of log q, and
is right with probability p(argmax q): what the noise will make of p it does not know. But nothing hides g from it. The
argmax of ``log q + g`` is a better guess where q is near p. What is emitted does not change, since verification never
looks at how a tree was made: the draws are the target's own, with the numbers that plain decoding has there.

A drafter's doubt is of two kinds. Where p itself is spread out, the noise decides, and a drafter that knows p should
follow it. Where p has one favourite and the drafter does not know which, the noise says nothing. So the noise counts
for less than the target gives it: token v is expected with probability ``softmax(log q + w g)[v]``, w = 0.7 for
drafters of one layer (``docs/log.md``; w = 1 is right for q = p, w = 0 for a target that is always sure). By these
log-probabilities a tree of kind ``coupled`` is grown.

Shape legend: V target vocabulary, Vd the drafter's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vsdbench.models import native
from vsdbench.models.device import apart

if TYPE_CHECKING:
    from torch import Tensor

    from vsdbench.decoding.growing import Growing
    from vsdbench.decoding.sampling import KeyedNoise

NOISE_WEIGHT = 0.7
"""What the noise counts for when a drafter guesses: w above."""


class Foresight:
    """What a drafter makes of its log-probabilities when it knows the noise of the tokens to come.

    Args:
        noise: That of the sequence's draws.
        position: Index, in the sequence, of the token that follows the root.
        ids: ``[Vd]`` int64, the target's ids of the drafter's vocabulary.
        vocab_size: V.
        temperature: Of decoding, above 0.
    """

    def __init__(self, noise: KeyedNoise, position: int, ids: Tensor, vocab_size: int, temperature: float) -> None:
        self._noise, self._position, self._ids = noise, position, ids
        self._vocab_size, self._temperature = vocab_size, temperature

    def informed(self, log_probs: Tensor, depth: int) -> Tensor:
        """Return the log-probabilities that each child of nodes at ``depth`` (0: the root) will be what is drawn.

        Args:
            log_probs: ``[..., Vd]`` float32, the drafter's own.
            depth: The same for all of them.
        """
        position = self._position + depth
        if not apart(self._ids.device):
            numbers = self._noise.uniforms(position, self._vocab_size).high
            known = native.informed(log_probs, numbers, self._ids, self._temperature, NOISE_WEIGHT)
            if known is not None:
                return known
        noise = self._noise.at(position, self._vocab_size, self._ids)
        return torch.log_softmax(log_probs / self._temperature + NOISE_WEIGHT * noise, dim=-1)

    def growth(self, growing: Growing) -> Growing:
        """Return a growth that is sent log-probabilities as they are, and grows by informed ones."""
        scored: Tensor | None = None
        while True:
            try:
                level = growing.send(scored)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as grown:
                return grown.value  # type: ignore[no-any-return]
            scored = self.informed((yield level), level.depth)
