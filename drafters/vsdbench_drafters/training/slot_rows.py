"""What the host knows of the answers that are decoded side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vsdbench_drafters.training.answers import Request, ends_in_loop

_LOOP_CHECK_EVERY = 16


class Rows:
    """Every slot: row ``i`` of each array is the slot that lies in cache row ``i``."""

    def __init__(self, slots: int, max_new_tokens: int) -> None:
        self.slot = np.arange(slots)  # what stays with a row wherever it moves
        self.requests: NDArray[np.object_] = np.full(slots, None, dtype=object)
        self.active = np.zeros(slots, dtype=bool)
        self.stop: NDArray[np.object_] = np.full(slots, None, dtype=object)  # why an answer has ended (StopReason)
        self.fresh = np.zeros(slots, dtype=bool)  # prompts not yet prefilled
        self.length = np.zeros(slots, dtype=np.int64)  # columns of the cache that are filled
        self.offset = np.zeros(slots, dtype=np.int64)  # of the position of the next token from that number
        self.count = np.zeros(slots, dtype=np.int64)  # response tokens so far
        self.token = np.zeros(slots, dtype=np.int64)  # fed in the next step
        self.temperature = np.zeros(slots, dtype=np.float32)
        self.output = np.zeros((slots, max_new_tokens), dtype=np.int32)
        self.noise = np.zeros((slots, max_new_tokens), dtype=np.float64)

    def permute(self, order: NDArray[np.int64]) -> None:
        """Move row ``order[i]`` to row ``i``."""
        for name, array in vars(self).items():
            setattr(self, name, array[order])

    def seat(self, row: np.int64, request: Request, seed: int) -> None:
        """Begin an answer in a free row; ``seed`` keys its noise."""
        self.requests[row] = request
        self.active[row] = self.fresh[row] = True
        self.length[row] = len(request.prompt_ids) - 1
        self.count[row] = self.offset[row] = 0
        self.token[row] = request.prompt_ids[-1]
        self.temperature[row] = request.temperature
        if request.temperature > 0:
            key = np.array([seed, request.index], dtype=np.uint64)
            self.noise[row] = np.random.Generator(np.random.Philox(key=key)).random(self.noise.shape[1])

    def book(self, token: NDArray[np.int64], *, eos: NDArray[np.int64], loop_repeats: int) -> None:
        """Note what was drawn behind the token that the first rows were fed, and which answers end with it.

        Args:
            token: ``[n]``, of no meaning for a row that is free or whose answer had ended.
            eos: Tokens that end an answer.
            loop_repeats: As of ``SlotGenerator``.
        """
        fed = np.flatnonzero(self.active[: len(token)])
        self.length[fed] += 1
        live = np.array([row for row in fed if self.stop[row] is None], dtype=np.int64)
        self.output[live, self.count[live]] = self.token[live] = token[live]
        self.count[live] += 1
        self.stop[live[self.count[live] >= self.output.shape[1]]] = "length"
        for row in live[self.count[live] % _LOOP_CHECK_EVERY == 0] if loop_repeats else ():
            if ends_in_loop(self.output[row, : self.count[row]], loop_repeats):
                self.stop[row] = "loop"
        self.stop[live[np.isin(token[live], eos)]] = "eos"

    def free(self, row: np.int64) -> None:
        """Let the next answer have a row."""
        self.active[row], self.stop[row] = False, None
        self.length[row] = self.temperature[row] = self.count[row] = 0
