"""Where an answer ends, for every decode loop there is: an end token, the length limit, or the target's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vsdbench.errors import ConfigError

if TYPE_CHECKING:
    from vsdbench.decoding.engine import DecodeSettings
    from vsdbench.models.target import Target


@dataclass(frozen=True, slots=True)
class Ending:
    """Where one answer ends.

    Attributes:
        length: Of prompt and answer together at which decoding stops, whatever the tokens are.
        limit: Why it stops there: ``length``, or ``context`` where the target holds no more.
        eos_ids: Tokens that end the answer.
    """

    length: int
    limit: str
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, target: Target, prompt: Sequence[int], settings: DecodeSettings) -> Ending:
        """Return where the answer to a prompt ends.

        Raises:
            ConfigError: Not one token of an answer fits.
        """
        if len(prompt) >= target.max_positions:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens and the target holds {target.max_positions}: shorten the prompt."
            )
        if settings.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {settings.max_new_tokens}: it must be at least 1.")
        wanted = len(prompt) + settings.max_new_tokens
        eos_ids = target.eos_ids if settings.eos_ids is None else settings.eos_ids
        if wanted > target.max_positions:
            return cls(target.max_positions, "context", eos_ids)
        return cls(wanted, "length", eos_ids)

    def cut(self, tokens: list[int], before: int) -> list[int]:
        """Return the tokens up to the first end token (included) and the limit, behind so many that are there.

        >>> Ending(9, "length", frozenset({2})).cut([5, 6, 2, 7], before=3)
        [5, 6, 2]
        >>> Ending(9, "length", frozenset({2})).cut([5, 6, 2, 7], before=7)
        [5, 6]
        """
        tokens = tokens[: self.length - before]
        for index, token in enumerate(tokens):
            if token in self.eos_ids:
                return tokens[: index + 1]
        return tokens

    def reason(self, length: int, last: int) -> str | None:
        """Return why a sequence of this length with this last token has ended, None if it goes on."""
        if last in self.eos_ids:
            return "eos"
        return self.limit if length >= self.length else None
