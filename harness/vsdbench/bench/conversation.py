"""A suite's prompt, turn by turn, as token ids for a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vsdbench.errors import ConfigError

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench.suites.loaders import Suite
    from vsdbench.suites.prompts import Prompt
    from vsdbench.suites.schema import Generation


def check_length(target: Target, prompt: Prompt, tokens: Sequence[int], turn: int = 0) -> None:
    """See that a turn's tokens leave room for an answer.

    Raises:
        ConfigError: They do not, or there are none.
    """
    if not tokens:
        raise ConfigError(f"The prompt '{prompt.id}' has no tokens at turn {turn + 1}: give it a text or leave it out.")
    if len(tokens) >= target.max_positions:
        raise ConfigError(
            f"The prompt '{prompt.id}' has {len(tokens)} tokens at turn {turn + 1}, but "
            f"'{target.name}' holds {target.max_positions}: shorten it, or set max_turns."
        )


def encode_turn(target: Target, prompt: Prompt, generation: Generation, answers: Sequence[str] = ()) -> Sequence[int]:
    """Return the token ids at the turn that follows these answers: an ``ImagePrompt`` where the prompt has images.

    Args:
        target: Whose chat template it goes through.
        prompt: Its images belong to the first turn.
        generation: Chat or bare text, and the system message.
        answers: To the earlier turns.

    Raises:
        ConfigError: The target cannot read the images, or one of them cannot be opened.
    """
    turn = len(answers)
    if not generation.chat:
        return target.encode_text(prompt.turns[turn], [] if turn else [image.open() for image in prompt.images])
    messages: list[dict[str, Any]] = []
    if generation.system is not None:
        messages.append({"role": "system", "content": generation.system})
    for number, text in enumerate(prompt.turns[: turn + 1]):
        messages.append({"role": "user", "content": text})
        if prompt.images and not number:
            messages[-1]["images"] = [image.open() for image in prompt.images]
        if number < turn:
            messages.append({"role": "assistant", "content": answers[number]})
    return target.encode_chat(messages)


def check_prompts(target: Target, suite: Suite) -> None:
    """See that the target can read all first turns of a suite; of those with images, which take long, the first.

    Raises:
        ConfigError: It cannot, or one is too long for it.
    """
    seeing = next((prompt for prompt in suite.prompts if prompt.images), None)
    for prompt in suite.prompts:
        if not prompt.images or prompt is seeing:
            check_length(target, prompt, encode_turn(target, prompt, suite.config.generation))


def longest_conversation(target: Target, suite: Suite) -> int:
    """Return how many tokens the longest conversation of a suite can have, its answers as long as they may be."""
    generation = suite.config.generation

    def tokens(prompt: Prompt) -> int:
        empty = [""] * (len(prompt.turns) - 1)
        return len(encode_turn(target, prompt, generation, empty)) + len(prompt.turns) * generation.max_new_tokens

    return min(target.max_positions, max(tokens(prompt) for prompt in suite.prompts))
