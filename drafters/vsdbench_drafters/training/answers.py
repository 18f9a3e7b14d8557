"""What slot-wise decoding is asked and answers, and when an answer has begun to repeat itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vsdbench_drafters.training.features import Features
    from vsdbench_drafters.training.prompts import Message

StopReason = Literal["eos", "length", "loop"]

_LOOP_MAX_PERIOD = 48
_LOOP_MIN_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered.

    Attributes:
        index: The caller's number for it; with the seed it keys the sampling noise.
        prompt_ids: The rendered prompt, the shared prefix included.
        temperature: 0 for greedy.
    """

    index: int
    prompt_ids: Sequence[int]
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer.

    Attributes:
        request: What was asked.
        response_ids: ``[n]`` int32; ends with the EOS token where ``stop_reason`` is ``eos``.
        stop_reason: Why it ends.
        features: Those of prompt and answer, where they were kept.
    """

    request: Request
    response_ids: NDArray[np.int32]
    stop_reason: StopReason
    features: Features | None = None


class Tally:
    """Distinct answers so far, their tokens, and how many are under way."""

    def __init__(self) -> None:
        self.answers = self.tokens = self.in_flight = 0

    def mean(self, longest: int) -> float:
        """Return the expected length of an answer: what they were so far, beside 64 of three fifths of the longest."""
        return (self.tokens + 64 * 0.6 * longest) / (self.answers + 64)


class Encoder(Protocol):
    """Renders a conversation."""

    def encode_chat(self, messages: Sequence[Message]) -> Sequence[int]: ...  # noqa: D102


def shared_prefix(target: Encoder) -> list[int]:
    """Return the tokens with which every rendered prompt begins: the chat template's part before the user's text."""
    texts = ("A", "zebra?", "{", "12 is")
    rendered = [target.encode_chat([{"role": "user", "content": text}]) for text in texts]
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rendered, strict=False))
    return [tokens[0] for tokens in same]


def ends_in_loop(tokens: NDArray[np.int32], repeats: int) -> bool:
    """Return whether the tokens end in ``repeats`` exact repetitions of a period of up to 48 tokens.

    Short periods must fill at least 48 tokens, so that a row of dashes or of digits is not taken for a loop.

    >>> ends_in_loop(np.tile(np.arange(20, dtype=np.int32), 3), 3)
    True
    >>> ends_in_loop(np.arange(60, dtype=np.int32), 3)
    False
    """
    for period in range(1, _LOOP_MAX_PERIOD + 1):
        span = max(period * repeats, _LOOP_MIN_TOKENS)
        if span > len(tokens):
            continue
        tail = tokens[-span:]
        if tail[-1] == tail[-1 - period] and np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
